"""Writes graphs in the standard operators that ONNX Runtime runs fastest on a CPU: `benchmarks/results/peers.md`.

attention     writes the exporters' attentions in fewer nodes
rows          computes products, and the operators between them, over all rows at once
chosen_rows   removes rows that are never read
gemm          joins a product and its bias into one operator
gates         skips the updates of swappable adapters while there is no adapter
values        known facts about a value: its axes, its constant, its producer; new constants and shapes
"""
