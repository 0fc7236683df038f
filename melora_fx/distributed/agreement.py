"""What the processes of a sharded model do together: one of them writes, and if one fails, all fail.

A model that every process holds completely, as under DDP, does not need this: each caller acts for itself.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from melora_fx.errors import MELoRAError

from .tensors import is_sharded
from .wrappers import reshard


def mesh_of(model: nn.Module) -> Any:
    """Returns the largest mesh that a parameter of `model` is sharded over, or None if no parameter is sharded."""
    reshard(model)  # otherwise a root of FSDP would have full parameters after its forward
    meshes = [parameter.device_mesh for parameter in model.parameters() if is_sharded(parameter)]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def on_one_process(mesh: Any, write: Callable[[], None]) -> None:
    """Calls `write` on the first process of `mesh`; all processes return when `write` has, or raise if it raises.
    Without a mesh, every process that calls this function calls `write`.

    Raises:
        MELoRAError: on the other processes if `write` raises, with the text of its error.
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
    """Calls `make` on every process of `mesh`, and returns its value if its text is the same on all of them.

    Without a mesh, the text is not compared.

    Args:
        mesh: the mesh, or None.
        make: returns a value and a text that identifies it.
        what: names the value in the error.

    Raises:
        MELoRAError: on all processes, if the texts differ; on the other processes, if `make` raises on one.
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
        raise MELoRAError(f"{what} differs between the processes: pass the same one on each")
    return value


def _gathered(mesh: Any, value: Any) -> list[Any]:
    """Returns the values of all processes of `mesh`."""
    import torch.distributed as dist

    values = [value]
    for group in _groups(mesh):
        lists: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(lists, values, group=group)
        values = [each for own in lists for each in own]
    return values


def _groups(mesh: Any) -> Iterator[Any]:
    """Yields the groups of this process, one per dimension of `mesh`; used in turn, they reach all processes."""
    for dimension in range(mesh.ndim):
        yield mesh.get_group(dimension)
