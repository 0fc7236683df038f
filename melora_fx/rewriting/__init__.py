"""Applies a plan to a model: adapters in its graphs, modules that run them, and the sites to read and switch.

rewrite          `rewrite`: what is frozen, which tensors the modules get, what is refused
changes          what has changed since, of what was frozen
marks            what stands on rewritten modules and on the root meanwhile
adapted_module   AdaptedModule: what every module with adapters has in common
module           RewrittenModule, which runs a graph: install, uninstall, copies and pickles
module_class     one class for all modules that run the same code, for Dynamo
running          which graph a module runs: plain, lowered, or the base's
own_forward      OwnForwardModule, which runs the forward of its own class
watch            first forwards, and what Dynamo compiles, watched for reads past a module
meta_device      adapters that were made on the meta device get their values
graph_device     graphs of a whole model that go where its tensors go
graph_pickle     graphs as bytes
sites            `sites`, `disabled`: the adapters of a rewritten model, read and switched
hugging_face     what a Hugging Face model says of itself meanwhile
stale_optimizer  optimizers that were made before `rewrite`
"""
