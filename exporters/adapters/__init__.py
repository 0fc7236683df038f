"""Adapters seen from outside, made of other adapters, and in other programs' formats.

summary       what an adapter folder holds, site by site
lora_form     its updates as ordinary LoRAs
find_blocks   ordinary LoRAs as block-diagonal adapters, where their values lie in blocks
arithmetic    sums, means and multiples of adapters
compress      adapters of smaller ranks
derived       the folders of adapters that are made of adapters
ort_adapter   ONNX Runtime's, for a graph whose adapters are optional inputs
gguf_adapter  llama.cpp's
gguf_names    what its converter makes of the weights of each architecture
mlx_adapter   MLX's
mlx_names     what mlx_lm calls the modules of models
"""
