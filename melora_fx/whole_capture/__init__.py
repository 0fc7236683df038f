"""One FX graph of a whole model, by `torch.export`, and what it holds for.

whole_model       capture_whole: the graph, as a module that can be trained, copied and pickled
example_inputs    the call that a capture is made with
dynamic_axes      which axes of the inputs may vary afterwards
assigned_buffers  buffers that a forward assigns to, written in the graph
assumed_inputs    what the export assumed of the inputs, checked in every call
conditions        what it assumed of their sizes, as text
evaluation_check  whether the graph computes what the model does in evaluation
tried_sizes       what must hold of sizes, by trials
shared_weights    the names of tied weights in an exported graph
private           what they borrow of torch
training_mode     exported graphs that follow `.train()` and `.eval()`
"""
