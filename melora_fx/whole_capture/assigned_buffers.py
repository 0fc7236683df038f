"""Buffers that a forward assigns to: `self.count = self.count + 1`."""

import functools
from typing import Any

import torch
from torch import nn

from melora_fx.errors import MELoRAError
from melora_fx.names import join_path
from melora_fx.torch_private import registered


def write_assigned_buffers(model: nn.Module) -> None:
    """Gives the model an own `forward` that at its end writes what was assigned to a buffer into the buffer itself.

    `torch.export` does so for the buffers of the model, and forgets those of its children (torch 2.13). The forward
    raises a MELoRAError where the values would not be the same in the buffer.
    """
    forward = model.forward

    @functools.wraps(forward)
    def writing(*args: Any, **kwargs: Any) -> Any:
        before = [(path, buffers, dict(buffers)) for path, buffers in _buffers(model)]
        outputs = forward(*args, **kwargs)
        for path, buffers, earlier in before:
            for name in earlier.keys() | buffers.keys():
                if buffers.get(name) is not earlier.get(name):
                    _write(join_path(path, name), earlier.get(name), buffers.get(name))
                    buffers[name] = earlier[name]
        return outputs

    vars(model)["forward"] = writing


def _buffers(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Each module's path and the dict of its buffers."""
    return [(path, registered(module)[1]) for path, module in model.named_modules()]


def _write(name: str, buffer: torch.Tensor | None, value: torch.Tensor | None) -> None:
    if buffer is None or value is None or buffer.dtype != value.dtype or buffer.shape != value.shape:
        raise MELoRAError(
            f"the forward assigns {_kind(value)} to the buffer `{name}`, which is {_kind(buffer)}: a whole capture can "
            "only change the values of a buffer; rewrite the model without `example_inputs=`"
        )
    buffer.copy_(value)


def _kind(value: torch.Tensor | None) -> str:
    return "nothing" if value is None else f"{tuple(value.shape)} of {value.dtype}"
