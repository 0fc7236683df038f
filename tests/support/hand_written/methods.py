"""Products in methods other than `forward`, and forwards that are not the class's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from support.hand_written.case import AT_REWRITE, EITHER, LIMIT, Child, Own, call, case
from support.models import IN, OUT

AREA = "Methods other than `forward`"


class _Encoder(nn.Module):
    """Like CLIP: has projections that methods other than `forward` multiply by."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(IN, IN)
        self.text = nn.Linear(IN, OUT, bias=False)
        self.projection = nn.Parameter(torch.randn(IN, OUT) / 5)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(x)) @ self.projection

    def get_text_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) @ self.text.weight.T

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(self.body(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class _Encodes(_Encoder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(x)


class _Features(_Encoder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_text_features(x)


def _use(name: str) -> Callable[[Any, torch.Tensor], Any]:
    """Returns a use that calls a method instead of the model."""
    return lambda model, x: getattr(model, name)(x)


def _product_of_the_caller(model: Any, x: torch.Tensor) -> Any:
    return F.linear(model(x), model.text.weight)


def _penalty_of_the_caller(model: Any, x: torch.Tensor) -> Any:
    return model.logits(x), model.text.weight.pow(2).sum()


def _method(
    name: str,
    what: str,
    site: str,
    *calls: Callable[[Any, torch.Tensor], Any],
    outcome: str = EITHER,
    build: type[nn.Module] = _Encoder,
) -> None:
    case(AREA, what, site, outcome, name=name, calls=calls)(build)


encode, features, logits, forward = (_use(name) for name in ("encode", "get_text_features", "logits", "forward"))
_method(
    "method-of-forward",
    "`forward` calls a method that multiplies",
    "projection",
    call,
    build=_Encodes,
    outcome="correct",
)
_method(
    "features-of-forward",
    "`forward` calls a method that reads a linear's weight",
    "text",
    call,
    build=_Features,
    outcome="correct",
)
_method("method", "a method that multiplies by the module's own matrix; `forward` is not called", "projection", encode)
_method("features", "a method that multiplies by a linear's weight; `forward` is not called", "text", features)
_method("method-with-a-call", "a method that calls the linear", "text", logits, outcome="correct")
_method(
    "forward-then-method",
    "a call of the model, then a call of the method that `forward` calls",
    "projection",
    call,
    encode,
    build=_Encodes,
)
_method(
    "forward-then-features",
    "a call of the model, then a call of a method that `forward` does not call",
    "text",
    call,
    features,
)
_method(
    "forward-by-the-caller",
    "`model.forward(x)` instead of `model(x)`",
    "projection",
    forward,
    build=_Encodes,
    outcome="correct",
)
_method(
    "product-by-the-caller",
    "the training loop multiplies by `model.text.weight`",
    "text",
    _product_of_the_caller,
    outcome=LIMIT,
)
_method(
    "penalty-by-the-caller",
    "the training loop adds `model.text.weight.pow(2).sum()`",
    "text",
    _penalty_of_the_caller,
    outcome=LIMIT,
)


def evaluates(model: nn.Module, x: torch.Tensor) -> Any:
    """Switches to eval mode and back, as a training script does; `train` reads the weight."""
    training = model.training
    output = model.eval()(x)
    model.train(training)
    return output


class _OwnMethod(nn.Module):
    class Projects(Own):
        def project(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.w)

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Projects()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.project(x)


case(AREA, "a child that has no `forward`; its method is called", "inner.w", AT_REWRITE, name="no-forward")(_OwnMethod)


@case(AREA, "`self.forward = self.fast` in `__init__`", "w", EITHER, copies=False)
class ForwardOfTheInstance(Own):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.fast

    def fast(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w) * 2


@case(AREA, "`self.fc.forward` replaced by a user-defined function", "fc", EITHER, copies=False)
class ForwardReplaced(Child):
    def __init__(self) -> None:
        super().__init__()
        plain = self.fc.forward
        self.fc.forward = lambda x: plain(x) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@case(AREA, "a custom `__call__` that changes the input and the output of `forward`", "inner.w")
class OwnCall(nn.Module):
    class Doubles(Own):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(2 * x) + 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.w)

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Doubles()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@case(AREA, "a custom `__call__` that never calls `forward`", "inner.w", EITHER)
class CallInsteadOfForward(nn.Module):
    class Multiplies(Own):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.w)

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Multiplies()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@case(AREA, "a custom `__rmatmul__`: `x @ module`", "inner.w", EITHER)
class OwnOperator(nn.Module):
    class Matrix(Own):
        def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w.T

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Matrix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.__rmatmul__(x)


@case(AREA, "a static method that receives the weight", "w")
class StaticMethod(Own):
    @staticmethod
    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.w)


@case(AREA, "a custom `train` that reads the weight", "w", calls=(call, evaluates))
class ReadsInTrain(Own):
    def train(self, mode: bool = True) -> "ReadsInTrain":
        self.is_zero = not self.w.detach().any()
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)
