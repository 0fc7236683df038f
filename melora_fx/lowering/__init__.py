"""How an adapted linear is computed in training: the choice, the operators, and the pass over the graph.

cost                which of two ways to compute the same takes less time, by measured constants
slices              the N slices of a row and the parts of `split`, as `bmm` takes them
dropout             a rate in steps of 2⁻¹⁶, and a mask that its seed gives again
quantized_gradient  gradients for the input of quantised linears, whose kernels have none
gradients           the gradients of `adapted_linear` from slices
adapted_linear      one linear with its adapter, as a function and as an operator; the formulas
grouped_blocks      block-diagonal products of rows that are sorted by expert, as an operator
choice              which lowering a site gets, and why it cannot have another
lower               the pass that puts one call in the place of each adapter's plain nodes
"""
