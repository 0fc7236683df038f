"""The linear nodes of a graph: the table of patterns, the walk that finds them, and the adapters inserted behind them.

node              Pattern, LinearNode: one way to write a linear, and one call of it; helpers that read nodes
views             the views of a parameter between it and a product
einsum_terms      the letters of an `einsum`, and which of them belong to a linear
adapter_nodes     the nodes of an adapter behind a product with a matrix
products          all products that a parameter takes part in, including those without a pattern
stacks            stacks of matrices in graphs: the experts of a mixture
grouped_blocks    block-diagonal products of rows sorted by expert, as an operator
gathered_experts  products with one gathered matrix for each row, and the adapters behind them
grouped_experts   products of rows sorted by expert, and the adapters behind them
patterns          PATTERNS, and find_linear_nodes: the walk
planned_site      PlannedSite: one weight and every node that multiplies by it
"""
