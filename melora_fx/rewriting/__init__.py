"""Applies a plan to a model: puts adapters into its graphs, makes its modules run them, reads and switches the sites.

rewrite          `rewrite`: freezes the base, adds the adapters' tensors, refuses what cannot be adapted
changes          finds frozen tensors that have changed since `rewrite`
marks            what `rewrite` stores on rewritten modules and on the root
adapted_module   AdaptedModule: what all modules with adapters have in common
module           RewrittenModule, which runs a graph: install, uninstall, copies and pickles
module_class     one class for all modules that run the same code, for Dynamo
running          which graph a module runs: plain, lowered, or the base's
own_forward      OwnForwardModule, which runs the forward of its own class
watch            watches first forwards and compiled graphs for weights that are read past their module
meta_device      initialises adapters that were created on the meta device
graph_device     moves the devices in a whole model's graph along with its tensors
graph_pickle     converts graphs to bytes and back
sites            `sites`, `disabled`: reads and switches the adapters of a rewritten model
hugging_face     temporary attributes of a rewritten Hugging Face model
stale_optimizer  warns about optimizers that were created before `rewrite`
"""
