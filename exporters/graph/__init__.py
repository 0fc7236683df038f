"""From a torch module to an ONNX graph: the translation, and each pass over the graph.

axes              the dynamic axes, checked and named
ranges            the sizes of each axis that the graph is right for
trial_sizes       those at which it is compared with its model
named_tensors     names for what a model takes and returns
export            what one pass hands on to the next, and what a target, a precision and an adapter's form are
build             a model's graph, by transformers' or torch's exporter
clean             traces of the exporters, and stale types, taken away
weights           which initializer holds which parameter
forms             how an unmerged update is written
swap_inputs       adapters as optional inputs
cached_attention  what stands around ONNX Runtime's attention over a cache
stand_ins, fuse   ONNX Runtime's fused operators, and where the weights are afterwards
half              graphs in float16
passes            all of these in their order
"""
