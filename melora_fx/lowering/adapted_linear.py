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
operator `melora::adapted_linear_v2`, which it does not look into.

I in_features, O out_features, N num_blocks, R the largest rank of a block, T tokens, P parts of `split`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melora_fx.adapter.tensors import diagonal_blocks, slices_of
from melora_fx.errors import MELoRAError

from . import by_torch, by_triton
from .cost import is_by_blocks, is_merged
from .dropout import dropout_mask, dropout_rate, over_kept
from .quantized_gradient import quantized_linear
from .slices import by_part, cast, factors_by_part, join_parts

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
    form: str,
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
        form: "weight", which may make W + Δ where that is faster; "activation", which goes by slices; "triton", which
            does so by kernels of Triton on CUDA, and as "activation" elsewhere.
        base: x Wᵀ + b, (…, O), where that has been computed; weight and bias are None then.
    """
    if weight is not None and not (type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()):
        base = quantized_linear(x, weight, bias)
        weight = bias = None
    dtype = _autocast_dtype(x)
    if base is not None and dtype is not None:  # autocast has had its say in the base
        with torch.autocast(x.device.type, enabled=False):
            return adapted_linear(x, None, None, lora_a, lora_b, scaling, dropout, parts, form, base)
    rate = 0.0 if dropout is None else dropout_rate(dropout)
    seed = torch.randint(2**62, (), dtype=torch.int64, device="cpu") if rate else None
    inputs = (x, base, weight, bias, lora_a, lora_b, scaling, seed, rate, parts, form, dtype)
    if torch.compiler.is_compiling():
        own = torch.ops.melora
        return (own.adapted_linear_v2.default if seed is None else own.adapted_linear_dropout.default)(*inputs)
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


class _InputGradients(NamedTuple):
    """What autograd wants of a backward: one gradient for each input of `_forward`, in its order."""

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


class _AdaptedLinear(torch.autograd.Function):
    """The eager form. Its backward is made of operators that have derivatives: it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output.data  # no longer a view, as `F.linear` may give: a Function's output may then be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        is_differentiated = torch.is_grad_enabled()  # which kernels cannot be
        form = "activation" if is_differentiated and ctx.form == "triton" else ctx.form
        return _input_gradients(ctx, gradients[0], _backward, form)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what `_input_gradients` reads; the weight only if the gradient of x is needed."""
    x, _base, weight, _bias, lora_a, lora_b, scaling, seed, rate, parts, form, _dtype = inputs
    needs_x = ctx.needs_input_grad[0]
    ctx.save_for_backward(x, weight if needs_x else None, lora_a, lora_b, scaling, seed)
    ctx.rate = rate
    ctx.parts = parts
    ctx.form = form


def _input_gradients(
    ctx: Any, gradient: Tensor, backward: Callable[..., _InputGradients], form: str
) -> _InputGradients:
    """The gradients that are needed; `backward` is `_backward`, or `_backward_by_operator`."""
    needs_x, needs_base, needs_weight, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
    asked = [needs_x, needs_weight, needs_bias, needs_a, needs_b]
    x, weight, lora_a, lora_b, scaling, seed = ctx.saved_tensors
    found = backward(gradient, x, weight, lora_a, lora_b, scaling, seed, ctx.rate, ctx.parts, form, asked)
    return found._replace(base=gradient) if needs_base else found


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
    form: str,
    dtype: torch.dtype | None,
) -> Tensor:
    """The output. Arguments as of `adapted_linear`; `seed` and `rate` are the dropout's, `dtype` is autocast's."""
    if dtype is not None:
        x = cast(x, dtype)
        weight = cast(weight, dtype)
        bias = cast(bias, dtype)
    scaled = lora_b * over_kept(scaling, rate)
    if weight is None:
        assert base is not None
        output = base.clone(memory_format=torch.contiguous_format)
    elif form == "weight" and is_merged(x, weight, lora_a, rate):
        return F.linear(x, _merged(weight, lora_a, scaled, parts), bias).contiguous()
    else:
        output = F.linear(x, weight, bias).contiguous()
    x = cast(x, output.dtype)
    slices = slices_of(x if seed is None else x * dropout_mask(x, seed, rate), len(lora_a))
    of_parts = by_part(output, lora_a, scaled, parts)
    by = by_triton if form == "triton" and by_triton.fits(slices, of_parts) else by_torch
    by.add_update(slices, of_parts)
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
    form: str,
    asked: Sequence[bool],
) -> _InputGradients:
    """The gradients of x, weight, bias, lora_a and lora_b that are `asked` for; `gradient` is that of the output."""
    if gradient.device.type != "meta" and torch.is_autocast_enabled(gradient.device.type):
        with torch.autocast(gradient.device.type, enabled=False):  # the dtypes are the forward's
            return _backward(gradient, x, weight, lora_a, lora_b, scaling, seed, rate, parts, form, asked)
    needs_x, needs_weight, needs_bias, needs_a, needs_b = asked
    of_y = gradient.reshape(-1, gradient.size(-1))
    used = cast(x, gradient.dtype)  # x as the forward used it
    mask = None if seed is None else dropout_mask(used, seed, rate)
    slices = slices_of(used if mask is None else used * mask, len(lora_a))
    scaling = over_kept(scaling, rate)
    scaled = lora_b * scaling
    of_parts = by_part(of_y, lora_a, scaled, parts)
    of_x = of_slices = None  # the second: to which the adapter's part is still to be added
    if needs_x and form == "weight" and weight is not None and is_merged(used, weight, lora_a, rate):
        of_x = of_y @ _merged(weight, lora_a, scaled, parts)
    elif needs_x:
        of_x = of_slices = _of_base(of_y, weight, used)
    by = by_triton if form == "triton" and by_triton.fits(slices, of_parts) else by_torch
    if by is by_torch and of_slices is None and mask is None and is_by_blocks(used, of_y, lora_a):
        pairs = [by_torch.gradients_by_blocks(slices, part) for part in of_parts]
    else:
        pairs = by.add_gradients(slices, of_parts, of_slices, mask)
    of_x = None if of_x is None else cast(of_x.view(x.shape), x.dtype)
    of_weight = of_y.t() @ used.reshape(-1, used.size(-1)) if needs_weight else None
    of_bias = of_y.sum(0) if needs_bias else None
    of_a = cast(join_parts([of_a for of_a, _ in pairs]), lora_a.dtype) if needs_a else None
    of_b = cast(join_parts([of_b for _, of_b in pairs]), lora_b.dtype) * scaling if needs_b else None
    return _InputGradients(of_x, None, of_weight, of_bias, of_a, of_b)


def _of_base(of_y: Tensor, weight: Tensor | None, like: Tensor) -> Tensor:
    """y' W (T, I), or zeros where the base's part of x' is not ours to give; `like` is x."""
    if weight is None:
        return of_y.new_zeros(len(of_y), like.size(-1))
    return of_y @ cast(weight, of_y.dtype)


