"""From a model to FX graphs: module by module in place, or one graph of the whole model.

graphs            Capture: a graph and the module that it stands for
modules           capture_modules: a graph for each module that owns a matrix
trace             the graph of one module, and why a module has none
packed            quantised linears whose weight only their own forward reads
expert_layers     transformers' layers of experts: how they are told, what lets them be captured
bypassed          weights that a forward reads without calling their module, by its source
whole_model       capture_whole: one graph by `torch.export`
example_inputs    the inputs of a capture, and those that it takes afterwards
shared_weights    the names of tied weights in an exported graph
training_mode     exported graphs that follow `.train()` and `.eval()`
evaluation_check  whether a capture computes in evaluation what its model does
model_settings    a model in another mode, or without its cache, inside a block
"""
