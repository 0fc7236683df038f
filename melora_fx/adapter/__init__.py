"""Defines one adapter: the names, shapes and initial values of its tensors, and its update Δ.

tensors  A and B: their names, shapes and initial values, and the blocks of a weight that they change
site     the record of one site, and where its module stores the tensors
update   Δ, and its sum with a weight: the one place that computes them
"""
