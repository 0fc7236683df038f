"""Summarises, combines and compresses adapter folders, and converts them to other programs' formats.

summary       the contents of an adapter folder, site by site
lora_form     the updates of an adapter as ordinary LoRAs
find_blocks   ordinary LoRAs as block-diagonal adapters, if their values lie in blocks
arithmetic    sums, means and multiples of adapters
compress      adapters of smaller ranks
derived       the folders of adapters computed from other adapters
ort_adapter   adapters for ONNX Runtime, for graphs whose adapters are optional inputs
gguf_adapter  adapters for llama.cpp
gguf_names    llama.cpp's names and row orders for the weights of each architecture
mlx_adapter   adapters for MLX
mlx_names     mlx_lm's names of modules
"""
