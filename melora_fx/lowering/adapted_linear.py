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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melora_fx.adapter.tensors import diagonal_blocks
from melora_fx.errors import MELoRAError

from .dropout import dropout_mask, dropout_rate, over_kept
from .quantized_gradient import quantized_linear

RESIZED = "it was resized after `rewrite` (a vocabulary that grew?); resize the plain model, then `rewrite`"
"""What is said of a linear whose weight no longer fits its adapter."""
WIDE = (torch.float32, torch.float64)


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
        base, weight, bias, merge = quantized_linear(x, weight, bias), None, None, False
    if base is not None and _autocast_dtype(x) is not None:  # it has had its say in the base
        with torch.autocast(x.device.type, enabled=False):
            return adapted_linear(x, None, None, lora_a, lora_b, scaling, dropout, parts, False, base)
    rate = 0.0 if dropout is None else dropout_rate(dropout)
    seed = torch.randint(2**62, (), dtype=torch.int64, device="cpu") if rate else None
    arguments = (x, base, weight, bias, lora_a, lora_b, scaling, seed, rate, parts, merge, _autocast_dtype(x))
    if torch.compiler.is_compiling():
        return torch.ops.melora.adapted_linear.default(*arguments)
    try:
        return _AdaptedLinear.apply(*arguments)
    except RuntimeError as error:
        out_features = lora_b.size(0) * lora_b.size(1)
        own = weight.size(0) if weight is not None else out_features
        if own == out_features:
            raise
        raise MELoRAError(f"a linear of {own} output features has an adapter of {out_features}: {RESIZED}") from error


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that `F.linear` computes in under autocast, None outside of it."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


class _AdaptedLinear(torch.autograd.Function):
    """The eager form. Its backward is made of operators that have derivatives: it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        output = _forward(*arguments)
        _save(ctx, arguments, output)
        return output.data  # no longer a view, as `F.linear` may give: a Function's output may then be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _all_gradients(ctx, gradients[0], _backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, weight, _, lora_a, lora_b, scaling, seed, *ctx.constants, _ = inputs
    ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, lora_a, lora_b, scaling, seed)


def _all_gradients(ctx: Any, gradient: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    """One for each argument of `_forward`, None where none is needed; `backward` is `_backward` or its operator."""
    needs_x, needs_base, *others = ctx.needs_input_grad[:6]
    asked = [needs_x, *others]
    found = iter(backward(gradient, *ctx.saved_tensors, *ctx.constants, asked))
    x, *rest = [next(found) if need else None for need in asked]
    return x, gradient if needs_base else None, *rest, *[None] * 6


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
    """Arguments as of `adapted_linear`, and `base`: x Wᵀ + b where that is given instead of the weight, `seed` and
    `rate` of the dropout, and the `dtype` of autocast.
    """
    if dtype is not None:
        x, weight, bias = _cast(x, dtype), _cast(weight, dtype), _cast(bias, dtype)
    scaled = lora_b * over_kept(scaling, rate)
    if weight is None:
        assert base is not None
        output = base.clone(memory_format=torch.contiguous_format)
    elif merge and _is_merged(x, weight, lora_a, rate):
        return F.linear(x, _merged(weight, lora_a, scaled, parts), bias).contiguous()
    else:
        output = F.linear(x, weight, bias).contiguous()
    x = _cast(x, output.dtype)
    slices = _slices(x if seed is None else x * dropout_mask(x, seed, rate), len(lora_a))
    for columns, part_a, part_b in _by_part(output, _cast(lora_a, output.dtype), _cast(scaled, output.dtype), parts):
        columns.baddbmm_(_times_few(slices, part_a), part_b.mT)
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
    needs_x, needs_weight, needs_bias, needs_a, needs_b = asked
    narrow, of_y = gradient.dtype, gradient.reshape(-1, gradient.size(-1))
    used = _cast(x, narrow)
    mask = None if seed is None else dropout_mask(used, seed, rate)
    slices = _slices(used if mask is None else used * mask, len(lora_a))
    scaling = over_kept(scaling, rate)
    scaled = lora_b * scaling
    of_x = of_dropped = None
    if needs_x and merge and weight is not None and _is_merged(used, weight, lora_a, rate):
        of_x = of_y @ _merged(weight, lora_a, scaled, parts)
    elif needs_x:
        of_x = x.new_zeros(len(of_y), x.size(-1), dtype=narrow) if weight is None else of_y @ _cast(weight, narrow)
        of_dropped = of_x if mask is None else torch.zeros_like(of_x)
    by_part = _by_part(of_y, _cast(lora_a, narrow), _cast(scaled, narrow), parts)
    if of_dropped is None and mask is None and _is_by_blocks(used, of_y, lora_a):
        pairs = [_gradients_by_blocks(slices, *part) for part in by_part]
    else:
        of_slices = None if of_dropped is None else _slices(of_dropped, len(lora_a))
        pairs = [_gradients_by_factors(slices, *part, of_slices) for part in by_part]
    if of_x is not None and of_dropped is not None and mask is not None:
        of_x.addcmul_(of_dropped, mask.view_as(of_x))
    found = (
        None if of_x is None else _cast(of_x.view(x.shape), x.dtype),
        of_y.t() @ used.reshape(-1, used.size(-1)) if needs_weight else None,
        of_y.sum(0) if needs_bias else None,
        _cast(_joined([of_a for of_a, _ in pairs]), lora_a.dtype) if needs_a else None,
        _cast(_joined([of_b for _, of_b in pairs]), lora_b.dtype) * scaling if needs_b else None,
    )
    return [tensor for tensor in found if tensor is not None]


def _gradients_by_blocks(slices: Tensor, of_columns: Tensor, lora_a: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Of A (N, R, I/N) and s B (N, O_p/N, R), for one part."""
    of_blocks = torch.bmm(of_columns.mT, slices)
    return torch.bmm(scaled.mT, of_blocks), torch.bmm(of_blocks, lora_a.mT)


