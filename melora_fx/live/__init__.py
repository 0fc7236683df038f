"""Adapts weights inside forwards of the user's own Python, which run unchanged.

stand_in         what such a forward gets for a weight: it follows views, and products with it have the adapter
offsets          where a view begins in memory
arguments        the functions that a stand-in is passed to, and their arguments
shown            the weight or view that a stand-in shows
products         one product with a weight: matched, adapted and lowered as a graph
foreseen         products that are built before they are needed
reader           who reads a weight: a forward, or code that only looks at it
refusals         the errors for uses that no adapter can follow
weight_property  the property that replaces a weight on its module's class
"""
