"""How A, B and the scaling are placed if tensor parallelism has sharded their weight.

A linear is cut by columns, its output features (ColwiseParallel), or by rows, its input features (RowwiseParallel). If
possible, each process gets whole blocks of the adapter, those of its features. The adapter then communicates nothing
that the base does not. If there are fewer blocks than processes, each process has all of A and B and uses its part of
one block, and the gradients are summed.
"""

from typing import Any

from torch import Tensor, nn

from melora_fx.adapter.site import SiteRecord
from melora_fx.adapter.tensors import DROPOUT, FACTORS, SCALING
from melora_fx.config import MELoRAConfig
from melora_fx.torch_private import registered

from .tensors import as_parameter, is_sharded, own_part, part_of


def is_by_columns(weight: Any) -> bool:
    """Returns whether a DTensor, the weight (O, I) of a linear, is cut by its output features."""
    return bool(weight.placements[0].is_shard(0))


def misfit_of_sharded(weight: Any, config: MELoRAConfig, lowering: str, *, is_linear: bool) -> str | None:
    """Returns why a weight that is a DTensor cannot have an adapter, or None if it can.

    `lowering`: the lowering chosen for it. `is_linear`: whether the weight is a matrix (out, in).
    """
    kinds = [str(placement) for placement in weight.placements]
    shown = f"its weight is sharded as {', '.join(kinds)}"
    values = own_part(weight)
    if type(values) is not Tensor or not values.is_floating_point():
        return f"{shown} and quantised: adapt a quantised base in one process, or under DDP"
    if not is_linear:
        return f"{shown}, and is not a matrix (out, in): only linears can be adapted under tensor parallelism"
    if weight.device_mesh.ndim != 1 or type(weight.placements[0]).__name__ != "Shard":
        return f"{shown}: only weights that are cut once, by rows or by columns of one mesh, can be adapted"
    if lowering == "plain":
        return f"{shown}, which `lowering` (='plain') would gather in every step: use 'auto' or 'activation'"
    if config.split is not None:
        return f"{shown}, and `split` (={config.split}) cuts it differently: leave `split` out, or the linear unsharded"
    return _misfit_of_blocks(config.num_blocks, weight)


def _misfit_of_blocks(num_blocks: int, weight: Any) -> str | None:
    degree = weight.device_mesh.size()
    features = weight.shape[0 if is_by_columns(weight) else 1]
    if has_own_blocks(num_blocks, degree) or (degree % num_blocks == 0 and features % degree == 0):
        return None
    return (
        f"`num_blocks` (={num_blocks}) does not fit {degree} processes: it must be a multiple of {degree}, or divide "
        "it; in the latter case, the number of processes must divide the sharded features"
    )


def has_own_blocks(num_blocks: int, degree: int) -> bool:
    """Returns whether each of `degree` processes has whole blocks that no other process has."""
    return num_blocks % degree == 0


def lay(tensor: Tensor, weight: Any) -> Tensor:
    """Returns A, B or the scaling of an adapter as a DTensor on the mesh of `weight`.

    The values of a plain tensor are taken from rank 0, as in torch's styles.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = weight.device_mesh
    placement = Shard(0) if has_own_blocks(len(tensor), mesh.size()) else Replicate()
    if is_sharded(tensor):
        return tensor if tensor.placements == (placement,) else tensor.redistribute(placements=[placement])
    return distribute_tensor(tensor, mesh, [placement])


def lay_adapter(owner: nn.Module, record: SiteRecord, weight: Any) -> None:
    """Replaces the scaling on `owner`, the module of the DTensor `weight`, with a DTensor; A and B too if the linear is
    cut by rows. A style that cuts by columns itself replaces all parameters of the linear, A and B included.
    """
    parameters, buffers, children = registered(owner)
    for kind in () if is_by_columns(weight) else FACTORS:
        name = record.attribute(kind)
        tensor = parameters[name]
        parameters[name] = as_parameter(lay(tensor.detach(), weight), tensor)
    name = record.attribute(SCALING)
    buffers[name] = lay(buffers[name], weight)
    dropout = children.pop(record.attribute(DROPOUT), None)
    if dropout is not None:  # RowwiseParallel treats each child of a linear as a linear
        vars(owner)[record.attribute(DROPOUT)] = dropout


def added_bytes(lora_a: Tensor, lora_b: Tensor, scaling: Tensor) -> int:
    """Returns the bytes of gradients that a step sums over an adapter's processes; 0 if each has its own blocks."""
    if not is_sharded(scaling) or scaling.device_mesh.size() == 1 or not scaling.placements[0].is_replicate():
        return 0
    return sum(factor.numel() * factor.element_size() for factor in (lora_a, lora_b))


def laid_as(values: Tensor, present: Any) -> Tensor:
    """Returns the full `values` as a DTensor with the placement of `present`; not a collective."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part_of(values, present).contiguous(),
        present.device_mesh,
        present.placements,
        run_check=False,
        shape=present.shape,
        stride=present.stride(),
    )
