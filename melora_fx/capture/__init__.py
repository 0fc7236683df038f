"""Turns the modules of a model into FX graphs, each module by itself, in place.

graphs            Capture: a graph and the module that it stands for
modules           capture_modules: a graph for each module that owns a matrix
linear_graph      the graphs of the linears of torch and transformers
packed            quantised linears whose weight only their own forward reads
trace             the products in the forward of any other module, which continues to run itself
lenient_tracer    a tracer that gets through the user's Python
own_products      modules that are traced although they own no matrix
double            a copy of a module, to be traced in its place
expert_layers     transformers' layers of experts: which modules they are, what lets them be captured
model_settings    a model in another mode, or without its cache, inside a block
"""
