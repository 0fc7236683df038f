"""What keeps a graph from building in TensorRT, found without TensorRT or a GPU.

operators.py  what TensorRT builds of ONNX: operators, types and restrictions, as tables
obstacles.py  the nodes of a graph that it would not build, and why
check.py      `check_tensorrt`: the obstacles, and how to build the graph if there are none
"""
