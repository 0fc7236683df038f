"""What a case of the table says, and the two modules that most cases are made from."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from support.models import IN, OUT, Holder, randn

Run = Callable[[nn.Module, torch.Tensor], Any]
"""One use of a model, with an input in the model's dtype; what it returns is compared."""
Build = Callable[[], nn.Module]

RIGHT = "right"
AT_REWRITE = "refused by `rewrite`"
IN_FORWARD = "refused in the first forward"
WITH_GRADIENTS = "refused where gradients are recorded"
REFUSED = "refused"
"""One of the last three: when it is noticed is not laid down."""
EITHER = "right or refused"
"""One of the first four: what the library does about it is not laid down."""
LIMIT = "a limit"
"""Wrong: what the page says under "Limits"."""


@dataclass(frozen=True)
class Case:
    """A model that somebody wrote by hand, how it is used, and what becomes of it.

    Attributes:
        what: the row of the table, in plain English.
        build: makes the model; two calls give equal models of their own.
        targets: the sites, by their full names.
        outcome: RIGHT, AT_REWRITE, IN_FORWARD, WITH_GRADIENTS, REFUSED, EITHER or LIMIT.
        match: what the text of a refusal says, a regular expression; the name of a site by default.
        calls: done in order, each with an input of its own of `shape`.
        dtype: of the oracle; float32 where random numbers or the dtype itself are part of the forward.
        tolerance: absolute and relative, against the oracle.
        base_tolerance: absolute and relative, against the plain model; 0 is bit for bit. Above 0 where torch computes
            in other kernels when a weight cannot be handed to its fast path.
        oracle: makes the model whose weights become W + Δ, if it differs from `build`: without ties between sites.
        untie: given to `fold`.
        shared: the weight has a second name: `fold` may refuse it, by name.
        copies: a copy of the model stands on its own feet: no closure reads the original.
        keeps: the model keeps what it has read of the weight, a stand-in.
        compiled, exported: what `torch.compile` and `torch.export` do otherwise.
        breaks_graph: a product that no trace has shown, and that breaks the graph of `torch.compile`.
        slow: compiles, or is no quick case for another reason.
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
        """The model is called once, with the input alone."""
        return self.calls == (call,)

    def input(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        """The input of call `number`, a leaf that wants its gradient."""
        return randn(*self.shape, seed=number + 1, dtype=dtype).requires_grad_()

    def made(self, build: Build | None = None) -> nn.Module:
        """A model of its own, always the same."""
        torch.default_generator.manual_seed(0)  # torch.manual_seed takes 3 ms where there is no GPU
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
    """Puts the class or function below it into CASES; its name is the case's id.

    With `inside`, the model holds it as its child `inner`.
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
    """`form(x, w)`, whatever that is."""

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
    """A module that multiplies by what `read` gives of it: the weight of its child `fc`."""

    class Reads(Child):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, read(self))

    case(area, what, "fc", outcome, name=name, **options)(Reads)
