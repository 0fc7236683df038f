"""Custom operators for one linear with its adapter, which are opaque to `torch.compile`."""

from typing import Any

import torch
from torch import Tensor

from .forward_backward import InputGradients, compute_gradients, compute_output, needed_gradients, save_for_gradients

# `torch.compile` caches compiled code on disk under the operators' names: a changed schema needs a new name.
_operator = torch.library.custom_op("melora::adapted_linear_v3", compute_output, mutates_args=())
# Separate operators for dropout, which no CUDA graph may contain: it would replay the same mask forever.
_UNSAFE = (torch.Tag.cudagraph_unsafe,)
_dropout_operator = torch.library.custom_op(
    "melora::adapted_linear_dropout_v2", compute_output, mutates_args=(), tags=_UNSAFE
)


@_dropout_operator.register_fake
@_operator.register_fake
def _(x: Tensor, base: Any, weight: Any, bias: Any, lora_a: Tensor, lora_b: Tensor, *others: Any) -> Tensor:
    if base is not None:
        return torch.empty_like(base, memory_format=torch.contiguous_format)
    *_, dtype, _starts = others
    return x.new_empty(*x.shape[:-1], weight.size(0), dtype=dtype)


def _gradient_list(*arguments: Any) -> list[Tensor]:
    """Returns the requested gradients of x, weight, bias, lora_a and lora_b, in this order."""
    return [found for found in compute_gradients(*arguments) if found is not None]


_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor? seed, "
    "float rate, SymInt[] parts, str form, bool[] asked, SymInt[] starts) -> Tensor[]"
)
_backward_operator = torch.library.custom_op(
    "melora::adapted_linear_backward_v3", _gradient_list, mutates_args=(), schema=_BACKWARD_SCHEMA
)
_dropout_backward_operator = torch.library.custom_op(
    "melora::adapted_linear_dropout_backward_v2", _gradient_list, mutates_args=(), schema=_BACKWARD_SCHEMA, tags=_UNSAFE
)


@_dropout_backward_operator.register_fake
@_backward_operator.register_fake
def _(gradient: Tensor, x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, *others: Any) -> list[Tensor]:
    *_, asked, _starts = others
    width = gradient.size(-1)
    shapes = (x.shape, (width, x.size(-1)), (width,), lora_a.shape, lora_b.shape)
    dtypes = (x.dtype, gradient.dtype, gradient.dtype, lora_a.dtype, lora_b.dtype)
    return [x.new_empty(shape, dtype=dtype) for shape, dtype, need in zip(shapes, dtypes, asked, strict=True) if need]


def _gradients_by_operator(*arguments: Any) -> InputGradients:
    """Returns `compute_gradients(*arguments)`, computed by its operator."""
    _gradient, _x, _weight, _a, _b, _scaling, seed, *_, asked, _starts = arguments
    found = iter((_backward_operator if seed is None else _dropout_backward_operator)(*arguments))
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    return InputGradients(**{name: next(found) for name, is_asked in zip(names, asked, strict=True) if is_asked})


for _each in (_operator, _dropout_operator):
    _each.register_autograd(
        lambda ctx, gradient: needed_gradients(ctx, gradient, _gradients_by_operator, ctx.form),
        setup_context=save_for_gradients,
    )


def operator_for(seed: Tensor | None) -> Any:
    """Returns the operator with the arguments of `compute_output`; `seed` is the dropout's, or None without dropout."""
    own = torch.ops.melora
    return own.adapted_linear_v3.default if seed is None else own.adapted_linear_dropout_v2.default
