"""Are two runners equal, and which is faster: comparisons, latencies, tables and plots.

compare  `compare`: the errors of one runner's outputs against another's
latency  `measure_latency`: runners timed in turn, and the table of their latencies
machine  memory and disk that a graph takes; device, versions and commit of a measurement
plots    pictures of latency tables
measure  `measure`: one row of results for each contender, equal first, then timed
bench    `run_bench`: the user's own graphs at several shapes
"""
