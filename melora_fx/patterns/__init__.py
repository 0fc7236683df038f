"""The linear nodes of a graph, whatever wrote them.

node     LinearNode: one call of a linear; how nodes are read
views    the views of a parameter that stand between it and a product
linear   find_linear_nodes: products with a matrix
experts  find_expert_nodes: products with a stack of matrices, the experts of a mixture
"""
