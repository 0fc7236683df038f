"""From a trained adapter to a graph that is served: parts of fold_speed, latency, peers, decoding and end_to_end.

fold_sides     ways to merge an adapter into a folder
latency_cells, latency_report                             parts of latency
peers_environment, peers_graphs, peers_process, peers_report      parts of peers
decoding_cells, decoding_graphs, decoding_process, decoding_report      parts of decoding
end_to_end_cells, end_to_end_graphs, end_to_end_process      parts of end_to_end

Of a benchmark, `cells` says what is measured, `graphs` makes what is timed, `process` is what times it, and `report`
writes the tables and pictures.
"""
