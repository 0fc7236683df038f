"""How an adapted linear is computed in training: a table of the ways, the choice, and the pass over the graph.

cost                which of two ways to compute the same takes less time, by measured constants
slices              rows and the parts of `split`, as `bmm` takes them
dropout             a rate in steps of 2⁻¹⁶, and a mask that its seed gives again
quantized_gradient  gradients for the input of quantised linears, whose kernels have none
by_torch            what is added to slices, and the gradients from them, by torch's products
by_triton           the same by Triton kernels
triton_kernels      the kernels, and what launches them
forward_backward    output and gradients of one linear with its adapter
operators           the same as operators, for `torch.compile`
adapted_linear      one linear with its adapter, as what a graph calls; the formulas
lowering            Lowering: what one is
one_call            WEIGHT, ACTIVATION and TRITON: a linear and its adapter as one call of `adapted_linear`
grouped_call        GROUPED: experts in transformers' grouped form
lowerings           LOWERINGS: which one a site gets, and the pass that puts them into a graph
"""
