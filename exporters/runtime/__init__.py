"""Runs a graph: on ONNX Runtime, on the provider that was asked for, and on torch behind the same interface.

providers.py     which of ONNX Runtime's providers, with which options: decisions only
session.py       sessions that have these providers and fall back to none
io_binding.py    inputs and outputs bound to a device's memory
ort_runner.py    `OrtRunner`: an ONNX file on a session, with swappable adapters
torch_runner.py  `Runner`, the interface, and `TorchRunner`
graph_inputs.py  inputs made from what a graph says of itself
"""
