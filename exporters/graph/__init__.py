"""From a torch module to an ONNX graph: the export, and each pass over the graph."""
