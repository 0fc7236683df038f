"""One weight in several places, and several weights in one product."""

import torch
from torch import nn
from torch.nn import functional as F

from support.hand_written.case import EITHER, Own, case, matrix
from support.models import IN, OUT

AREA = "Shared weights"


def _ids(x: torch.Tensor) -> torch.Tensor:
    return (x.detach().abs() * 9).long() % OUT


class _Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(OUT, IN)


@case(AREA, "an output layer tied by hand, `x @ self.embedding.weight.T`", "embedding", EITHER)
class TiedByHand(_Embedded):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.embedding(_ids(x)).mean(1)) @ self.embedding.weight.T


@case(AREA, "the table of an nn.Embedding as a matrix, never looked up", "embedding", EITHER)
class EmbeddingAsAMatrix(_Embedded):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.embedding.weight)


class _Head(_Embedded):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(IN, OUT, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.embedding(_ids(x)).mean(1))


class _TiedHead(_Head):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


def _untied_head() -> nn.Module:
    model = _TiedHead()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


case(
    AREA,
    "a head with the embedding's weight, `self.head.weight = self.embedding.weight`",
    "head",
    name="tied-head",
    oracle=_untied_head,
    untie=True,
)(_TiedHead)


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, IN)
        self.second = nn.Linear(IN, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def _tied_pair() -> nn.Module:
    model = _Pair()
    model.second.weight = model.first.weight
    return model


def _untied_pair() -> nn.Module:
    model = _tied_pair()
    model.second.weight = nn.Parameter(model.first.weight.detach().clone())
    return model


case(
    AREA,
    "two linears with one weight, one of them adapted",
    "first",
    name="tied-pair",
    oracle=_untied_pair,
    untie=True,
)(_tied_pair)
case(
    AREA,
    "two linears with one weight, both adapted",
    ("first", "second"),
    name="tied-pair-both",
    oracle=_untied_pair,
    untie=True,
)(_tied_pair)


@case(AREA, "one matrix in a loop: a hand-written recurrence", "w")
class Recurrence(Own):
    def __init__(self) -> None:
        super().__init__(IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in range(3):
            x = torch.tanh(F.linear(x, self.w)) + step
        return x


@case(AREA, "one linear called three times", "fc")
class CalledThreeTimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(IN, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.fc(x)) - self.fc(2 * x)


@case(AREA, "a parameter stored under two names of one module", "w", EITHER, shared=True)
class TwoNames(Own):
    def __init__(self) -> None:
        super().__init__()
        self.v = self.w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) + torch.tanh(F.linear(x, self.v))


class _Borrows(nn.Module):
    def __init__(self, w: nn.Parameter) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(x, self.w))


class _GivenToTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = matrix()
        self.first = _Borrows(shared)
        self.second = _Borrows(shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + 2 * self.second(-x + 1)


def _given_to_each() -> nn.Module:
    model = _GivenToTwo()
    model.second.w = matrix()
    return model


case(
    AREA,
    "a matrix passed to two modules, one of them adapted",
    "first.w",
    EITHER,
    name="given-to-two",
    oracle=_given_to_each,
    untie=True,
)(_GivenToTwo)


@case(
    AREA,
    "halves of one matrix as the weights of two linears",
    ("first", "second"),
    EITHER,
    copies=False,
    dtype=torch.float32,
)
class HalvesOfOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        whole = matrix(2 * OUT).detach()
        self.first = nn.Linear(IN, OUT)
        self.second = nn.Linear(IN, OUT)
        self.first.weight = nn.Parameter(whole[:OUT])
        self.second.weight = nn.Parameter(whole[OUT:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) * self.second(x)


@case(AREA, "parallel matrices stacked and multiplied at once", ("w", "v"), EITHER)
class Stacked(Own):
    def __init__(self) -> None:
        super().__init__()
        self.v = matrix(seed=12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,koi->bko", x, torch.stack([self.w, self.v]))


@case(AREA, "the weights of q, k and v concatenated for one product", ("q", "k", "v"), EITHER)
class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(IN, IN, bias=False)
        self.k = nn.Linear(IN, IN, bias=False)
        self.v = nn.Linear(IN, IN, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return F.linear(x, torch.cat([self.q.weight, self.k.weight, self.v.weight])).chunk(3, -1)


@case(AREA, "a product of two weights, `x @ (v @ w).T`", ("w", "v"), EITHER)
class ProductOfWeights(Own):
    def __init__(self) -> None:
        super().__init__()
        self.v = matrix(12, OUT, seed=12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.v @ self.w).T


@case(AREA, "the mean of two weights", ("w", "v"), EITHER)
class MeanOfWeights(Own):
    def __init__(self) -> None:
        super().__init__()
        self.v = matrix(seed=12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, (self.w + self.v) / 2)
