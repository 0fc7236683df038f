"""What keeps a graph from building in TensorRT, found without TensorRT or a GPU.

operators  what TensorRT builds of ONNX: operators, types and restrictions, as tables
obstacles  the nodes of a graph that it would not build, and why
check      `check_tensorrt`: the obstacles, and how to build the graph if there are none
"""
