"""From the modules of a model to FX graphs, each by itself, in place.

graphs            Capture: a graph and the module that it stands for
modules           capture_modules: a graph for each module that owns a matrix
linear_graph      the graphs of the linears of torch and transformers
packed            quantised linears whose weight only their own forward reads
trace             what the forward of any other module has shown, which goes on to run itself
lenient_tracer    the tracer that gets through Python of the user's
own_products      modules that are traced although they own no matrix
double            a copy of a module, to be traced in its place
expert_layers     transformers' layers of experts: how they are told, what lets them be captured
model_settings    a model in another mode, or without its cache, inside a block
"""
