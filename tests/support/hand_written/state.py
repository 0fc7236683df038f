"""State that a forward keeps from one call to the next."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from support.hand_written.case import AT_REWRITE, EITHER, REFUSED, TWICE, Child, Own, call, case
from support.models import IN, OUT

AREA = "State"
_RESULTS: dict[str, Any] = {}
_WEIGHTS: dict[str, Any] = {}


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale
        self.w = nn.Parameter(torch.randn(IN, IN) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) * self._scale


@case(AREA, "two modules of one class that differ by a private attribute", ("0.w", "2.w"))
def private_attribute() -> nn.Module:
    return nn.Sequential(Scaled(2.0), nn.Tanh(), Scaled(0.5))


@case(AREA, "a counter, `self.count += 1`", "w", calls=TWICE)
class Counter(Own):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return F.linear(x, self.w) * self.count


@case(AREA, "a buffer incremented in place", "w", calls=TWICE)
class BufferInPlace(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        return F.linear(x, self.w) / self.steps.clone()


@case(AREA, "a buffer that is reassigned: a running mean of the output", "w", calls=TWICE)
class BufferReassigned(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(OUT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.w)
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out - self.mean


@case(AREA, "a buffer that the first call registers", "w", calls=TWICE)
class BufferOfTheFirstCall(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "offset"):
            self.register_buffer("offset", x.detach().mean(0))
        return F.linear(x - self.offset, self.w)


@case(AREA, "outputs appended to a list on self", "w", calls=TWICE)
class ListOfOutputs(Own):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.outputs.append(F.linear(x, self.w).detach())
        return F.linear(x, self.w) + len(self.outputs)


@case(AREA, "a dict on self as a cache: computed once, then reused", "w", calls=TWICE)
class DictOfOutputs(Own):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "first" not in self.cache:
            self.cache["first"] = F.linear(x, self.w).detach()
        return F.linear(x, self.w) + self.cache["first"]


def _with_results(model: nn.Module, x: torch.Tensor) -> Any:
    _RESULTS.clear()
    return model(x), dict(_RESULTS)


@case(AREA, "outputs put into a dict of the Python module", "w", AT_REWRITE, calls=(_with_results,))
class GlobalCache(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _RESULTS["hidden"] = F.linear(x, self.w).detach()
        return _RESULTS["hidden"] + F.linear(x, self.w)


@case(AREA, "the weight itself put into a list on self and used in the next call", "w", keeps=True, calls=TWICE)
class ListOfWeights(Own):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.w)
        return F.linear(x, self.seen[0]) + len(self.seen)


@case(AREA, "the transposed weight kept on self: created once, used in each call", "w", keeps=True, calls=TWICE)
class KeptTranspose(Own):
    def __init__(self) -> None:
        super().__init__()
        self.transposed: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.transposed is None:
            self.transposed = self.w.T
        return x @ self.transposed


def _with_weights(model: nn.Module, x: torch.Tensor) -> Any:
    _WEIGHTS.clear()
    return model(x), x @ _WEIGHTS["w"].T


@case(AREA, "the weight put into a dict of the Python module, used by the caller", "w", EITHER, calls=(_with_weights,))
class GlobalWeight(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _WEIGHTS["w"] = self.w
        return F.linear(x, self.w)


def _annealed(model: Any, x: torch.Tensor) -> Any:
    model.tau = model.tau / 2
    return model(x)


@case(
    AREA,
    "an attribute that the training loop changes between calls (`model.tau`)",
    "w",
    calls=(call, _annealed, _annealed),
)
class Annealed(Own):
    def __init__(self) -> None:
        super().__init__()
        self.tau = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) / self.tau


@case(AREA, "keys of earlier calls concatenated with those of this call", "w", calls=TWICE)
class Past(Own):
    def __init__(self) -> None:
        super().__init__()
        self.past: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = F.linear(x, self.w)
        self.past = keys if self.past is None else torch.cat([self.past.detach(), keys])
        return keys @ self.past.T


def _with_auxiliary(model: Any, x: torch.Tensor) -> Any:
    return model(x), model.auxiliary_loss


@case(AREA, "an auxiliary loss stored on self for the training loop", "w", calls=(_with_auxiliary,))
class AuxiliaryLoss(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.w)
        self.auxiliary_loss = out.pow(2).mean()
        return out


class _Reports(Own):
    def __init__(self, parent: list[Any]) -> None:
        super().__init__()
        self.parent = parent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.w)
        self.parent[0].norms.append(float(out.detach().norm()))
        return out


@case(AREA, "a child that writes into its parent", "child.w", calls=TWICE)
class ToldByTheChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []
        self.child = _Reports([self])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(x) / (1 + len(self.norms))


@case(AREA, "BatchNorm after the product, with its statistics", "w", shape=(6, IN), calls=TWICE)
class Normalised(Own):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(F.linear(x, self.w))


@case(AREA, "a linear that the first call creates", "w", EITHER, calls=TWICE, dtype=torch.float32)
class ChildOfTheFirstCall(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "head"):
            self.head = nn.Linear(OUT, 2)
        return self.head(F.linear(x, self.w))


@case(AREA, "a moving average of the weight", "w", REFUSED, calls=TWICE)
class AverageOfTheWeight(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(OUT, IN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average.lerp_(self.w.detach(), 0.1)
        return F.linear(x, self.w) + F.linear(x, self.average)


@case(AREA, "a weight that the forward clips in place", "w", REFUSED)
class ClippedWeight(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.w.clamp_(-0.1, 0.1)
        return F.linear(x, self.w)


@case(AREA, "a weight that the forward clips through `.data`", "w", REFUSED)
class ClippedData(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.w.data.clamp_(-0.1, 0.1)
        return F.linear(x, self.w)


class _Twin(Child):
    """`twin` is `first` under a second name."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.twin = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twin(torch.tanh(self.first(x)))


@case(AREA, "one module under two names, `self.b = self.a`", "first.w")
def tied_twin() -> nn.Module:
    return _Twin(Scaled(2.0))


@case(AREA, "one nn.Linear under two names", "first")
def tied_twin_linear() -> nn.Module:
    return _Twin(nn.Linear(IN, IN))


@case(AREA, "one module under two names, called only by the second", "first.w")
class CalledByItsSecondName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Scaled(2.0)
        self.twin = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twin(x) * 2
