"""Weights that are read from outside the module that owns them, as its attributes."""

import functools
import operator
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from support.hand_written.case import AT_REWRITE, EITHER, IN_FORWARD, Child, Own, call, case, reading
from support.models import IN

READ = "Read from outside its module"


def _apply(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x @ module.weight.T + module.bias


@case(READ, "a helper function that receives the module", "fc")
class Helper(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _apply(self.fc, x)


@case(READ, "the product in a helper, and the module called too", "fc")
class HelperAndCall(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _apply(self.fc, x) * torch.sigmoid(self.fc(x))


class _Block(Child):
    def __init__(self) -> None:
        super().__init__(IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@case(READ, "a loop over children that reads `block.fc.weight`", ("blocks.0.fc", "blocks.1.fc"))
class LoopOverChildren(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(), _Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(F.linear(x, block.fc.weight, block.fc.bias))
        return x


@case(READ, "an alias of the weight, `self.alias = self.fc.weight`", "fc", AT_REWRITE, shared=True)
class Alias(Child):
    def __init__(self) -> None:
        super().__init__()
        self.alias = self.fc.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.alias)


@case(READ, "an alias of the weight, and the module called too", "fc", AT_REWRITE, shared=True)
class AliasAndCall(Alias):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.alias) * torch.sigmoid(self.fc(x))


@case(READ, "the input cast to the dtype of the first parameter, `x.to(next(self.parameters()))`", "fc")
class ToFirstParameter(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.to(next(self.parameters())))


@case(READ, "the same with `x.type_as(next(self.parameters()))`", "fc")
class TypeAsFirstParameter(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.type_as(next(self.parameters())))


@case(READ, "a view of the input, expanded to the shape of the first parameter", "fc")
class ViewAsFirstParameter(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = next(self.parameters())
        return self.fc(x) + x.flatten()[:1].expand_as(first).sum(0)[:1]


@case(READ, "a property that returns the transposed weight", "fc")
class Property(Child):
    @property
    def projection(self) -> torch.Tensor:
        return self.fc.weight.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.projection


@case(READ, "a cached property that returns the transposed weight", "fc", keeps=True, calls=(call, call))
class CachedProperty(Child):
    @functools.cached_property
    def projection(self) -> torch.Tensor:
        return self.fc.weight.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.projection


reading(READ, "getattr", '`getattr(self.fc, "weight")`', lambda self: getattr(self.fc, "weight"))  # noqa: B009
reading(READ, "get-parameter", '`self.get_parameter("fc.weight")`', lambda self: self.get_parameter("fc.weight"))
reading(READ, "get-submodule", '`self.get_submodule("fc").weight`', lambda self: self.get_submodule("fc").weight)
reading(READ, "attrgetter", '`operator.attrgetter("fc.weight")(self)`', operator.attrgetter("fc.weight"))
reading(READ, "named-children", "`dict(self.named_children())`", lambda self: dict(self.named_children())["fc"].weight)
reading(READ, "modules-dict", '`self._modules["fc"].weight`', lambda self: self._modules["fc"].weight)
reading(
    READ,
    "module-getattr",
    '`nn.Module.__getattr__(self.fc, "weight")`',
    lambda self: nn.Module.__getattr__(self.fc, "weight"),
    EITHER,
)
reading(READ, "weak-reference", "a weak reference to the module", lambda self: weakref.ref(self.fc)().weight)  # type: ignore[union-attr]


class _Base(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


@case(READ, "`super().forward(x)` of a class that owns a matrix", "w")
class SuperForward(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@case(READ, "`nn.Linear.forward(self.fc, x)`", "fc")
class UnboundForward(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self.fc, x)


@case(READ, "`type(self.fc).forward(self.fc, x)`", "fc")
class ForwardOfItsType(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return type(self.fc).forward(self.fc, x)


@case(READ, "`self.fc.forward(x)`", "fc")
class ForwardWithoutCall(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc.forward(x)


@case(READ, "`self.fc.forward` stored in `__init__`", "fc", EITHER, copies=False)
class StoredBoundMethod(Child):
    def __init__(self) -> None:
        super().__init__()
        self.project = self.fc.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x)


@case(READ, "a stored lambda that closes over the module", "fc", copies=False)
class StoredClosure(Child):
    def __init__(self) -> None:
        super().__init__()
        fc = self.fc
        self.project = lambda x: F.linear(x, fc.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x)


@case(READ, "modules in a plain list, registered elsewhere", "fc")
class ModulesInAList(Child):
    def __init__(self) -> None:
        super().__init__()
        self.order = [self.fc]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.order[0](x) + F.linear(x, self.order[0].weight)


@case(READ, "a sibling that receives the weight", "fc")
class HandedOver(Child):
    class Multiplies(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return x @ weight.T

    def __init__(self) -> None:
        super().__init__()
        self.product = self.Multiplies()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.fc.weight)


class _Sliced(Child):
    """Like BLOOM: multiplies by slices of the linear's weight if a flag is set."""

    def __init__(self, slow: bool) -> None:
        super().__init__()
        self.slow = slow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.slow:
            return self.fc(x)
        parts = [slice(start, start + 8) for start in range(0, IN, 8)]
        return sum(F.linear(x[:, part], self.fc.weight[:, part]) for part in parts) + self.fc.bias


def _slowed(model: Any, x: torch.Tensor) -> Any:
    model.slow = True
    return model(x)


case(READ, "a branch that slices a linear's weight, never taken", "fc", name="dead-branch")(lambda: _Sliced(False))
case(READ, "a branch that slices a linear's weight, taken", "fc", name="live-branch")(lambda: _Sliced(True))
case(
    READ,
    "a branch that slices a linear's weight, taken later",
    "fc",
    name="branch-taken-later",
    calls=(call, _slowed),
)(lambda: _Sliced(False))


def _by_script() -> Any:
    """Returns a TorchScript function that multiplies."""

    def multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w.t()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(multiply)


@case(READ, "a TorchScript function that receives the weight", "fc", IN_FORWARD, copies=False, compiled="not refused")
class GivenToTorchScript(Child):
    def __init__(self) -> None:
        super().__init__()
        self.multiply = _by_script()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, self.fc.weight)


@case(READ, "`x.new_tensor(self.fc.weight)`", "fc", IN_FORWARD, compiled="not refused")
class NewTensor(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warns that there are better ways to copy a tensor
            return F.linear(x, x.new_tensor(self.fc.weight))


reading(READ, "detached-child", "`self.fc.weight.detach()`", lambda self: self.fc.weight.detach(), IN_FORWARD)
reading(READ, "clamped-child", "`self.fc.weight.clamp(-1, 1)`", lambda self: self.fc.weight.clamp(-1, 1), IN_FORWARD)
reading(
    READ,
    "joined-parts-of-a-child",
    "`torch.cat(self.fc.weight.chunk(2))`",
    lambda self: torch.cat(self.fc.weight.chunk(2)),
    IN_FORWARD,
)


@case(READ, "a penalty on the weight of a child, `self.fc.weight.pow(2).sum()`", "fc", IN_FORWARD)
class PenaltyOnAChild(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).mean() + 0.1 * self.fc.weight.pow(2).sum()


@case(READ, "the weight kept as an attribute, `self.last = self.fc.weight`", "fc", IN_FORWARD, compiled="not refused")
class KeepsTheWeight(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.fc.weight
        return self.fc(x)
