"""Runs a graph: ONNX Runtime's providers, sessions and bindings, and torch behind the same interface."""
