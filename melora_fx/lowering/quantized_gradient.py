"""Computes gradients for the inputs of quantised linears whose kernels have none."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melora_fx.distributed.tensors import is_sharded


def passes_gradient(weight: Tensor) -> bool:
    """Returns whether `F.linear` with `weight` (O, I) passes a gradient to its input; runs it if W is quantised."""
    if type(weight) in (Tensor, nn.Parameter) or weight.is_meta or is_sharded(weight):
        return True
    x = torch.zeros(1, weight.size(1), dtype=weight.dtype, device=weight.device, requires_grad=True)
    with torch.enable_grad():
        output = F.linear(x, weight.detach())
        try:
            return output.requires_grad and bool(torch.autograd.grad(output.sum(), x))
        except RuntimeError:  # the derivative is not implemented
            return False


def call_base(module: nn.Module, forward: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """Returns `forward(module, x, *others)`, with a gradient for x even if the kernel has none."""
    if not _wants_gradient(x):
        return forward(module, x, *others)
    weight: Any = getattr(module, "weight", None)
    if inspect.ismethod(weight):  # `torch.ao`: its output claims to have a gradient, which is zero
        return _WithGradient.apply(x, None, forward(module, x.detach(), *others), lambda: weight().dequantize())
    output = forward(module, x, *others)
    bias = getattr(module, "bias", None)
    is_trained = isinstance(bias, Tensor) and bias.requires_grad
    if output.requires_grad and not (is_trained and not _hangs_on(output, x)):
        return output
    matrix = functools.partial(_by_unit_vectors, lambda unit: forward(module, unit, *others), x)
    return _WithGradient.apply(x, None, output, matrix)


def _hangs_on(output: Tensor, x: Tensor) -> bool:
    """Returns whether a gradient of `output` would reach `x`; always True under `torch.compile`, which cannot check."""
    if torch.compiler.is_compiling():
        return True
    seen = set[Any]()
    pending = [output.grad_fn]
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        if node is x.grad_fn or getattr(node, "variable", None) is x:
            return True
        seen.add(node)
        pending.extend(before for before, _ in node.next_functions)
    return False


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x Wᵀ + b (…, O) for a weight (O, I) that is no plain tensor, with a gradient for x for every kernel."""
    if not _wants_gradient(x):
        return F.linear(x, weight, bias)
    with torch.no_grad():
        output = F.linear(x, weight, bias)
    return _WithGradient.apply(x, bias, output, lambda: _dequantized(weight, x))


def _wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _dequantized(weight: Tensor, like: Tensor) -> Tensor:
    """Returns the weight (O, I) as floats, from its own `dequantize` or from products; `like` is x."""
    own = type(weight).dequantize is not Tensor.dequantize
    return weight.dequantize() if own else _by_unit_vectors(lambda x: F.linear(x, weight), like)


def _by_unit_vectors(linear: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Returns the matrix (O, I) of a linear, computed from its outputs for unit vectors; `like` is x (…, I)."""
    unit = torch.eye(like.size(-1), dtype=like.dtype, device=like.device)
    with torch.no_grad():
        return (linear(unit) - linear(torch.zeros_like(unit[:1]))).t()


class _WithGradient(torch.autograd.Function):
    """Returns a copy of x Wᵀ + b of a quantised W; its backward returns y' W for x and the sum of y' for b.

    It also passes y' on to the graph that computed the output. If the kernel rounds x to 8 bits, the gradient ignores
    the rounding: the straight-through estimator (https://arxiv.org/abs/1308.3432).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, output: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        ctx.dtype = x.dtype
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0]
        needs_x, needs_bias, needs_output, _ = ctx.needs_input_grad
        of_bias = gradient.reshape(-1, gradient.size(-1)).sum(0) if needs_bias else None
        of_output = gradient if needs_output else None
        if not needs_x:
            return None, of_bias, of_output, None
        matrix = ctx.weight()
        return (gradient.to(matrix.dtype) @ matrix).to(ctx.dtype), of_bias, of_output, None
