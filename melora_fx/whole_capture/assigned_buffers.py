"""Lets whole captures write to buffers that a forward assigns to, as in `self.count = self.count + 1`."""

import functools
from typing import Any

import torch
from torch import fx, nn

from melora_fx.errors import MELoRAError
from melora_fx.names import join_path
from melora_fx.torch_private import registered

from .private import may_alias

aten = torch.ops.aten


def write_assigned_buffers(model: nn.Module) -> None:
    """Replaces `model.forward` by one that finally copies the values assigned to buffers into the buffers themselves.

    `torch.export` does so for the buffers of the model itself, and forgets those of its children (torch 2.13). The
    forward raises a MELoRAError if the buffer and the value assigned to it differ in shape or dtype, or if one is None.
    """
    forward = model.forward

    @functools.wraps(forward)
    def writing(*args: Any, **kwargs: Any) -> Any:
        before = [(path, buffers, dict(buffers)) for path, buffers in _buffers(model)]
        outputs = forward(*args, **kwargs)
        for path, buffers, earlier in before:
            for name in earlier.keys() | buffers.keys():
                if buffers.get(name) is not earlier.get(name):
                    _refuse_other_kind(join_path(path, name), earlier.get(name), buffers.get(name))
                    if path:
                        earlier[name].copy_(buffers[name])
                        buffers[name] = earlier[name]
        return outputs

    vars(model)["forward"] = writing


def _buffers(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Returns each module's path and the dict of its buffers."""
    return [(path, registered(module)[1]) for path, module in model.named_modules()]


def _refuse_other_kind(name: str, buffer: torch.Tensor | None, value: torch.Tensor | None) -> None:
    if buffer is None or value is None or buffer.dtype != value.dtype or buffer.shape != value.shape:
        raise MELoRAError(
            f"the forward assigns {_kind(value)} to the buffer `{name}`, which is {_kind(buffer)}: a whole capture can "
            "only change the values of a buffer; rewrite the model without `example_inputs=`"
        )


def _kind(value: torch.Tensor | None) -> str:
    return "nothing" if value is None else f"{tuple(value.shape)} of {value.dtype}"


def keep_values_read(graph_module: fx.GraphModule) -> None:
    """Makes a graph read a copy of each buffer that it overwrites at the end, since its backward may need the values
    that it read. In the model, an assignment leaves the buffer's old tensor unchanged.
    """
    graph = graph_module.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    for read in graph.find_nodes(op="get_attr"):
        users = sorted(read.users, key=order.__getitem__)
        others, last = users[:-1], users[-1] if users else read
        is_written_last = last.target is aten.copy_.default and last.args[0] is read
        if not others or not is_written_last or any(map(may_alias, others)):
            continue
        with graph.inserting_after(read):
            copy = graph.call_function(aten.clone.default, (read,))
        for user in others:
            user.replace_input_with(read, copy)
