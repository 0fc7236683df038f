"""The dry run: which linears `targets` names, which of them can be adapted, and why not the others.

targets    what the user asked for: one configuration for each name
report     MatchReport: the public result, and its table
refusals   models that are refused whole
linears    PlannedSite: the linears of captured graphs, one for each weight
obstacles  why a linear cannot be adapted
plan       make_plan: all that `match` reports and `rewrite` applies
match      `match`
"""
