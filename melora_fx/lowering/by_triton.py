"""Computes the updates of slices and their gradients for `adapted_linear`, with Triton kernels.

One kernel computes h_i and adds the update; one computes g_i and adds g_i A_i. Torch needs two products for each. Sums
and the gradients of A and B are in float32. The kernels have no derivatives.
"""

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from melora_fx.adapter.tensors import slices_of
from melora_fx.errors import MELoRAError
from melora_fx.torch_private import is_wrapped

from .slices import Part

MISSING = "`lowering` (='triton') needs the package triton on CUDA: `pip install triton`, or use 'auto'"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MIN_CAPABILITY = (8, 0)
"""The lowest compute capability for the kernels: older GPUs have less shared memory than large ranks need."""


def kernels() -> ModuleType:
    """Returns the module `triton_kernels`; only this call imports triton.

    Raises:
        MELoRAError: if triton is not installed.
    """
    try:
        from . import triton_kernels
    except ImportError as error:
        raise MELoRAError(MISSING) from error
    return triton_kernels


@functools.cache
def is_installed() -> bool:
    """Returns whether the kernels can be imported."""
    try:
        kernels()
    except MELoRAError:
        return False
    return True


def fits(slices: Tensor, parts: Sequence[Part]) -> bool:
    """Returns whether the kernels accept these operands; if not, use `by_torch`.

    On a CPU the kernels need Triton's interpreter, which has no products of bfloat16.

    Raises:
        MELoRAError: if the operands are on CUDA and triton is not installed.
    """
    operands = [slices, *(operand for part in parts for operand in part)]
    if slices.dtype not in DTYPES or not all(_is_plain(operand) for operand in operands):
        return False
    if any(operand.device != slices.device for operand in operands):  # torch raises; a kernel would read any memory
        return False
    if not (slices.is_cuda or (slices.device.type == "cpu" and is_installed())):
        return False
    if kernels().IS_INTERPRETED:
        return slices.dtype != torch.bfloat16
    return slices.is_cuda and torch.cuda.get_device_capability(slices.device) >= MIN_CAPABILITY


def _is_plain(tensor: Tensor) -> bool:
    """Returns whether the memory of `tensor` contains exactly its values."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_neg() and not is_wrapped(tensor)


def add_update(slices: Tensor, parts: Sequence[Part]) -> None:
    """Does what `by_torch.add_update` does."""
    for columns, lora_a, scaled in parts:
        kernels().accumulate(slices, lora_a, scaled, columns)


def add_gradients(
    slices: Tensor, parts: Sequence[Part], of_x: Tensor | None, mask: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Does what `by_torch.add_gradients` does, but returns the gradients in float32."""
    num_blocks = len(slices)
    of_slices = None if of_x is None else slices_of(of_x, num_blocks)
    of_mask = None if mask is None else slices_of(mask, num_blocks)
    pairs = []
    for columns, lora_a, scaled in parts:
        of_hidden = kernels().accumulate(columns, scaled.mT, lora_a.mT, of_slices, of_mask, keep_hidden=True)
        hidden = kernels().accumulate(slices, lora_a, keep_hidden=True)
        pairs.append((kernels().reduce(of_hidden, slices), kernels().reduce(hidden, columns).mT))
    return pairs
