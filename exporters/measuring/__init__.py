"""Are two runners equal, and which is faster: comparisons, latencies, tables and plots."""
