"""Is an exported file sound, and does ONNX Runtime compute with it what torch computes?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch

from exporters.graph.export import Export
from exporters.measuring.compare import Comparison, compare
from exporters.onnx_files.metadata import read_facts
from exporters.runtime.ort_runner import OrtRunner
from exporters.runtime.torch_runner import TorchRunner
from melora_fx import MELoRAError
from melora_fx.capture.model_settings import in_mode, without_cache

_RUNTIME_OPS = ("SimplifiedLayerNormalization",)


@dataclass(frozen=True)
class Verification:
    """What was compared with torch, in words, and the worst errors of all comparisons."""

    compared: tuple[str, ...]
    max_abs_error: float
    max_rel_error: float


def check_file(path: Path) -> None:
    """`onnx.checker` with strict shape inference; a graph with operators that ONNX Runtime has added to the standard
    domain, which the checker does not know, is left to ONNX Runtime.

    Raises:
        MELoRAError: for what it refuses.
    """
    nodes = onnx.load(path, load_external_data=False).graph.node
    if any(node.op_type in _RUNTIME_OPS and not node.domain for node in nodes):
        return
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise MELoRAError(f"onnx.checker refuses the export: {error}") from error


def verify(export: Export, path: Path) -> Verification:
    """Compares the file of an export with its model, in evaluation mode, on ONNX Runtime's CPU.

    Compared are the example's sizes, other sizes of every dynamic axis, a single row, and padding; each with all
    adapters that the graph's form is to be tried with.

    Raises:
        MELoRAError: where an error is above the precision's tolerance, or ONNX Runtime cannot run the file.
    """
    model = export.model
    inputs = export.inputs
    runner = OrtRunner(path, save_memory=True)
    constants = {name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)}
    tensors = {name: value for name, value in inputs.items() if name not in constants}
    torch_runner = TorchRunner(partial(model, **constants))
    facts = read_facts(path)
    comparisons: dict[str, Comparison] = {}
    with in_mode(model, training=False), without_cache(model):
        for size, trial in _trials(torch_runner, tensors, _axes(runner)):
            for adapter in export.adapter.trials(model, export.sites, facts):
                words = f"{size}, {adapter.name} adapter" if adapter.name else size
                with adapter.context:
                    comparison = compare(runner.with_tensors(adapter.inputs()), torch_runner, trial)
                if not comparison.max_rel_error <= export.options.precision.tolerance:
                    raise MELoRAError(f"the ONNX graph is not equal to torch at {words}: {comparison}")
                comparisons[words] = comparison
    return Verification(
        compared=tuple(comparisons),
        max_abs_error=max(comparison.max_abs_error for comparison in comparisons.values()),
        max_rel_error=max(comparison.max_rel_error for comparison in comparisons.values()),
    )


def _axes(runner: OrtRunner) -> dict[str, list[Any]]:
    """Each input's axes: a size, or the name of a dynamic axis."""
    return {value.name: value.shape for value in runner.session.get_inputs()}


def _trials(
    torch_runner: TorchRunner, inputs: Mapping[str, torch.Tensor], axes: Mapping[str, list[Any]]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Inputs of several sizes and with padding, named; sizes that the model itself refuses are left out."""
    example = {
        axis: inputs[name].size(index)
        for name, shape in axes.items()
        for index, axis in enumerate(shape)
        if isinstance(axis, str)
    }
    for number, sizes in enumerate(_trial_sizes(example)):
        trial = _resized(inputs, axes, sizes)
        if number == 0 or _accepts(torch_runner, trial):
            yield " ".join(f"{axis}={size}" for axis, size in sizes.items()) or "the example", trial
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and mask.size(1) > 1:
        padded = mask.clone()
        padded[0, mask.size(1) // 2 :] = 0
        yield "padding", {**inputs, "attention_mask": padded}


def _trial_sizes(example: dict[str, int]) -> list[dict[str, int]]:
    """The example's sizes, a batch of one, and one more and half of each dynamic axis; none twice."""
    trials = [example, example | dict.fromkeys(example.keys() & {"batch"}, 1)]
    for axis, size in example.items():
        trials += [example | {axis: size + 1}, example | {axis: max(2, size // 2)}]
    return [sizes for index, sizes in enumerate(trials) if sizes not in trials[:index]]


def _accepts(torch_runner: TorchRunner, inputs: Mapping[str, torch.Tensor]) -> bool:
    try:
        torch_runner.run(inputs)
    except Exception:  # such as more tokens than it has positions
        return False
    return True


def _resized(
    inputs: Mapping[str, torch.Tensor], axes: Mapping[str, list[Any]], sizes: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """The inputs repeated or cut along their dynamic axes."""
    resized = {}
    for name, tensor in inputs.items():
        for index, axis in enumerate(axes[name]):
            if isinstance(axis, str):
                tensor = tensor.index_select(index, torch.arange(sizes[axis]) % tensor.size(index))
        resized[name] = tensor
    return resized
