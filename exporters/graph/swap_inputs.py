"""placeholder"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx_ir
import torch
from torch import nn

from exporters.onnx_files.weight_place import WeightPlace
from melora_fx import MELoRAError, adapter_parameters, sites
from melora_fx.saving.model_adapter import kept_names


@contextmanager
def distinct_values(model: nn.Module) -> Iterator[None]:
    """Inside the block the adapters and the modules kept trainable hold random values, afterwards their own again:
    normal, of variance 1 / (values that a product sums), so that an update is about as large as its input.

    Exporters store tensors of equal values once, such as the zeros of every untrained B; inputs must stay apart.
    """
    own = model.state_dict()
    tensors = [*adapter_parameters(model).values(), *(own[name] for name in kept_names(model))]
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, saved, strict=True):
                tensor.copy_(values)


def open_inputs(
    graph_model: onnx_ir.Model, model: nn.Module, kept: Mapping[str, WeightPlace | None]
) -> dict[str, torch.Tensor]:
    """Turns the adapters' initializers of an unmerged graph into inputs with a rank axis, and those of `kept` too.

    Inputs without a default at first, so that no fusion takes them for constants.

    Args:
        graph_model: an unmerged graph whose weights have been named.
        model: the rewritten model that it was exported from.
        kept: where the tensors of the modules kept trainable live.

    Returns:
        the default of each new input by name, for `attach_defaults`: rank 0 for adapters, `kept`'s present values.

    Raises:
        MELoRAError: for a tensor that the exporter has folded away.
    """
    initializers = graph_model.graph.initializers
    names = {f"{name}.{kind}.T": name for name in sites(model) for kind in ("lora_a", "lora_b")}
    lost = {site for name, site in names.items() if name not in initializers}
    lost |= {name for name, place in kept.items() if place is None}
    if lost:
        raise MELoRAError(
            f"{', '.join(f'`{name}`' for name in sorted(lost))}: the exporter writes these tensors in pieces (`split`) "
            "or folds them into others, so they cannot be inputs: export with `keep` or `fold`"
        )
    opened: dict[onnx_ir.Value, torch.Tensor] = {}
    for index, name in enumerate(sites(model)):
        for kind, rank_axis in (("lora_a", 2), ("lora_b", 1)):
            value = initializers[f"{name}.{kind}.T"]
            sizes = [size for size in value.shape or () if isinstance(size, int)]
            for user in value.consumers():
                for output in user.outputs:
                    output.shape = None  # it had the rank that the model was rewritten with
            value.name = f"{name}.{kind}"
            value.shape = onnx_ir.Shape([f"rank_{index}" if axis == rank_axis else n for axis, n in enumerate(sizes)])
            opened[value] = torch.zeros([0 if axis == rank_axis else n for axis, n in enumerate(sizes)])
    own = model.state_dict()
    for name, place in kept.items():
        assert place is not None
        opened[initializers[place.initializer]] = own[name].t() if place.is_transposed else own[name]
    for value in opened:
        initializers.pop(value.name or "")
        value.const_value = None
        graph_model.graph.inputs.append(value)
    return {value.name or "": tensor for value, tensor in opened.items()}


def attach_defaults(graph: onnx_ir.Graph, defaults: Mapping[str, torch.Tensor]) -> None:
    """Makes inputs optional: an initializer of the same name is an input's default."""
    for value in graph.inputs:
        if value.name is not None and value.name in defaults:
            value.const_value = onnx_ir.tensor(defaults[value.name].contiguous().clone(), name=value.name)
            graph.register_initializer(value)
