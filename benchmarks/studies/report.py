def write_glue_report(rows, folder):
    pass


def write_language_report(rows, folder):
    pass
