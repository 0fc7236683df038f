"""Quantised linears: those whose weight only their own forward can read, and those without a gradient for their input.

bitsandbytes, `torch.ao`'s dynamic int8 and the packed formats (GPTQ, AWQ, HQQ) keep the weight packed. Such a module's
forward stays as it is and is the base; the graph calls it by an attribute of the rewritten module:

    y = self.base_forward(x) + adapter(x)

O out_features, I in_features.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

BASE_FORWARD = "base_forward"
"""Attribute of a rewritten module: the forward that it had before."""


def is_packed_linear(module: nn.Module) -> bool:
    """Whether `module` has the `in_features` and `out_features` of a linear, and its weight not as floats."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    if any(value.is_floating_point() and value.dim() == 2 for value in module.parameters()):
        return False
    if any(is_packed_linear(child) for child in module.children()):
        return False  # it merely holds one
    weight, held = getattr(module, "weight", None), [*module.parameters(), *module.buffers()]
    has_integers = any(value.dtype in _INTEGERS and value.dim() == 2 for value in held)
    return has_integers or inspect.ismethod(weight)  # as `torch.ao` has it


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def packed_weight(module: Any) -> Tensor:
    """What stands for the weight of a packed linear: an int8 tensor (O, I) on the meta device, without values."""
    return torch.empty(module.out_features, module.in_features, dtype=torch.int8, device="meta")


def packed_graph(module: nn.Module) -> fx.Graph:
    """The graph of a packed linear: a call of its own forward, with the arguments of that."""
    graph = fx.Graph()
    named = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    inputs = [graph.placeholder(parameter.name, default_value=parameter.default) for parameter in named]
    graph.output(graph.call_function(run_base_forward, (graph.get_attr(BASE_FORWARD), *inputs)))
    return graph


def run_base_forward(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`forward(*inputs)`, x first: what the base of a packed linear is in a graph."""
    return forward(*inputs)


def device_of(module: nn.Module, weight: Tensor) -> torch.device:
    """Where `weight` is, or, for a packed one, what `module` holds of it; the CPU where that cannot be seen."""
    if not weight.is_meta or not is_packed_linear(module):
        return weight.device
    return next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


def passes_gradient(weight: Tensor) -> bool:
    """Whether `F.linear` by `weight`, (O, I), has a gradient for its input; asked of quantised tensors."""
    if type(weight) in (Tensor, nn.Parameter) or weight.is_meta:
        return True
    x = torch.zeros(1, weight.size(1), dtype=weight.dtype, device=weight.device, requires_grad=True)
    with torch.enable_grad():
        output = F.linear(x, weight.detach())
        try:
            return output.requires_grad and bool(torch.autograd.grad(output.sum(), x))
        except RuntimeError:  # the derivative is not implemented
            return False


def call_base(module: nn.Module, forward: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """`forward(module, x, *others)`, with a gradient for x where the kernel has none."""
    weight: Any = getattr(module, "weight", None)
    if not _wants_gradient(x):
        return forward(module, x, *others)
    if inspect.ismethod(weight):  # `torch.ao`: its output claims to have a gradient, which is zero
        return _WithGradient.apply(x, None, forward(module, x.detach(), *others), lambda: weight().dequantize())
    output, bias = forward(module, x, *others), getattr(module, "bias", None)
    is_trained = isinstance(bias, Tensor) and bias.requires_grad
    if output.requires_grad and not (is_trained and not _hangs_on(output, x)):
        return output
    matrix = functools.partial(_by_unit_vectors, lambda unit: forward(module, unit, *others), x)
    return _WithGradient.apply(x, None, output, matrix)


def _hangs_on(output: Tensor, x: Tensor) -> bool:
    """Whether a gradient of `output` would reach `x`, in eager mode; compiled it is taken for granted."""
    if torch.compiler.is_compiling():
        return True
    seen, pending = set[Any](), [output.grad_fn]
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
    """x Wᵀ + b, (…, O), for a weight (O, I) that is no plain tensor, with a gradient for x whatever the kernel has."""
    if not _wants_gradient(x):
        return F.linear(x, weight, bias)
    with torch.no_grad():
        output = F.linear(x, weight, bias)
    return _WithGradient.apply(x, bias, output, lambda: _dequantized(weight, x))


def _wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _dequantized(weight: Tensor, like: Tensor) -> Tensor:
    own = type(weight).dequantize is not Tensor.dequantize
    return weight.dequantize() if own else _by_unit_vectors(lambda x: F.linear(x, weight), like)


def _by_unit_vectors(linear: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The matrix (O, I) of a linear that shows it in no other way; x as `like`, (…, I)."""
    unit = torch.eye(like.size(-1), dtype=like.dtype, device=like.device)
    with torch.no_grad():
        return (linear(unit) - linear(torch.zeros_like(unit[:1]))).t()


class _WithGradient(torch.autograd.Function):
    """The output, which is x Wᵀ + b of a quantised W, with y' W as the gradient of x, and y' summed as that of b.

    What the output hangs on itself gets its gradient too.

    Where a kernel rounds x to 8 bits, the gradient goes through as if it did not: the straight-through estimator
    (https://arxiv.org/abs/1308.3432).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, output: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient, (needs_x, needs_bias, needs_output, _) = gradients[0], ctx.needs_input_grad
        of_bias = gradient.reshape(-1, gradient.size(-1)).sum(0) if needs_bias else None
        of_output = gradient if needs_output else None
        if not needs_x:
            return None, of_bias, of_output, None
        matrix = ctx.weight()
        return (gradient.to(matrix.dtype) @ matrix).to(ctx.dtype), of_bias, of_output, None
