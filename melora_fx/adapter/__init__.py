"""One adapter in numbers: its names, shapes and initial values, and the update Δ that it makes.

site     the names of what an adapter adds to a module, and the record of one site
tensors  their shapes and initial values, and the blocks of a weight that they change
update   Δ, and the one place where it is added to a weight
"""
