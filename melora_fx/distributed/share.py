"""The part of one adapted linear that one process computes under tensor parallelism.

By columns, a process has all of x and some features of y. By rows, it has some features of x and a summand of all of y;
the base's own collective adds these up. The process has the adapter's blocks of its features, which begin at `starts`
in x and y.

N num_blocks, R the largest rank of a block, I in_features, O out_features, D processes.
"""

from typing import Any, NamedTuple

from torch import Tensor

from melora_fx.errors import MELoRAError

from .placement import is_by_columns
from .tensors import is_sharded

NOT_LAID = (
    "a weight was sharded after `rewrite`, but its adapter was not: shard all parameters of the module that owns it, "
    "as the styles of `parallelize_module` do"
)
"""The error for a DTensor whose adapter is not sharded to match."""


PLAIN_INPUT = (
    "a linear whose weight is sharded got an input that is not a DTensor, so it is unknown which part each process "
    "has: pass `distribute_module` an `input_fn`, as the styles of `parallelize_module` do"
)
"""The error for an x that is not a DTensor."""


class Share(NamedTuple):
    """The part of an adapter that one process computes with.

    Attributes:
        lora_a: (n, R, w) of its n blocks, with w features of x each.
        lora_b: (n, h, R), with h features of y each.
        scaling: (n, 1, 1).
        starts: where the n·w features begin in its part of x, and the n·h features in its part of y.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    starts: tuple[int, int]


def share_of(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: Any, *, by_columns: bool) -> Share:
    """Returns the share of this process; `weight` is its part of the weight, (O / D, I) by columns, (O, I / D) by rows.

    Raises:
        MELoRAError: if the weight was sharded but A and B were not.
    """
    mesh = scaling.device_mesh
    degree = mesh.size()
    rank = mesh.get_local_rank()
    number = scaling.shape[0]
    width, height = lora_a.shape[2], lora_b.shape[1]
    own_scaling = scaling.to_local()
    if not scaling.placements[0].is_replicate():
        own = number // degree
        starts = (rank * own * width, 0) if by_columns else (0, rank * own * height)
        share = Share(_local(lora_a), _local(lora_b), own_scaling, starts)
        if not len(share.lora_a) == len(share.lora_b) == own:
            raise MELoRAError(NOT_LAID)
        return share
    block, part = divmod(rank, degree // number)
    lora_a = _summed(lora_a)[block : block + 1]
    lora_b = _summed(lora_b)[block : block + 1]
    own_scaling = own_scaling[block : block + 1]
    if by_columns:
        rows = weight.size(0)
        return Share(lora_a, lora_b.narrow(1, part * rows, rows), own_scaling, (block * width, 0))
    columns = weight.size(1)
    return Share(lora_a.narrow(2, part * columns, columns), lora_b, own_scaling, (0, block * height))


def _local(factor: Any) -> Any:
    return factor.to_local() if is_sharded(factor) else factor


def _summed(factor: Any) -> Any:
    """Returns the full factor; each process computes one summand of its gradient."""
    if not is_sharded(factor):
        return factor
    from torch.distributed.tensor import Partial

    return factor.redistribute(placements=factor.placements).to_local(grad_placements=[Partial()])


def local_input(x: Any, *, by_columns: bool) -> Any:
    """Returns the part of x that this process multiplies by, (…, I) by columns or (…, I / D) by rows.

    By columns, each process computes one summand of the gradient of x.
    """
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Partial, Replicate, Shard

    wanted = Replicate() if by_columns else Shard(x.dim() - 1)
    if x.placements != (wanted,):
        x = x.redistribute(placements=[wanted])
    return x.to_local(grad_placements=[Partial()] if by_columns else None)


def local_bias(bias: Any, *, by_columns: bool) -> Any:
    """Returns the bias that this process adds. By rows it is divided, as in torch, since a sum over all follows."""
    if not is_sharded(bias) or by_columns:
        return _local(bias)
    own = bias.to_local()  # replicated: each process has the full bias and the full gradient
    divided = own.detach() / bias.device_mesh.size()
    return divided + (own - own.detach()) if own.requires_grad else divided


def as_output(y: Tensor, weight: Any) -> Any:
    """Returns y as a DTensor from this process's part, placed as a linear with the DTensor `weight` returns it."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    placement = Shard(y.dim() - 1) if is_by_columns(weight) else Partial()
    return DTensor.from_local(y, weight.device_mesh, [placement], run_check=False)
