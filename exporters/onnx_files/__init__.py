"""Reads and writes .onnx files and the files next to them. Nothing here builds a graph or a model.

cache_names   names a decoder's inputs and outputs
weight_place  describes the place of a parameter in a graph
onnx_file     reads a file's graph and axes, and checks that its data files are complete
metadata      reads and writes the description of an exported file
save_graph    writes a graph, and its weights to a file named after their hash
weight_bytes  reads weights from their files, and writes graphs with changed weights
companions    writes and compares the configurations and the tokenizer's files next to a graph
"""
