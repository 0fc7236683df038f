"""The same sums in those standard operators that ONNX Runtime computes fastest on a CPU: `benchmarks/results/peers.md`.

attention     attentions as the exporters write them, in fewer nodes
rows          products, and what is between them, over all rows at once
chosen_rows   rows that nobody reads, left out
gemm          a product and its bias in one operator
gates         updates of swappable adapters, left out while there is no adapter
values        what is known of a value: its axes, its constant, where it comes from; new constants and shapes
"""
