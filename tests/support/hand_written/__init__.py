"""Modules as people write them by hand, each with its expected outcome: a row of docs/CAPTURES.md.

case          the class of a case, and functions that register cases
compared      outputs, attributes and random state, and how they are compared
checks        whether a case is correct, or refused as expected
in_use        compiled, exported, copied, and under gradient checkpointing
state         state that a forward keeps
regions       `no_grad`, autocast and other contexts
products      forms of the product, and parts of the weight
other_uses    other uses of a weight
shared        one weight in several places
past_owner    weights that are read from outside their owner
around        weights that are not read as attributes of their owner
control_flow  Python that decides what is computed
signatures    arguments and outputs
own_classes   classes with custom attribute access, operators or constructors
linears       subclasses of nn.Linear, and nn.Linear with something added
around_the_forward  uses of a model other than calling it
hooks         hooks that read or change a module's inputs, outputs or weights
attention     attention, and torch's transformer layers
library       modules of torch and transformers
matrices      how a module stores its matrix
methods       methods other than `forward`
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
