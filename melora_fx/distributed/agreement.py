"""What the processes of a sharded model do together: one of them writes, and where one fails all fail.

A model of which each process holds all, as under DDP, needs none of this: whoever calls does it alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from melora_fx.errors import MELoRAError

from .tensors import is_sharded
from .wrappers import reshard


def mesh_of(model: nn.Module) -> Any:
    """The mesh of most processes that a parameter of `model` is sharded over; None where none is."""
    reshard(model)  # or a root of FSDP had whole ones after its forward
    meshes = [parameter.device_mesh for parameter in model.parameters() if is_sharded(parameter)]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def on_one_process(mesh: Any, write: Callable[[], None]) -> None:
    """Calls `write` on the first process of `mesh`; all return when it has, or raise as it does. Without a mesh each
    process that comes here calls it.

    Raises:
        MELoRAError: on the others, with the text of its error.
    """
    if mesh is None:
        write()
        return
    import torch.distributed as dist

    failure: list[str | None] = [None]
    try:
        if all(position == 0 for position in mesh.get_coordinate()):
            write()
    except BaseException as error:
        failure = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        for group in _groups(mesh):
            dist.broadcast_object_list(failure, dist.get_global_rank(group, 0), group=group)
    if failure[0] is not None:
        raise MELoRAError(f"another process has failed: {failure[0]}")


def agree_on(mesh: Any, make: Callable[[], tuple[Any, str]], what: str) -> Any:
    """What `make` gives, with a text that must be that of all processes of `mesh`; without a mesh what it gives.

    Raises:
        MELoRAError: on all, where it raises on one, or the texts differ: `what` names what they are of.
    """
    if mesh is None:
        return make()[0]
    failure: Exception | None = None
    value, text = None, ""
    try:
        value, text = make()
    except Exception as error:
        failure = error
    told = _gathered(mesh, (None if failure is None else f"{type(failure).__name__}: {failure}", text))
    if failure is not None:
        raise failure
    if failures := [each for each, _ in told if each is not None]:
        raise MELoRAError(f"another process has failed: {failures[0]}")
    if any(other != text for _, other in told):
        raise MELoRAError(f"{what} is another one on another process: give all the same")
    return value


def _gathered(mesh: Any, value: Any) -> list[Any]:
    """The values of all processes of `mesh`."""
    import torch.distributed as dist

    values = [value]
    for group in _groups(mesh):
        lists: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(lists, values, group=group)
        values = [each for own in lists for each in own]
    return values


def _groups(mesh: Any) -> Iterator[Any]:
    """The process groups of this process, one for each dimension of `mesh`: by these in turn all are reached."""
    for dimension in range(mesh.ndim):
        yield mesh.get_group(dimension)
