"""Computes output and gradients of one linear with its adapter, for eager mode and for the custom operators.

The formulas and their letters are at the top of `adapted_linear.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from melora_fx.adapter.tensors import diagonal_blocks, slices_of

from . import by_torch, by_triton
from .cost import is_by_blocks, is_merged
from .dropout import dropout_mask, over_kept
from .slices import by_part, cast, factors_by_part, join_parts, own_inputs, own_outputs


class InputGradients(NamedTuple):
    """The result of a backward for autograd: one gradient for each input of `compute_output`, in that order."""

    x: Tensor | None = None
    base: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: None = None
    seed: None = None
    rate: None = None
    parts: None = None
    form: None = None
    dtype: None = None
    starts: None = None


def save_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saves what `needed_gradients` reads; the weight only if x needs a gradient."""
    x, _base, weight, _bias, lora_a, lora_b, scaling, seed, rate, parts, form, _dtype, starts = inputs
    needs_x = ctx.needs_input_grad[0]
    ctx.save_for_backward(x, weight if needs_x else None, lora_a, lora_b, scaling, seed)
    ctx.rate = rate
    ctx.parts = parts
    ctx.form = form
    ctx.starts = starts


def needed_gradients(ctx: Any, gradient: Tensor, backward: Callable[..., InputGradients], form: str) -> InputGradients:
    """Returns the gradients that autograd needs; `backward` is `compute_gradients`, or calls its operator."""
    needs_x, needs_base, needs_weight, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
    asked = [needs_x, needs_weight, needs_bias, needs_a, needs_b]
    x, weight, lora_a, lora_b, scaling, seed = ctx.saved_tensors
    found = backward(gradient, x, weight, lora_a, lora_b, scaling, seed, ctx.rate, ctx.parts, form, asked, ctx.starts)
    return found._replace(base=gradient) if needs_base else found


def compute_output(
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
    form: str,
    dtype: torch.dtype | None,
    starts: Sequence[int],
) -> Tensor:
    """Returns the output. Arguments as in `adapted_linear`; `dtype` is autocast's, `seed` and `rate` the dropout's."""
    if dtype is not None:
        x = cast(x, dtype)
        weight = cast(weight, dtype)
        bias = cast(bias, dtype)
    scaled = lora_b * over_kept(scaling, rate)
    if weight is None:
        assert base is not None
        output = base.clone(memory_format=torch.contiguous_format)
    elif form == "weight" and is_merged(x, weight, lora_a, lora_b, rate):
        return F.linear(x, _merged(weight, lora_a, scaled, parts, starts), bias).contiguous()
    else:
        output = F.linear(x, weight, bias).contiguous()
    x = own_inputs(cast(x, output.dtype), lora_a, starts)
    slices = slices_of(x if seed is None else x * dropout_mask(x, seed, rate), len(lora_a))
    of_parts = by_part(own_outputs(output, lora_b, starts), lora_a, scaled, parts)
    by = by_triton if form == "triton" and by_triton.fits(slices, of_parts) else by_torch
    by.add_update(slices, of_parts)
    return output


def compute_gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    seed: Tensor | None,
    rate: float,
    parts: Sequence[int],
    form: str,
    asked: Sequence[bool],
    starts: Sequence[int],
) -> InputGradients:
    """Returns the gradients that `asked` selects of x, weight, bias, lora_a and lora_b; `gradient` is the output's."""
    if gradient.device.type != "meta" and torch.is_autocast_enabled(gradient.device.type):
        with torch.autocast(gradient.device.type, enabled=False):  # the forward has fixed the dtypes
            return compute_gradients(
                gradient, x, weight, lora_a, lora_b, scaling, seed, rate, parts, form, asked, starts
            )
    needs_x, needs_weight, needs_bias, needs_a, needs_b = asked
    of_y = gradient.reshape(-1, gradient.size(-1))
    used = cast(x, gradient.dtype)  # x as the forward used it
    own = own_inputs(used, lora_a, starts)
    mask = None if seed is None else dropout_mask(own, seed, rate)
    slices = slices_of(own if mask is None else own * mask, len(lora_a))
    scaling = over_kept(scaling, rate)
    scaled = lora_b * scaling
    own_y = own_outputs(of_y, lora_b, starts)
    of_parts = by_part(own_y, lora_a, scaled, parts)
    of_x = of_slices = None  # of_slices: the part of of_x that still lacks the adapter
    if needs_x and form == "weight" and weight is not None and is_merged(used, weight, lora_a, lora_b, rate):
        of_x = of_y @ _merged(weight, lora_a, scaled, parts, starts)
    elif needs_x:
        of_x = _of_base(of_y, weight, used)
        of_slices = own_inputs(of_x, lora_a, starts)
    by = by_triton if form == "triton" and by_triton.fits(slices, of_parts) else by_torch
    if by is by_torch and of_slices is None and mask is None and is_by_blocks(own, own_y, lora_a):
        pairs = [by_torch.gradients_by_blocks(slices, part) for part in of_parts]
    else:
        pairs = by.add_gradients(slices, of_parts, of_slices, mask)
    of_x = None if of_x is None else cast(of_x.view(x.shape), x.dtype)
    of_weight = of_y.t() @ used.reshape(-1, used.size(-1)) if needs_weight else None
    of_bias = of_y.sum(0) if needs_bias else None
    of_a = cast(join_parts([of_a for of_a, _ in pairs]), lora_a.dtype) if needs_a else None
    of_b = cast(join_parts([of_b for _, of_b in pairs]), lora_b.dtype) * scaling if needs_b else None
    return InputGradients(of_x, None, of_weight, of_bias, of_a, of_b)


def _of_base(of_y: Tensor, weight: Tensor | None, like: Tensor) -> Tensor:
    """Returns y' W (T, I); zeros without a weight, when the base passes its own gradient to x. `like` is x."""
    if weight is None:
        return of_y.new_zeros(len(of_y), like.size(-1))
    return of_y @ cast(weight, of_y.dtype)


def _merged(weight: Tensor, lora_a: Tensor, scaled: Tensor, parts: Sequence[int], starts: Sequence[int]) -> Tensor:
    """Returns W + Δ (O, I) as a new tensor."""
    merged = weight.clone()
    own = own_outputs(own_inputs(merged, lora_a, starts).mT, scaled, starts).mT
    blocks = diagonal_blocks(own, len(lora_a), parts)
    for block, (part_a, part_b) in zip(blocks, factors_by_part(lora_a, scaled, parts), strict=True):
        block.add_(torch.bmm(part_b, part_a))
    return merged
