"""Adapters seen from outside, and in other tools' formats.

summary      what an adapter folder holds, site by site
lora_form    its updates as ordinary LoRAs
find_blocks  ordinary LoRAs as block-diagonal adapters, where their values lie in blocks
ort_adapter  ONNX Runtime's, for a graph whose adapters are optional inputs
vllm         whether vLLM can serve an adapter, and with which flags
"""
