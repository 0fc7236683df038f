"""Finds what keeps TensorRT from building a graph, without TensorRT or a GPU.

operators  tables of the ONNX operators that TensorRT builds, with their types and restrictions
obstacles  the nodes of a graph that TensorRT would not build, and why
check      `check_tensorrt`: the obstacles, and how to build the graph if there are none
"""