def _merged(weight: Tensor, lora_a: Tensor, scaled: Tensor, parts: Sequence[int]) -> Tensor:
    """W + Δ (O, I), in memory of its own."""
    merged = weight.clone()
    blocks = diagonal_blocks(merged, len(lora_a), parts)
    for block, (part_a, part_b) in zip(blocks, factors_by_part(lora_a, scaled, parts), strict=True):
        block.add_(torch.bmm(part_b, part_a))
    return merged


# `torch.compile` keeps what it has compiled on disk, by the operators' names: another schema needs another name.
_operator = torch.library.custom_op("melora::adapted_linear_v2", _forward, mutates_args=())
# Those with dropout are operators of their own: a CUDA graph would replay one mask for ever.
_UNSAFE = (torch.Tag.cudagraph_unsafe,)
_dropout_operator = torch.library.custom_op("melora::adapted_linear_dropout", _forward, mutates_args=(), tags=_UNSAFE)


@_dropout_operator.register_fake
@_operator.register_fake
def _(x: Tensor, base: Any, weight: Any, bias: Any, lora_a: Tensor, lora_b: Tensor, *others: Any) -> Tensor:
    if base is not None:
        return torch.empty_like(base, memory_format=torch.contiguous_format)
    *_, dtype = others
    return x.new_empty(*x.shape[:-1], weight.size(0), dtype=dtype)


def _gradient_list(*arguments: Any) -> list[Tensor]:
    """Those of the gradients of x, weight, bias, lora_a and lora_b that are asked for, in this order."""
    return [found for found in _backward(*arguments) if found is not None]


_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor? seed, "
    "float rate, SymInt[] parts, str form, bool[] asked) -> Tensor[]"
)
_backward_operator = torch.library.custom_op(
    "melora::adapted_linear_backward_v2", _gradient_list, mutates_args=(), schema=_BACKWARD_SCHEMA
)
_dropout_backward_operator = torch.library.custom_op(
    "melora::adapted_linear_dropout_backward", _gradient_list, mutates_args=(), schema=_BACKWARD_SCHEMA, tags=_UNSAFE
)


@_dropout_backward_operator.register_fake
@_backward_operator.register_fake
def _(gradient: Tensor, x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, *others: Any) -> list[Tensor]:
    *_, asked = others
    width = gradient.size(-1)
    shapes = (x.shape, (width, x.size(-1)), (width,), lora_a.shape, lora_b.shape)
    dtypes = (x.dtype, gradient.dtype, gradient.dtype, lora_a.dtype, lora_b.dtype)
    return [x.new_empty(shape, dtype=dtype) for shape, dtype, need in zip(shapes, dtypes, asked, strict=True) if need]


def _backward_by_operator(*arguments: Any) -> _InputGradients:
    """`_backward` of the same arguments, by its operator."""
    _gradient, _x, _weight, _a, _b, _scaling, seed, *_, asked = arguments
    found = iter((_backward_operator if seed is None else _dropout_backward_operator)(*arguments))
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    return _InputGradients(**{name: next(found) for name, is_asked in zip(names, asked, strict=True) if is_asked})


for _each in (_operator, _dropout_operator):
    _each.register_autograd(
        lambda ctx, gradient: _input_gradients(ctx, gradient, _backward_by_operator, ctx.form), setup_context=_save
    )
