"""From a trained adapter to a served graph: parts of fold_speed, latency, peers, decoding and end_to_end.

fold_sides     ways to merge an adapter into a checkpoint
latency_cells, latency_report                             parts of latency
peers_environment, peers_graphs, peers_process, peers_report      parts of peers
decoding_cells, decoding_graphs, decoding_process, decoding_report      parts of decoding
end_to_end_cells, end_to_end_graphs, end_to_end_process      parts of end_to_end

For each benchmark, `cells` says what is measured, `graphs` makes the graphs that are timed, `process` times them, and
`report` writes the tables and pictures.
"""
