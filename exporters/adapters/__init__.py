"""Adapters in other tools' formats.

ort_adapter  ONNX Runtime's, for a graph whose adapters are optional inputs
"""
