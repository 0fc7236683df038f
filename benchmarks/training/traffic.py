"""Counts what a process sends and receives: collectives and their bytes."""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_COLLECTIVES = ("all_reduce", "allreduce", "all_gather", "allgather", "reduce_scatter", "all_to_all", "broadcast")


class Traffic(TorchDispatchMode):
    """Counts the collectives of a block and their bytes: for each, the larger of its arguments and its result.

    Modes do not see the collectives of DDP: call `count_ddp` for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives = 0
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if "c10d" in namespace and any(part in name for part in _COLLECTIVES):
            self.collectives += 1
            self.num_bytes += max(_bytes((args, kwargs)), _bytes(result))
        return result

    def count_ddp(self, model: torch.nn.parallel.DistributedDataParallel) -> None:
        """Also counts what `model` reduces from now on."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def count(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            self.collectives += 1
            self.num_bytes += bucket.buffer().nbytes
            return allreduce_hook(state, bucket)

        model.register_comm_hook(None, count)


def _bytes(tree: Any) -> int:
    """Returns the bytes of the largest leaf; a list of tensors counts as one leaf."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return _bytes(tuple(tree.values()))
    if isinstance(tree, list) and all(isinstance(item, torch.Tensor) for item in tree):
        return sum(item.nbytes for item in tree)
    return max(map(_bytes, tree), default=0) if isinstance(tree, list | tuple) else 0
