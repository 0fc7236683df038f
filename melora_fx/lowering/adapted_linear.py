"""Computes one linear with its adapter; training runs this instead of the plain nodes that `rewrite` inserts.

    y = x Wᵀ + b + concat_i( h_i (s_i B_i)ᵀ )        h_i = x_i A_iᵀ        g_i = y'_i s_i B_i

y' is the gradient of y; x_i and y'_i are the i-th of N equal slices. The output and the gradient of x are computed

    by slices    y = x Wᵀ + b, plus h_i (s_i B_i)ᵀ on its slices; x' = y' W, plus g_i A_i on its slices
    merged       y = x (W + Δ)ᵀ + b; x' = y' (W + Δ); the forward and the backward each compute a temporary W + Δ

and the gradients of A and B, for which h and g are recomputed if by factors,

    by factors   A_i' = g_iᵀ x_i        B_i' = s_i y'_iᵀ h_i                               4 T R (I + O) operations
    by blocks    G_i = y'_iᵀ x_i        A_i' = s_i B_iᵀ G_i        B_i' = s_i G_i A_iᵀ     2 T I O / N operations

None of these changes the base. The only activation that they keep for the backward is x.

Eager mode runs an `autograd.Function`, whose call costs a quarter of a custom operator's. `torch.compile` gets an
opaque operator: `melora::adapted_linear_v3`, or `melora::adapted_linear_dropout_v2` with dropout.

I in_features, O out_features, N num_blocks, R the largest rank of a block, T tokens, P parts of `split`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from melora_fx.distributed.share import NOT_LAID, PLAIN_INPUT, as_output, local_bias, local_input, share_of
from melora_fx.distributed.tensors import is_sharded
from melora_fx.errors import MELoRAError

from .dropout import dropout_rate
from .forward_backward import compute_gradients, compute_output, needed_gradients, save_for_gradients
from .operators import operator_for
from .quantized_gradient import quantized_linear

RESIZED = "it was resized after `rewrite` (a vocabulary that grew?); resize the plain model, then `rewrite`"
"""Cause and remedy in the errors about a linear whose weight no longer fits its adapter."""


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
    starts: Sequence[int] = (),
) -> Tensor:
    """Returns the adapted output (…, O) in the dtype of x Wᵀ, in which the adapter computes too.

    Args:
        x: (…, I).
        weight: (O, I), of any strides. If it is no plain floating-point tensor (quantised, for example), `F.linear`
            computes the base.
        bias: (O,) or None.
        lora_a: (N, P·R, I/N).
        lora_b: (N, O/N, R).
        scaling: s_i, (N, 1, 1).
        dropout: the site's `lora_dropout`, whose rate and mode apply to the adapter's input; None: no dropout.
        parts: sizes of the parts of `split`; they add up to O.
        form: "weight" computes W + Δ if that is faster and rounds nothing away; "activation" goes by slices; "triton"
            does so with Triton kernels, and as "activation" if they do not fit the operands.
        base: x Wᵀ + b, (…, O), if it is already computed; weight and bias are None then.
        starts: where the adapter's features begin in x and in the output; empty if it has all of them.

    Raises:
        MELoRAError: if the weight was resized, if it is sharded but its adapter or x is not, or if `form` is "triton"
            on CUDA and triton is not installed.
        TypeError: if `dropout` is neither an nn.Dropout nor an nn.Identity.
    """
    if type(scaling) is not Tensor and is_sharded(scaling):
        assert weight is not None, "no packed linear is sharded"
        return _sharded_linear(x, weight, bias, lora_a, lora_b, scaling, dropout, form)
    if weight is not None and not (type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()):
        if is_sharded(weight):
            raise MELoRAError(NOT_LAID)
        base = quantized_linear(x, weight, bias)
        weight = bias = None
    dtype = _autocast_dtype(x)
    if base is not None and dtype is not None:  # autocast has already applied to the base
        with torch.autocast(x.device.type, enabled=False):
            return adapted_linear(x, None, None, lora_a, lora_b, scaling, dropout, parts, form, base, starts)
    rate = 0.0 if dropout is None else dropout_rate(dropout)
    seed = torch.randint(2**62, (), dtype=torch.int64, device="cpu") if rate else None
    if seed is not None:
        seed += sum(starts)  # other masks for other blocks: all processes draw the same seed
    inputs = (x, base, weight, bias, lora_a, lora_b, scaling, seed, rate, parts, form, dtype, starts)
    if torch.compiler.is_compiling():
        return operator_for(seed)(*inputs)
    try:
        return _AdaptedLinear.apply(*inputs)
    except RuntimeError as error:
        if not starts:
            _refuse_resized(weight, lora_b, error)
        raise


def _sharded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    dropout: nn.Module | None,
    form: str,
) -> Tensor:
    """Returns `adapted_linear` of this process's share of a weight that tensor parallelism has sharded.

    Returns a DTensor if the weight is one. If the caller passes a shard instead, the output is a shard too.
    """
    if is_sharded(weight):  # otherwise the caller passes this process's share of each tensor
        if not all(is_sharded(tensor) for tensor in (lora_a, lora_b, weight if bias is None else bias)):
            raise MELoRAError(NOT_LAID)
        if not is_sharded(x):
            raise MELoRAError(PLAIN_INPUT)
    own_weight = weight.to_local() if is_sharded(weight) else weight
    by_columns = own_weight.size(1) == scaling.size(0) * lora_a.size(2)
    share = share_of(own_weight, lora_a, lora_b, scaling, by_columns=by_columns)
    y = adapted_linear(
        local_input(x, by_columns=by_columns),
        own_weight,
        local_bias(bias, by_columns=by_columns),
        share.lora_a,
        share.lora_b,
        share.scaling,
        dropout,
        [share.lora_b.size(0) * share.lora_b.size(1)],
        form,
        starts=share.starts,
    )
    return as_output(y, weight) if is_sharded(weight) else y


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype in which `F.linear` computes under autocast, or None if autocast does not apply."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def _refuse_resized(weight: Tensor | None, lora_b: Tensor, error: RuntimeError) -> None:
    """Raises MELoRAError if weight and adapter differ in their number of output features."""
    out_features = lora_b.size(0) * lora_b.size(1)
    if weight is not None and weight.size(0) != out_features:
        own = weight.size(0)
        raise MELoRAError(f"a linear of {own} output features has an adapter of {out_features}: {RESIZED}") from error


class _AdaptedLinear(torch.autograd.Function):
    """The eager form. Its backward uses differentiable operators only, so it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = compute_output(*inputs)
        save_for_gradients(ctx, inputs, output)
        return output.data  # `F.linear` may return a view; without it, the output may be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        is_differentiated = torch.is_grad_enabled()  # Triton kernels cannot be
        form = "activation" if is_differentiated and ctx.form == "triton" else ctx.form
        return needed_gradients(ctx, gradients[0], compute_gradients, form)
