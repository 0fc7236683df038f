"""Computes adapted linears in training: the table of lowerings, the choice for a site, and the pass over a graph.

cost                chooses the faster of two equivalent computations, by measured constants
slices              the slices of rows and the parts of `split`, in the shapes that `bmm` needs
dropout             a rate in steps of 2⁻¹⁶, and a mask that its seed reproduces
quantized_gradient  gradients for the inputs of quantised linears whose kernels have none
by_torch            the updates of slices and their gradients, with torch's products
by_triton           the same with Triton kernels
triton_kernels      the kernels, and the functions that launch them
forward_backward    output and gradients of one linear with its adapter
operators           the same as custom operators, for `torch.compile`
adapted_linear      the function that lowered graphs call: one linear with its adapter; the formulas
lowering            Lowering: one entry of the table
one_call            WEIGHT, ACTIVATION and TRITON: a linear and its adapter as one call of `adapted_linear`
grouped_call        GROUPED: experts in transformers' grouped form
lowerings           LOWERINGS: the table, the choice for a site, and the pass that lowers a graph
"""
