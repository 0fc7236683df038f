"""One linear with its adapter: what training runs in the place of the plain nodes that `rewrite` inserts.

    y = x Wᵀ + b + concat_i( h_i (s_i B_i)ᵀ )        h_i = x_i A_iᵀ        g_i = y'_i s_i B_i

y' is the gradient of y; x_i and y'_i are the i-th of N equal slices. The output and the gradient of x come

    by slices    y = x Wᵀ + b, to the slices of which h_i (s_i B_i)ᵀ is added; x' = y' W, to the slices of which g_i A_i
    merged       y = x (W + Δ)ᵀ + b; x' = y' (W + Δ): W + Δ is made for the moment, twice

and the gradients of A and B, from h and g computed anew,

    by factors   A_i' = g_iᵀ x_i        B_i' = s_i y'_iᵀ h_i                               4 T R (I + O) operations
    by blocks    G_i = y'_iᵀ x_i        A_i' = s_i B_iᵀ G_i        B_i' = s_i G_i A_iᵀ     2 T I O / N operations

None of these writes the base, and none keeps more for the backward than x.

Eager mode runs an `autograd.Function`, which costs a quarter of a custom operator's call. `torch.compile` gets the
operator `melora::adapted_linear`, which it does not look into.

I in_features, O out_features, N num_blocks, R the largest rank of a block, T tokens, P parts of `split`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melora_fx.adapter.tensors import diagonal_blocks
from melora_fx.errors import MELoRAError

from .cost import is_by_blocks, is_merged
from .dropout import dropout_mask, dropout_rate, over_kept
from .quantized_gradient import quantized_linear
from .gradients import gradient_of_x, gradients_by_blocks, gradients_by_factors, gradients_of_hidden, rows_of
from .slices import by_part, cast, factors_by_part, join_parts, slices_of, times_few_rows

RESIZED = "it was resized after `rewrite` (a vocabulary that grew?); resize the plain model, then `rewrite`"
"""What is said of a linear whose weight no longer fits its adapter."""


def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    dropout: nn.Module | None,
    parts: Sequence[int],
    merge: bool,
    base: Tensor | None = None,
) -> Tensor:
    """The adapted output (…, O), of the dtype of x Wᵀ; the adapter computes in that dtype.

    Args:
        x: (…, I).
        weight: (O, I), of any strides. One that is no plain floating tensor (quantised, say) is left to `F.linear`.
        bias: (O,) or None.
        lora_a: (N, P·R, I/N).
        lora_b: (N, O/N, R).
        scaling: s_i, (N, 1, 1).
        dropout: says how much of the adapter's input is dropped, and whether.
        parts: sizes of the parts of `split`, O in all.
        merge: whether W + Δ may be made where that is faster.
        base: x Wᵀ + b, (…, O), where that has been computed; weight and bias are None then.
    """
    if weight is not None and not (type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()):
        base = quantized_linear(x, weight, bias)
        weight = bias = None
    dtype = _autocast_dtype(x)
    if base is not None and dtype is not None:  # autocast has had its say in the base
        with torch.autocast(x.device.type, enabled=False):
            return adapted_linear(x, None, None, lora_a, lora_b, scaling, dropout, parts, False, base)
    rate = 0.0 if dropout is None else dropout_rate(dropout)
    seed = torch.randint(2**62, (), dtype=torch.int64, device="cpu") if rate else None
    inputs = _Inputs(x, base, weight, bias, lora_a, lora_b, scaling, seed, rate, parts, merge, dtype)
    if torch.compiler.is_compiling():
        return torch.ops.melora.adapted_linear.default(*inputs)
    try:
        return _AdaptedLinear.apply(*inputs)
    except RuntimeError as error:
        _refuse_resized(weight, lora_b, error)
        raise


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that `F.linear` computes in under autocast, None outside of it."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def _refuse_resized(weight: Tensor | None, lora_b: Tensor, error: RuntimeError) -> None:
    """Raises a `MELoRAError` if the weight has another number of output features than the adapter."""
    out_features = lora_b.size(0) * lora_b.size(1)
    if weight is not None and weight.size(0) != out_features:
        own = weight.size(0)
        raise MELoRAError(f"a linear of {own} output features has an adapter of {out_features}: {RESIZED}") from error


class _Inputs(NamedTuple):
    """One value for each input of `_forward`, in its order: the input, whether it needs a gradient, or its gradient."""

    x: Any
    base: Any
    weight: Any
    bias: Any
    lora_a: Any
    lora_b: Any
    scaling: Any = None
    seed: Any = None
    rate: Any = None
    parts: Any = None
    merge: Any = None
    dtype: Any = None


class _Gradients(NamedTuple):
    """One value for each gradient that `_backward` computes, in its order: whether it is asked for, or the gradient."""

    x: Any
    weight: Any
    bias: Any
    lora_a: Any
    lora_b: Any


class _AdaptedLinear(torch.autograd.Function):
    """The eager form. Its backward is made of operators that have derivatives: it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output.data  # no longer a view, as `F.linear` may give: a Function's output may then be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _gradients_of_inputs(ctx, gradients[0], _backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what `_gradients_of_inputs` reads; the weight only if the gradient of x is needed."""
    given = _Inputs(*inputs)
    needs_x, *_ = ctx.needs_input_grad
    weight = given.weight if needs_x else None
    ctx.save_for_backward(given.x, weight, given.lora_a, given.lora_b, given.scaling, given.seed)
    ctx.rate = given.rate
    ctx.parts = given.parts
    ctx.merge = given.merge


