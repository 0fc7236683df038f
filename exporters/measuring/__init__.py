"""Compares runners: are their outputs equal, and which one is faster; writes tables and plots.

compare  `compare`: the errors of one runner's outputs against another's
rounding  how much of an error rounding explains, if the model is ill-conditioned
timing   `time_in_turn`: the only timer; medians with p20 and p80, ratios to a reference
tables   rows as CSV files and as Markdown
latency  `measure_latency`: runners timed in turn, and the table of their latencies
machine  memory and disk use of a graph; device, versions and commit of a measurement
plots    plots of latency tables
measure  `measure`: compares the outputs of contenders, then times them; one row of results each
bench    `run_bench`: the user's graphs at several shapes
"""
