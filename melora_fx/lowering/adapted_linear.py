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
operator `melora::adapted_linear_v3`, which it does not look into.

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
    starts: Sequence[int] = (),
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
        starts: where the adapter's features begin in x and in the output, if these have others too.
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
    if base is not None and dtype is not None:  # autocast has had its say in the base
        with torch.autocast(x.device.type, enabled=False):
            return adapted_linear(x, None, None, lora_a, lora_b, scaling, dropout, parts, form, base, starts)
    rate = 0.0 if dropout is None else dropout_rate(dropout)
    seed = torch.randint(2**62, (), dtype=torch.int64, device="cpu") if rate else None
    if seed is not None:
        seed += sum(starts)  # of other blocks other masks, though all processes draw the same
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
    """`adapted_linear` of a weight that tensor parallelism has sharded: what this process has of it, by its tensors.

    A DTensor where the weight is one; whoever hands out what a process has of the weight takes the same of the output.
    """
    if is_sharded(weight):  # else whoever hands out what a process has of it does so with all else
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


class _AdaptedLinear(torch.autograd.Function):
    """The eager form. Its backward is made of operators that have derivatives: it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = compute_output(*inputs)
        save_for_gradients(ctx, inputs, output)
        return output.data  # no longer a view, as `F.linear` may give: a Function's output may then be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        is_differentiated = torch.is_grad_enabled()  # which kernels cannot be
        form = "activation" if is_differentiated and ctx.form == "triton" else ctx.form
        return needed_gradients(ctx, gradients[0], compute_gradients, form)