def _gradients_of_inputs(ctx: Any, gradient: Tensor, backward: Callable[..., list[Tensor]]) -> _Inputs:
    """The gradients that are needed, None for other inputs; `backward` is `_backward` or its operator."""
    needs = _Inputs(*ctx.needs_input_grad)
    asked = [needs.x, needs.weight, needs.bias, needs.lora_a, needs.lora_b]
    x, weight, lora_a, lora_b, scaling, seed = ctx.saved_tensors
    found = iter(backward(gradient, x, weight, lora_a, lora_b, scaling, seed, ctx.rate, ctx.parts, ctx.merge, asked))
    of = _Gradients(*[next(found) if is_asked else None for is_asked in asked])
    return _Inputs(of.x, gradient if needs.base else None, of.weight, of.bias, of.lora_a, of.lora_b)


def _forward(
    x: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    seed: Tensor | None,
    rate: float,
    parts: Sequence[int],
    merge: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """The output; arguments as of `adapted_linear`, `seed` and `rate` of the dropout, and the `dtype` of autocast."""
    if dtype is not None:
        x = cast(x, dtype)
        weight = cast(weight, dtype)
        bias = cast(bias, dtype)
    scaled = lora_b * over_kept(scaling, rate)
    if weight is None:
        assert base is not None
        output = base.clone(memory_format=torch.contiguous_format)
    elif merge and is_merged(x, weight, lora_a, rate):
        return F.linear(x, _merged(weight, lora_a, scaled, parts), bias).contiguous()
    else:
        output = F.linear(x, weight, bias).contiguous()
    x = cast(x, output.dtype)
    slices = slices_of(x if seed is None else x * dropout_mask(x, seed, rate), len(lora_a))
    for part in by_part(output, lora_a, scaled, parts):
        part.columns.baddbmm_(times_few_rows(slices, part.lora_a), part.scaled.mT)
    return output


def _backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    seed: Tensor | None,
    rate: float,
    parts: Sequence[int],
    merge: bool,
    asked: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x, weight, bias, lora_a and lora_b that are `asked` for; `gradient` is that of the output."""
    if gradient.device.type != "meta" and torch.is_autocast_enabled(gradient.device.type):
        with torch.autocast(gradient.device.type, enabled=False):  # the dtypes are the forward's
            return _backward(gradient, x, weight, lora_a, lora_b, scaling, seed, rate, parts, merge, asked)
    asks = _Gradients(*asked)
    share = over_kept(scaling, rate)
    scaled = lora_b * share
    used = cast(x, gradient.dtype)
    rows = rows_of(gradient, used, None if seed is None else dropout_mask(used, seed, rate), lora_a, scaled, parts)
    of_x = None
    if asks.x and merge and weight is not None and is_merged(used, weight, lora_a, rate):
        of_x = rows.of_y @ _merged(weight, lora_a, scaled, parts)
    if (of_x is not None or not asks.x) and seed is None and is_by_blocks(used, rows.of_y, lora_a):
        pairs = [gradients_by_blocks(rows.slices, part) for part in rows.parts]
    else:
        of_hidden = gradients_of_hidden(rows)
        pairs = [gradients_by_factors(rows.slices, *each) for each in zip(rows.parts, of_hidden, strict=True)]
        if asks.x and of_x is None:
            of_x = gradient_of_x(rows, weight, of_hidden)
    found = _Gradients(
        x=None if of_x is None else cast(of_x.view(x.shape), x.dtype),
        weight=rows.of_y.t() @ rows.x.reshape(-1, x.size(-1)) if asks.weight else None,
        bias=rows.of_y.sum(0) if asks.bias else None,
        lora_a=cast(join_parts([of_a for of_a, _ in pairs]), lora_a.dtype) if asks.lora_a else None,
        lora_b=cast(join_parts([of_b for _, of_b in pairs]), lora_b.dtype) * share if asks.lora_b else None,
    )
    return [of_input for of_input in found if of_input is not None]


def _merged(weight: Tensor, lora_a: Tensor, scaled: Tensor, parts: Sequence[int]) -> Tensor:
    """W + Δ (O, I), in memory of its own."""
    merged = weight.clone()
    blocks = diagonal_blocks(merged, len(lora_a), parts)
    for block, (part_a, part_b) in zip(blocks, factors_by_part(lora_a, scaled, parts), strict=True):
        block.add_(torch.bmm(part_b, part_a))
    return merged


# `torch.compile` keeps what it has compiled on disk, by the operators' names: another signature needs another name.
_operator = torch.library.custom_op("melora::adapted_linear", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("melora::adapted_linear_backward", _backward, mutates_args=())


@_operator.register_fake
def _(*arguments: Any) -> Tensor:
    inputs = _Inputs(*arguments)
    if inputs.base is not None:
        return torch.empty_like(inputs.base, memory_format=torch.contiguous_format)
    return inputs.x.new_empty(*inputs.x.shape[:-1], inputs.weight.size(0), dtype=inputs.dtype)


@_backward_operator.register_fake
def _(gradient: Tensor, x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, *others: Any) -> list[Tensor]:
    *_, asked = others
    width = gradient.size(-1)
    shapes = _Gradients(x.shape, (width, x.size(-1)), (width,), lora_a.shape, lora_b.shape)
    dtypes = _Gradients(x.dtype, gradient.dtype, gradient.dtype, lora_a.dtype, lora_b.dtype)
    return [x.new_empty(shape, dtype=dtype) for shape, dtype, need in zip(shapes, dtypes, asked, strict=True) if need]


_operator.register_autograd(
    lambda ctx, gradient: _gradients_of_inputs(ctx, gradient, _backward_operator), setup_context=_save
)
