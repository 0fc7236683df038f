"""Weights that are not read as attributes of the module that owns them."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from support.hand_written.case import AT_REWRITE, EITHER, IN_FORWARD, Child, Own, case, reading
from support.models import IN, OUT

ROUND = "Not read as an attribute"

reading(
    ROUND,
    "parameters-dict",
    '`self.fc._parameters["weight"]`',
    lambda self: self.fc._parameters["weight"],
    IN_FORWARD,
)
reading(
    ROUND,
    "instance-dict",
    '`self.fc.__dict__["_parameters"]`',
    lambda self: vars(self.fc)["_parameters"]["weight"],
    IN_FORWARD,
)
reading(
    ROUND,
    "named-parameters",
    "`dict(self.named_parameters())`",
    lambda self: dict(self.named_parameters())["fc.weight"],
    IN_FORWARD,
)
reading(ROUND, "first-parameter", "`next(self.fc.parameters())`", lambda self: next(self.fc.parameters()), IN_FORWARD)
reading(ROUND, "state-dict", '`self.state_dict()["fc.weight"]`', lambda self: self.state_dict()["fc.weight"], EITHER)


@case(ROUND, "a stored lambda with the weight as a default argument", "fc", IN_FORWARD, copies=False)
class StoredDefault(Child):
    def __init__(self) -> None:
        super().__init__()
        self.project = lambda x, w=self.fc.weight: F.linear(x, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x)


@case(ROUND, "a stored lambda that closes over the weight", "fc", IN_FORWARD, copies=False)
class StoredWeight(Child):
    def __init__(self) -> None:
        super().__init__()
        weight = self.fc.weight
        self.project = lambda x: F.linear(x, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x)


@case(ROUND, "`functools.partial(F.linear, weight=self.w)`", "w", IN_FORWARD)
class StoredPartial(Own):
    def __init__(self) -> None:
        super().__init__()
        self.project = functools.partial(F.linear, weight=self.w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x)


@case(ROUND, "the weight in a plain list", "fc", IN_FORWARD)
class PlainList(Child):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.fc.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[0])


@case(ROUND, "the weight in a plain list, and the module called too", "fc", IN_FORWARD)
class PlainListAndCall(PlainList):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + F.linear(x, self.weights[0])


@case(ROUND, "a view of the weight made in `__init__`", "fc", EITHER, copies=False, dtype=torch.float32)
class ViewOfInit(Child):
    def __init__(self) -> None:
        super().__init__()
        self.transposed = self.fc.weight.detach().T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.transposed


class _Algebra:
    """Not a module: it stores a weight and multiplies by it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


@case(ROUND, "the weight in an object that is not a module", "fc", IN_FORWARD)
class InAnObject(Child):
    def __init__(self) -> None:
        super().__init__()
        self.algebra = _Algebra(self.fc.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.algebra(x)


@case(ROUND, "a module only in a plain list, which PyTorch does not see", "fc", AT_REWRITE)
class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(IN, OUT)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden[0](x)


@case(ROUND, "the weights in a plain list, joined with `torch.cat`", ("q", "k"), IN_FORWARD)
class JoinedList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(IN, OUT), nn.Linear(IN, OUT)
        self.kept = [self.q.weight, self.k.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, torch.cat(self.kept))
