"""Turns a torch module into an ONNX graph: the translation, and each pass over the graph.

axes              names the dynamic axes
ranges            computes the sizes of each axis for which the graph is correct
trial_sizes       chooses the sizes at which a graph is compared with its model
named_tensors     names a model's inputs and outputs
export            defines the state that passes hand on, and the types of targets, precisions and forms
build             translates a model with transformers' or torch's exporter
clean             removes the exporters' traces and stale types
weights           finds which initializer stores which parameter
forms             writes unmerged updates
swap_inputs       turns adapters into optional inputs
cached_attention  rewrites the nodes around ONNX Runtime's attention over a cache
stand_ins, fuse   fuses nodes into ONNX Runtime's operators, and finds the weights afterwards
half              converts graphs to float16
passes            runs all passes in their order
"""
