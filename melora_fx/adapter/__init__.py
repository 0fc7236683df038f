"""One adapter in numbers: its names, shapes and initial values, and the update Δ that it makes.

tensors  A and B: their names, shapes and initial values, and the blocks of a weight that they change
site     the record of one site, and where its module has the tensors
update   Δ, and the one place where it is added to a weight
"""
