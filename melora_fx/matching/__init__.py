"""The dry run: which linears `targets` names, which of them can be adapted, and why not the others.

targets         what the user asked for: one configuration for each name
report          MatchReport: the public result, and its table
refusals        models that are refused whole
heads           which linears are heads, that "all-linear" leaves out
keep_trainable  the modules and parameters that stay trainable
linears         the linears of captured graphs, one for each weight, and what is said of them
unmatched       the other parameters that take part in products
candidates      both, of a model
obstacles       OBSTACLES: why linears cannot be adapted
other_products  what takes part in products and is no linear
plan            make_plan: all that `match` reports and `rewrite` applies
match           `match`
"""
