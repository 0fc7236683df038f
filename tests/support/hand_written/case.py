"""The class of a case, functions that register cases, and the modules that most cases are built from."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from support.models import IN, OUT, Holder, randn

Run = Callable[[nn.Module, torch.Tensor], Any]
"""One use of a model, with an input in the model's dtype; returns the values to compare."""
Build = Callable[[], nn.Module]

RIGHT = "correct"
AT_REWRITE = "refused by `rewrite`"
IN_FORWARD = "refused in the first forward"
WITH_GRADIENTS = "refused if gradients are recorded"
REFUSED = "refused"
"""One of the three refusals above: the test accepts any of them."""
EITHER = "correct or refused"
"""RIGHT, AT_REWRITE, IN_FORWARD or WITH_GRADIENTS: the test accepts any of them."""
LIMIT = "a limit"
"""Incorrect, as the page says under "Limits"."""


@dataclass(frozen=True)
class Case:
    """A hand-written model, how it is used, and the expected outcome.

    Attributes:
        what: the case's text in the table, in plain English.
        build: builds the model; two calls return equal, separate models.
        targets: the full names of the sites.
        outcome: RIGHT, AT_REWRITE, IN_FORWARD, WITH_GRADIENTS, REFUSED, EITHER or LIMIT.
        match: a regular expression that the text of a refusal must match; by default the quoted name of a site.
        calls: the uses, in order; each gets its own input of `shape`.
        dtype: the oracle's dtype; float32 if random numbers or the dtype itself are part of the forward.
        tolerance: absolute and relative tolerance against the oracle.
        base_tolerance: absolute and relative tolerance against the plain model; 0 means bit for bit. Above 0 if torch
            uses other kernels because a weight cannot be passed to its fast path.
        oracle: builds the model whose weights become W + Δ, if it differs from `build`: without tied weights.
        untie: passed to `fold`.
        shared: the weight has a second name, so `fold` may refuse with an error that names `untie=True`.
        copies: a copy of the model is independent: no closure reads the original.
        keeps: the model keeps a stand-in that it read, so its state is not compared.
        compiled, exported: what `torch.compile` or `torch.export` does differently; if set, its test is skipped.
        breaks_graph: contains a product that no trace has seen, which breaks the graph of `torch.compile`.
        slow: compiles, or is slow for another reason.
    """

    id: str
    area: str
    what: str
    build: Build
    targets: tuple[str, ...]
    outcome: str = RIGHT
    match: str = ""
    calls: tuple[Run, ...] = ()
    shape: tuple[int, ...] = (3, IN)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-4
    base_tolerance: float = 0.0
    oracle: Build | None = None
    untie: bool = False
    shared: bool = False
    copies: bool = True
    keeps: bool = False
    compiled: str = ""
    exported: str = ""
    breaks_graph: bool = False
    slow: bool = False

    @property
    def is_plain_call(self) -> bool:
        """Whether the model is called once, with only the input."""
        return self.calls == (call,)

    def input(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns the input of call `number`, a leaf that requires its gradient."""
        return randn(*self.shape, seed=number + 1, dtype=dtype).requires_grad_()

    def made(self, build: Build | None = None) -> nn.Module:
        """Builds a new model, always with the same values."""
        torch.default_generator.manual_seed(0)  # torch.manual_seed takes 3 ms without a GPU
        return (build or self.build)()


CASES: dict[str, Case] = {}
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def call(model: nn.Module, x: torch.Tensor) -> Any:
    return model(x)


TWICE: tuple[Run, ...] = (call, call)


def case(
    area: str,
    what: str,
    targets: str | Sequence[str],
    outcome: str = RIGHT,
    *,
    name: str = "",
    inside: bool = False,
    **options: Any,
) -> Callable[[Any], Any]:
    """Returns a decorator that registers a class or function in CASES; its name, or `name`, becomes the case's id.

    With `inside`, what it builds is the child `inner` of the model.
    """

    def add(build: Any) -> Any:
        own = name or _WORDS.sub("-", build.__name__).lower().strip("_").replace("_", "-")
        assert own not in CASES, own
        names = (targets,) if isinstance(targets, str) else tuple(targets)
        made = (lambda: Holder(build())) if inside else build
        CASES[own] = Case(own, area, what, made, names, outcome, **{"calls": (call,)} | options)
        return build

    return add


def matrix(out_features: int = OUT, in_features: int = IN, seed: int = 11) -> nn.Parameter:
    return nn.Parameter(randn(out_features, in_features, seed=seed) * 0.2)


class Own(nn.Module):
    """Owns one matrix, `w`."""

    def __init__(self, out_features: int = OUT, in_features: int = IN) -> None:
        super().__init__()
        self.w = matrix(out_features, in_features)


class Child(nn.Module):
    """Has one nn.Linear, `fc`."""

    def __init__(self, out_features: int = OUT) -> None:
        super().__init__()
        self.fc = nn.Linear(IN, out_features)


class Formed(Own):
    """Returns `form(x, w)`, with its matrix as `w`."""

    def __init__(self, form: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: torch.Tensor) -> Any:
        return self.form(x, self.w)


def formed(area: str, name: str, what: str, form: Callable[..., Any], outcome: str = RIGHT, **options: Any) -> None:
    case(area, what, "w", outcome, name=name, **options)(lambda: Formed(form))


def reading(
    area: str, name: str, what: str, read: Callable[[Any], torch.Tensor], outcome: str = RIGHT, **options: Any
) -> None:
    """Registers a module that multiplies by `read(self)`, which returns the weight of its child `fc`."""

    class Reads(Child):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, read(self))

    case(area, what, "fc", outcome, name=name, **options)(Reads)
