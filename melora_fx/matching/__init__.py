"""The dry run: which linears `targets` names, which of them can be adapted, and why the others cannot.

targets         resolves `targets` to one configuration for each name
report          MatchReport: the public result, and its table
refusals        models that are refused as a whole
heads           which linears are heads, which "all-linear" leaves out
keep_trainable  the modules and parameters that stay trainable
linears         the linears of captured graphs, one for each weight, and their entries in reports
unmatched       the other parameters that take part in products
candidates      Candidates: the linears and the unmatched parameters of a model
obstacles       OBSTACLES: why linears cannot be adapted
other_products  parameters that take part in products and are no linears
plan            make_plan: everything that `match` reports and `rewrite` applies
match           `match`
"""
