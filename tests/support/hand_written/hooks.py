"""Hooks that read or change a module's inputs, outputs or weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from support.hand_written.case import EITHER, RIGHT, TWICE, Child, Own, call, case
from support.models import IN, Holder

AREA = "Hooks"


class _Linear(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(x))


class _Matrix(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


def _hooked(name: str, what: str, hook: Callable[[nn.Module], Any], outcome: str = RIGHT, **options: Any) -> None:
    """Registers two cases: on an nn.Linear, and on a module with its own matrix."""

    def on_linear() -> nn.Module:
        model = _Linear()
        hook(model.fc)
        return model

    def on_owner() -> nn.Module:
        model = Holder(_Matrix())
        hook(model.inner)
        return model

    case(AREA, f"{what}, on an nn.Linear", "fc", outcome, name=f"{name}-of-a-linear", **options)(on_linear)
    case(AREA, f"{what}, on a module with its own matrix", "inner.w", outcome, name=f"{name}-of-an-owner", **options)(
        on_owner
    )


def matrix_of(module: nn.Module) -> torch.Tensor:
    """Returns the weight of either module."""
    return module.weight if isinstance(module, nn.Linear) else module.w


def _scale_input(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0] * 2,)


def _scale_output(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output * 2


def _keyword(module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    return output - args[0].mean()


def _second_product(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output + torch.tanh(inputs[0] @ matrix_of(module).T)


def _penalty(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output + matrix_of(module).norm()


def _clip(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        matrix_of(module).clamp_(-0.1, 0.1)


def _replace_gradient(module: nn.Module, gradient_in: Any, gradient_out: Any) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if gradient is None else gradient * 3 for gradient in gradient_in)


_hooked("pre-hook", "a pre-hook that replaces the input", lambda module: module.register_forward_pre_hook(_scale_input))
_hooked("hook", "a hook that replaces the output", lambda module: module.register_forward_hook(_scale_output))
_hooked(
    "hook-with-keywords",
    "a hook that receives keyword arguments",
    lambda module: module.register_forward_hook(_keyword, with_kwargs=True),
)
_hooked(
    "backward-hook",
    "a full backward hook that replaces the gradient",
    lambda module: module.register_full_backward_hook(_replace_gradient),
)
_hooked(
    "reading-hook",
    "a hook that also multiplies by the weight",
    lambda module: module.register_forward_hook(_second_product),
    EITHER,
)
_hooked(
    "reading-pre-hook",
    "a pre-hook that multiplies by the weight",
    lambda module: module.register_forward_pre_hook(
        lambda m, inputs: (inputs[0] + (inputs[0] @ matrix_of(m).T).mean(),)
    ),
    EITHER,
)
_hooked(
    "penalty-hook", "a hook that adds the weight's norm", lambda module: module.register_forward_hook(_penalty), EITHER
)
_hooked(
    "clipping-hook", "a pre-hook that clips the weight", lambda module: module.register_forward_pre_hook(_clip), EITHER
)


@case(AREA, "a hook on the parent that reads the child's weight", "fc", EITHER)
def parent_hook() -> nn.Module:
    model = _Linear()
    model.register_forward_hook(lambda module, inputs, output: output * F.linear(inputs[0], module.fc.weight))
    return model


class _Collected(_Linear):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[torch.Tensor] = []
        self.fc.register_forward_hook(self.collect)

    def collect(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.features.append(output.detach())


def _with_features(model: Any, x: torch.Tensor) -> Any:
    return model(x), list(model.features)


case(
    AREA,
    "a hook that collects features",
    "fc",
    name="features-by-a-hook",
    calls=(_with_features, _with_features),
    copies=False,
)(_Collected)


def _hooked_later(model: Any, x: torch.Tensor) -> Any:
    handle = model.inner.register_forward_hook(_scale_output)
    try:
        return model(x)
    finally:
        handle.remove()


case(
    AREA,
    "a hook registered after `rewrite`, and removed",
    "inner.w",
    name="hook-added-later",
    calls=(_hooked_later, call),
)(lambda: Holder(_Matrix()))


def _under_a_global_hook(model: Any, x: torch.Tensor) -> Any:
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: names.append(len(inputs)))
    try:
        return model(x), names
    finally:
        handle.remove()


case(
    AREA,
    "a hook on all modules, `register_module_forward_hook`",
    "fc",
    name="global-hook",
    calls=(_under_a_global_hook,),
)(_Linear)


@case(AREA, "a hook on the output's gradient, registered in the forward", "w")
class OutputGradientHook(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.w)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * 2)
        return out


@case(AREA, "a cache that a pre-hook of the parent clears", "child.w", calls=TWICE)
class ClearedByHook(nn.Module):
    class Caches(Own):
        def __init__(self) -> None:
            super().__init__(IN)
            self.cache: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache.append(F.linear(x, self.w))
            return torch.stack(self.cache).sum(0)

    def __init__(self) -> None:
        super().__init__()
        self.child = self.Caches()
        self.register_forward_pre_hook(lambda module, inputs: module.child.cache.clear())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(self.child(x))
