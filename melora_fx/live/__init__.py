"""Adapted weights in forwards that are Python of the user's own, which run as they are.

stand_in         what such a forward gets for a weight: views of it are followed, products with it have the adapter
offsets          where a view begins in memory
arguments        the functions that it is given to
shown            what it shows
products         one product with a weight: matched, adapted and lowered as a graph
foreseen         products that are made before they are met
reader           who reads a weight: a forward, or someone who only looks
refusals         what is said of a use that no adapter can follow
weight_property  what stands in the place of a weight on its module's class
"""
