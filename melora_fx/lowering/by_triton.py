"""What `adapted_linear` does by slices, by Triton kernels: the same functions as in `by_torch`.

One kernel computes h_i and adds the update, one g_i and adds g_i A_i, where torch's products take two for each. Sums
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
"""Of the GPUs that the kernels are compiled for: older ones have less shared memory than large ranks take."""


def kernels() -> ModuleType:
    """The module `triton_kernels`: only what calls this imports triton.

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
    """Whether there are `kernels`."""
    try:
        kernels()
    except MELoRAError:
        return False
    return True


def fits(slices: Tensor, parts: Sequence[Part]) -> bool:
    """Whether the kernels take these operands; where not, torch's products do.

    On a CPU only Triton's interpreter takes any, and that has no products of bfloat16.

    Raises:
        MELoRAError: on CUDA, if triton is not installed.
    """
    operands = [slices, *(operand for part in parts for operand in part)]
    if slices.dtype not in DTYPES or not all(_is_plain(operand) for operand in operands):
        return False
    if any(operand.device != slices.device for operand in operands):  # torch says so; a kernel reads what is there
        return False
    if not (slices.is_cuda or (slices.device.type == "cpu" and is_installed())):
        return False
    if kernels().IS_INTERPRETED:
        return slices.dtype != torch.bfloat16
    return slices.is_cuda and torch.cuda.get_device_capability(slices.device) >= MIN_CAPABILITY


def _is_plain(tensor: Tensor) -> bool:
    """Whether the values of `tensor` are those in its memory."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_neg() and not is_wrapped(tensor)


def add_update(slices: Tensor, parts: Sequence[Part]) -> None:
    """As `by_torch.add_update`."""
    for columns, lora_a, scaled in parts:
        kernels().accumulate(slices, lora_a, scaled, columns)


def add_gradients(
    slices: Tensor, parts: Sequence[Part], of_x: Tensor | None, mask: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """As `by_torch.add_gradients`, the gradients in float32."""
    num_blocks = len(slices)
    of_slices = None if of_x is None else slices_of(of_x, num_blocks)
    of_mask = None if mask is None else slices_of(mask, num_blocks)
    pairs = []
    for columns, lora_a, scaled in parts:
        of_hidden = kernels().accumulate(columns, scaled.mT, lora_a.mT, of_slices, of_mask, keep_hidden=True)
        hidden = kernels().accumulate(slices, lora_a, keep_hidden=True)
        pairs.append((kernels().reduce(of_hidden, slices), kernels().reduce(hidden, columns).mT))
    return pairs
