"""The same sums in the standard operators that ONNX Runtime's CPU computes fastest, by `benchmarks/results/peers.md`.

attention     attentions as the exporters write them, in fewer nodes
rows          products, and what is between them, over all rows at once
chosen_rows   rows that nobody reads, left out
gemm          a product and its bias in one operator
gates         updates of swappable adapters, left out while there is no adapter
values        what is known of a value: its axes, its constant, where it comes from; shapes for reshapes
"""
