"""Runs graphs on ONNX Runtime, on the requested provider, and models on torch behind the same interface.

providers      chooses ONNX Runtime's providers and their options: decisions only
session        sessions with exactly these providers, without a fallback
cache_inputs   the inputs of one step of a decoder, and its empty cache
io_binding     inputs and outputs bound to a device's memory
adapter_cache  the adapters that a runner keeps, read again after they are saved again
ort_runner     `OrtRunner`: an ONNX file on a session, with swappable adapters
torch_runner   `Runner`, the interface, and `TorchRunner`
input_check    checks inputs against what a graph accepts
graph_inputs   makes inputs from the names, types and axes of a graph's inputs
"""
