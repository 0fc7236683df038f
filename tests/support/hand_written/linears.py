"""Subclasses of nn.Linear, and nn.Linear with something added."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from support.hand_written.case import AT_REWRITE, EITHER, REFUSED, RIGHT, Child, case
from support.models import IN, OUT

AREA = "Subclasses of nn.Linear"


class _Linear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(IN, OUT)


@case(AREA, "a subclass that keeps its forward", "inner", inside=True)
class PlainSubclass(_Linear):
    pass


@case(AREA, "a forward that calls `super().forward`", "inner", inside=True)
class CallsSuper(_Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.tanh()) * 2


@case(AREA, "a forward that calls `nn.Linear.forward(self, x)` twice", "inner", inside=True)
class CallsTwice(_Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self, x) + nn.Linear.forward(self, -2 * x)


@case(AREA, "a forward that scales the output", "inner", inside=True)
class ScalesOutput(_Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) * 0.5


@case(AREA, "a forward that scales the weight", "inner", REFUSED, inside=True)
class ScalesWeight(_Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * 0.5, self.bias)


@case(AREA, "a forward that normalises the weight (a cosine classifier)", "inner", REFUSED, inside=True)
class Cosine(_Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


@case(AREA, "a forward that casts the weight to the input's dtype", "inner", EITHER, inside=True)
class CastsWeight(_Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


@case(AREA, "the user's own LoRA in addition to the product", "inner", inside=True)
class OwnLora(_Linear):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, IN) / 5)
        self.up = nn.Parameter(torch.randn(OUT, 2) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


@case(AREA, "a forward with an additional argument", "inner.fc")
class ExtraArgument(nn.Module):
    class Gated(_Linear):
        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            out = super().forward(x)
            return out if gate is None else out * gate

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"fc": self.Gated()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["fc"](x, torch.sigmoid(x.mean())) + self.inner["fc"](x)


@case(AREA, "a property `weight` that computes the weight", "inner", AT_REWRITE, inside=True, match="inner")
class WeightProperty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(OUT, IN) / 5)

    @property
    def weight(self) -> torch.Tensor:
        return self.raw * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


@case(AREA, "a property `weight` that computes the weight, its parameter adapted", "inner.raw", REFUSED, inside=True)
class RawWeight(WeightProperty):
    pass


def _changed(name: str, what: str, change: Any, outcome: str, **options: Any) -> None:
    """Registers a model whose linear `fc` is changed after its construction."""

    def build() -> nn.Module:
        model = _Calls()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(model.fc)
        return model

    case(AREA, what, "fc", outcome, name=name, **options)(build)


class _Calls(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(x))


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def _replace_weight(fc: nn.Linear) -> None:
    weight = fc.weight.detach()
    del fc.weight
    fc.weight = weight * 2


_changed("weight-norm", "`parametrizations.weight_norm`", parametrizations.weight_norm, AT_REWRITE)
_changed("spectral-norm", "`nn.utils.spectral_norm`", nn.utils.spectral_norm, AT_REWRITE)
_changed(
    "parametrized",
    "`register_parametrization`",
    lambda fc: parametrize.register_parametrization(fc, "weight", _Doubled()),
    AT_REWRITE,
)
_changed("pruned", "`prune.l1_unstructured`", lambda fc: prune.l1_unstructured(fc, "weight", 0.5), AT_REWRITE)
_changed("tensor-for-a-weight", "a plain tensor in place of the parameter", _replace_weight, AT_REWRITE)
_changed("no-bias", "`fc.bias = None` after construction", lambda fc: setattr(fc, "bias", None), RIGHT)
_changed("other-class", "`fc.__class__` set to a subclass", lambda fc: setattr(fc, "__class__", CallsSuper), RIGHT)
_changed(
    "transposed-memory",
    "a weight that is a transposed view of contiguous memory",
    lambda fc: setattr(fc, "weight", nn.Parameter(torch.randn(IN, OUT).T / 5)),
    RIGHT,
)


class _LazyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warns that lazy modules are new
            self.fc = nn.LazyLinear(OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@case(AREA, "`nn.LazyLinear`, called once", "fc")
def lazy_after_a_call() -> nn.Module:
    model = _LazyModel()
    model(torch.ones(1, IN))
    return model


case(AREA, "`nn.LazyLinear`, never called", "fc", AT_REWRITE, name="lazy")(_LazyModel)


class _Doubles(nn.Linear):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) * 2


class _CallsDoubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = _Doubles(IN, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


case(AREA, "a subclass with a custom `__call__`", "fc", name="linear-with-a-call")(_CallsDoubles)
