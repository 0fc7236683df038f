"""Captures a whole model as one FX graph with `torch.export`, and checks the inputs that the graph is valid for.

whole_model       capture_whole: the graph, as a module that can be trained, copied and pickled
example_inputs    the call that a capture is made with
dynamic_axes      which axes of the inputs may vary afterwards
assigned_buffers  buffers that a forward assigns to, written in the graph
assumed_inputs    the export's assumptions about the inputs, checked in every call
conditions        its assumptions about their sizes, as text
evaluation_check  whether the graph computes what the model does in evaluation
tried_sizes       the conditions on sizes that the graph needs, found by trials
shared_weights    the names of tied weights in an exported graph
private           the undocumented parts of torch that these files use
training_mode     exported graphs that follow `.train()` and `.eval()`
"""