def _gradients_by_factors(
    slices: Tensor, of_columns: Tensor, lora_a: Tensor, scaled: Tensor, of_slices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same; adds the adapter's gradient of x to `of_slices`, where that is asked for."""
    of_hidden = _times_few(of_columns, scaled.mT)
    if of_slices is not None:
        of_slices.baddbmm_(of_hidden, lora_a)
    of_b = torch.bmm(_times_few(slices, lora_a).mT, of_columns).mT
    return torch.bmm(of_hidden.mT, slices), of_b


def _is_merged(x: Tensor, weight: Tensor, lora_a: Tensor, rate: float) -> bool:
    """Whether making W + Δ takes less time than adding to the slices of T rows, and rounds nothing away.

    By the measurements in benchmarks/results/NOTES.md: a value of the slices takes 8 + R units of time, mostly to be
    read and written, and an element of W + Δ 20 + R / N.
    """
    if rate or weight.dtype not in WIDE or x.dtype != weight.dtype:
        return False
    (num_blocks, rank, _), (out_features, in_features) = lora_a.shape, weight.shape
    adding = x.numel() // in_features * (in_features + out_features) * (8 + rank)
    return adding > in_features * out_features * (20 + rank / num_blocks)


def _is_by_blocks(x: Tensor, of_y: Tensor, lora_a: Tensor) -> bool:
    """Whether the gradients of A and B take fewer operations by blocks than by factors, and G rounds nothing away."""
    (num_blocks, rank, _), in_features, out_features = lora_a.shape, x.size(-1), of_y.size(-1)
    return x.dtype in WIDE and 2 * rank * num_blocks * (in_features + out_features) > in_features * out_features


def _merged(weight: Tensor, lora_a: Tensor, scaled: Tensor, parts: Sequence[int]) -> Tensor:
    """W + Δ (O, I), in memory of its own."""
    merged = weight.clone()
    blocks = diagonal_blocks(merged, len(lora_a), parts)
    for block, (part_a, part_b) in zip(blocks, _factors(lora_a, scaled, parts), strict=True):
        block.add_(torch.bmm(part_b, part_a))
    return merged


def _by_part(
    output: Tensor, lora_a: Tensor, scaled: Tensor, parts: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each part p, its columns of `output` (…, O) as slices, A (N, R, I/N) and s B (N, O_p/N, R)."""
    if len(parts) == 1:
        return [(_slices(output, len(lora_a)), lora_a, scaled)]
    columns = output.view(-1, output.size(-1)).split(list(parts), dim=1)
    factors = zip(columns, _factors(lora_a, scaled, parts), strict=True)
    return [(_slices(part, len(lora_a)), part_a, part_b) for part, (part_a, part_b) in factors]


def _factors(lora_a: Tensor, scaled: Tensor, parts: Sequence[int]) -> Sequence[tuple[Tensor, Tensor]]:
    """A (N, R, I/N) and s B (N, O_p/N, R) of each part p."""
    if len(parts) == 1:
        return [(lora_a, scaled)]
    sizes = [size // len(lora_a) for size in parts]
    return list(zip(lora_a.chunk(len(parts), dim=1), scaled.split(sizes, dim=1), strict=True))


def _slices(tensor: Tensor, num_blocks: int) -> Tensor:
    """The slices of (…, I) as (N, T, I/N): a view, where the tokens can be viewed as one axis."""
    features = tensor.size(-1)
    shape = (tensor.numel() // features, num_blocks, features // num_blocks)
    return tensor.reshape(shape).transpose(0, 1)


def _times_few(slices: Tensor, rows: Tensor) -> Tensor:
    """(N, T, K) times the transposed of a few rows (N, R, K): (N, T, R).

    Each library has its better order of the two: with the few rows first, MKL takes half the time in 32 bits, and
    oneDNN four times the time in 16 bits, measured.
    """
    if slices.dtype in WIDE:
        return torch.bmm(rows, slices.mT).mT
    return torch.bmm(slices, rows.mT)


def _joined(parts: list[Tensor]) -> Tensor:
    """The gradient of all parts in one, contiguous."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


# `torch.compile` keeps what it has compiled on disk, by the operators' names: another signature needs another name.
_operator = torch.library.custom_op("melora::adapted_linear", _forward, mutates_args=())


@_operator.register_fake
def _(x: Tensor, base: Any, weight: Any, bias: Any, lora_a: Tensor, lora_b: Tensor, *others: Any) -> Tensor:
    if base is not None:
        return torch.empty_like(base, memory_format=torch.contiguous_format)
    *_, dtype = others
    return x.new_empty(*x.shape[:-1], weight.size(0), dtype=dtype)


_backward_operator = torch.library.custom_op("melora::adapted_linear_backward", _backward, mutates_args=())


@_backward_operator.register_fake
def _(gradient: Tensor, x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, *others: Any) -> list[Tensor]:
    *_, asked = others
    width = gradient.size(-1)
    shapes = (x.shape, (width, x.size(-1)), (width,), lora_a.shape, lora_b.shape)
    dtypes = (x.dtype, gradient.dtype, gradient.dtype, lora_a.dtype, lora_b.dtype)
    return [x.new_empty(shape, dtype=dtype) for shape, dtype, need in zip(shapes, dtypes, asked, strict=True) if need]


_operator.register_autograd(
    lambda ctx, gradient: _all_gradients(ctx, gradient, _backward_operator), setup_context=_save
)
