"""An .onnx file seen from outside: what it holds, and what stands beside it. Nothing here builds a graph or a model.

cache_names   what a decoder's inputs and outputs are called
weight_place  where a parameter lives in a graph
onnx_file     a file's graph, axes and data files, checked to be whole
metadata      what an exported file says of itself
save_graph    a graph written with its weights beside it, in a file named after their hash
weight_bytes  weights read and changed in the files that they lie in
companions    the configuration and the tokenizer's files beside a graph
"""
