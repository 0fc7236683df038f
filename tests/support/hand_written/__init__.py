"""Modules as people write them by hand, each with what becomes of it: a row of docs/CAPTURES.md.

case          what a case says
compared      outputs, attributes and random state, and how they are compared
checks        whether a case is right, or refused as it should be
in_use        compiled, exported, copied, under gradient checkpointing
state         what a forward keeps
regions       `no_grad`, autocast and other contexts
products      forms of the product, and parts of the weight
other_uses    what else is done with a weight
shared        one weight in several places
past_owner    weights that are read past their owner
around        weights that are read round their owner's attributes
control_flow  Python that decides what is computed
signatures    arguments and outputs
own_classes   classes with attribute access or constructors of their own
linears       subclasses of nn.Linear, and nn.Linear with something added
around_the_forward  what is done with a model besides calling it
hooks         hooks that read or change what a module takes, returns or owns
attention     attention, and torch's transformer layers
library       modules of torch and transformers
matrices      how a module keeps its matrix
methods       methods that are not `forward`
"""

from support.hand_written import (
    around,
    around_the_forward,
    attention,
    control_flow,
    hooks,
    library,
    linears,
    matrices,
    methods,
    other_uses,
    own_classes,
    past_owner,
    products,
    regions,
    shared,
    signatures,
    state,
)
from support.hand_written.case import CASES, EITHER, Case

__all__ = [
    "CASES",
    "EITHER",
    "Case",
    "around",
    "around_the_forward",
    "attention",
    "control_flow",
    "hooks",
    "library",
    "linears",
    "matrices",
    "methods",
    "other_uses",
    "own_classes",
    "past_owner",
    "products",
    "regions",
    "shared",
    "signatures",
    "state",
]
