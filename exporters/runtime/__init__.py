"""Runs a graph: on ONNX Runtime, on the provider that was asked for, and on torch behind the same interface.

providers      which of ONNX Runtime's providers, with which options: decisions only
session        sessions that have these providers and fall back to none
cache_inputs   one step of a decoder, and its empty cache
io_binding     inputs and outputs bound to a device's memory
adapter_cache  the adapters that a runner keeps, read anew when they were saved anew
ort_runner     `OrtRunner`: an ONNX file on a session, with swappable adapters
torch_runner   `Runner`, the interface, and `TorchRunner`
input_check    whether inputs are what a graph takes
graph_inputs   inputs made from what a graph says of itself
"""
