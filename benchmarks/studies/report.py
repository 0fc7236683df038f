def write_glue_report(rows, folder):
    pass
