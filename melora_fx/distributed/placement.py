"""How A, B and the scaling lie beside a weight that tensor parallelism has sharded.

A linear is cut by columns, its output features (ColwiseParallel), or by rows, its input features (RowwiseParallel). In
both each process is to have whole blocks of the adapter, those of its features: then nothing is communicated that the
base does not communicate. Where there are fewer blocks than processes each has all of A and B, uses its part of one
block, and their gradients are added up.
"""

from typing import Any

from torch import Tensor, nn

from melora_fx.adapter.site import SiteRecord
from melora_fx.adapter.tensors import DROPOUT, FACTORS, SCALING
from melora_fx.config import MELoRAConfig
from melora_fx.torch_private import registered

from .tensors import as_parameter, is_sharded, own_part, part_of


def is_by_columns(weight: Any) -> bool:
    """Whether a DTensor, the weight (O, I) of a linear, is cut by its output features."""
    return bool(weight.placements[0].is_shard(0))


def misfit_of_sharded(weight: Any, config: MELoRAConfig, lowering: str, *, is_linear: bool) -> str | None:
    """Why the adapter of a weight that is a DTensor cannot lie beside it, or None.

    `lowering`: the one that is chosen for it. `is_linear`: whether it is a matrix (out, in).
    """
    kinds = [str(placement) for placement in weight.placements]
    shown = f"its weight is sharded as {', '.join(kinds)}"
    values = own_part(weight)
    if type(values) is not Tensor or not values.is_floating_point():
        return f"{shown}, and quantised: adapt a quantised base in one process, or under DDP"
    if not is_linear:
        return f"{shown}, and is no matrix (out, in): only linears can be adapted under tensor parallelism"
    if weight.device_mesh.ndim != 1 or type(weight.placements[0]).__name__ != "Shard":
        return f"{shown}: only weights cut once, by rows or by columns of one mesh, can be adapted"
    if lowering == "plain":
        return f"{shown}, which `lowering` (='plain') would gather in every step: use 'auto' or 'activation'"
    if config.split is not None:
        return f"{shown}, and `split` (={config.split}) cuts it otherwise: leave `split` out, or the linear whole"
    return _misfit_of_blocks(config.num_blocks, weight)


def _misfit_of_blocks(num_blocks: int, weight: Any) -> str | None:
    degree = weight.device_mesh.size()
    features = weight.shape[0 if is_by_columns(weight) else 1]
    if has_own_blocks(num_blocks, degree) or (degree % num_blocks == 0 and features % degree == 0):
        return None
    return (
        f"`num_blocks` (={num_blocks}) does not fit {degree} processes: it must be a multiple of {degree}, or divide it"
    )


def has_own_blocks(num_blocks: int, degree: int) -> bool:
    """Whether each of `degree` processes has whole blocks of its own."""
    return num_blocks % degree == 0


def lay(tensor: Tensor, weight: Any) -> Tensor:
    """A, B or the scaling of an adapter as a DTensor beside `weight`: from rank 0's values, as torch's styles do."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = weight.device_mesh
    placement = Shard(0) if has_own_blocks(len(tensor), mesh.size()) else Replicate()
    if is_sharded(tensor):
        return tensor if tensor.placements == (placement,) else tensor.redistribute(placements=[placement])
    return distribute_tensor(tensor, mesh, [placement])


def lay_adapter(owner: nn.Module, record: SiteRecord, weight: Any) -> None:
    """Puts DTensors into the place of the scaling, and of A and B of a linear that is cut by rows, on `owner`, whose
    weight is the DTensor `weight`. A style that cuts by columns does so with all parameters of the linear, A and B too.
    """
    parameters, buffers, children = registered(owner)
    for kind in () if is_by_columns(weight) else FACTORS:
        name = record.attribute(kind)
        tensor = parameters[name]
        parameters[name] = as_parameter(lay(tensor.detach(), weight), tensor)
    name = record.attribute(SCALING)
    buffers[name] = lay(buffers[name], weight)
    dropout = children.pop(record.attribute(DROPOUT), None)
    if dropout is not None:  # RowwiseParallel takes each child of a linear for one
        vars(owner)[record.attribute(DROPOUT)] = dropout


def added_bytes(lora_a: Tensor, lora_b: Tensor, scaling: Tensor) -> int:
    """Bytes of gradients that a step adds up over the processes of one adapter; 0 where each has blocks of its own."""
    if not is_sharded(scaling) or scaling.device_mesh.size() == 1 or not scaling.placements[0].is_replicate():
        return 0
    return sum(factor.numel() * factor.element_size() for factor in (lora_a, lora_b))


def laid_as(values: Tensor, present: Any) -> Tensor:
    """`values`, which are whole, as a DTensor that lies as `present` does; no collective."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part_of(values, present).contiguous(),
        present.device_mesh,
        present.placements,
        run_check=False,
        shape=present.shape,
        stride=present.stride(),
    )
