"""The part of one adapted linear that one process computes under tensor parallelism.

By columns it has all of x and some features of y, by rows some features of x and a sum for all of y, which the base's
own collective adds up. The adapter's blocks are those of the features that it has: they begin at `starts` in x and y.

N num_blocks, R the largest rank of a block, I in_features, O out_features, D processes.
"""

from typing import Any, NamedTuple

from torch import Tensor

from melora_fx.errors import MELoRAError

from .placement import is_by_columns
from .tensors import is_sharded

NOT_LAID = (
    "a weight was sharded after `rewrite`, and its adapter was not: shard all parameters of the module that owns it, "
    "as the styles of `parallelize_module` do"
)
"""What is said of a DTensor beside an adapter that lies otherwise."""


PLAIN_INPUT = (
    "a linear whose weight is sharded was given an input that is no DTensor, of which nobody knows what the processes "
    "have: give `distribute_module` an `input_fn`, as the styles of `parallelize_module` do"
)
"""What is said of a plain x."""


class Share(NamedTuple):
    """What one process takes of an adapter.

    Attributes:
        lora_a: (n, R, w) of its n blocks, w features of x each.
        lora_b: (n, h, R), h features of y each.
        scaling: (n, 1, 1).
        starts: where the n·w features begin in what it has of x, and the n·h in what it has of y.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    starts: tuple[int, int]


def share_of(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: Any, *, by_columns: bool) -> Share:
    """The share of this process; `weight` is what it has of that, (O / D, I) by columns or (O, I / D) by rows.

    Raises:
        MELoRAError: where A and B have stayed whole beside a weight that was cut.
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
    """All of a factor, of whose gradient each process has one part of a sum."""
    if not is_sharded(factor):
        return factor
    from torch.distributed.tensor import Partial

    return factor.redistribute(placements=factor.placements).to_local(grad_placements=[Partial()])


def local_input(x: Any, *, by_columns: bool) -> Any:
    """What this process multiplies by of x, (…, I) or (…, I / D); each gives a part of the gradient of all of x."""
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Partial, Replicate, Shard

    wanted = Replicate() if by_columns else Shard(x.dim() - 1)
    if x.placements != (wanted,):
        x = x.redistribute(placements=[wanted])
    return x.to_local(grad_placements=[Partial()] if by_columns else None)


def local_bias(bias: Any, *, by_columns: bool) -> Any:
    """What this process adds of the bias; by rows, where a sum over all follows, as torch divides it."""
    if not is_sharded(bias) or by_columns:
        return _local(bias)
    own = bias.to_local()  # all of it on each process, where its gradient is whole too
    divided = own.detach() / bias.device_mesh.size()
    return divided + (own - own.detach()) if own.requires_grad else divided


def as_output(y: Tensor, weight: Any) -> Any:
    """y of all processes from what each has of it, as the linear by the DTensor `weight` gives it."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    placement = Shard(y.dim() - 1) if is_by_columns(weight) else Partial()
    return DTensor.from_local(y, weight.device_mesh, [placement], run_check=False)
