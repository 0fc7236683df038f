"""Are two runners equal, and which is faster: comparisons, latencies, tables and plots.

compare  `compare`: the errors of one runner's outputs against another's
rounding  what error rounding explains, where a model is ill-conditioned
timing   `time_in_turn`: the one timer; medians with p20 and p80, ratios to a reference
tables   rows as CSV files and as Markdown
latency  `measure_latency`: runners timed in turn, and the table of their latencies
machine  memory and disk that a graph takes; device, versions and commit of a measurement
plots    pictures of latency tables
measure  `measure`: one row of results for each contender, equal first, then timed
bench    `run_bench`: the user's own graphs at several shapes
"""
