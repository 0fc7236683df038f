"""The linear nodes of a graph: one table of what is taken for one, one walk, and what is inserted behind them.

node              Pattern, LinearNode: one way to write a linear, and one call of it; how nodes are read
views             the views of a parameter that stand between it and a product
einsum_terms      the letters of an `einsum`, and which are those of a linear
adapter_nodes     the nodes of an adapter behind a product with a matrix
products          all products that a parameter takes part in, also those without a pattern
stacks            stacks of matrices in graphs, the experts of a mixture
grouped_blocks    block-diagonal products of rows that are sorted by expert, as an operator
gathered_experts  products whose matrices are gathered for each row, and the adapters behind them
grouped_experts   products of rows that are sorted by expert, and the adapters behind them
patterns          PATTERNS, and find_linear_nodes: the walk
planned_site      PlannedSite: one weight and every node that multiplies by it
"""
