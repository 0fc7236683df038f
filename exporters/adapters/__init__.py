"""Adapters seen from outside, and in other tools' formats.

summary      what an adapter folder holds, site by site
ort_adapter  ONNX Runtime's, for a graph whose adapters are optional inputs
"""
