"""Is an exported file sound, and does ONNX Runtime compute with it what torch computes?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch

from exporters.graph.export import Export
from exporters.graph.ranges import holds, sizes_above
from exporters.graph.trial_sizes import trial_sizes
from exporters.measuring.compare import Comparison, compare
from exporters.onnx_files.metadata import GraphFacts, read_facts
from exporters.runtime.ort_runner import OrtRunner
from exporters.runtime.torch_runner import TorchRunner
from melora_fx import MELoRAError
from melora_fx.capture.model_settings import in_mode, without_cache
from melora_fx.whole_capture.conditions import Condition

_RUNTIME_OPS = ("SimplifiedLayerNormalization",)


@dataclass(frozen=True)
class Verification:
    """What was compared with torch, in words, and the worst errors of all comparisons; `conditions`: what else must
    hold of the inputs' sizes.
    """

    compared: tuple[str, ...]
    max_abs_error: float
    max_rel_error: float
    conditions: tuple[Condition, ...]


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

    Compared are sizes as in `trial_sizes.py`, and padding; each with all adapters that the graph's form is to be tried
    with. With one entry along an axis the graph may be another function than the model, since the export takes axes to
    be larger: then they have to be.

    Raises:
        MELoRAError: where an error is above the precision's tolerance, or ONNX Runtime cannot run the file.
    """
    runner = OrtRunner(path, save_memory=True)
    torch_runner = TorchRunner(partial(export.model, **export.constants()))
    facts = read_facts(path)
    comparisons: dict[str, Comparison] = {}
    larger: dict[str, None] = {}
    with in_mode(export.model, training=False), without_cache(export.model):
        for trial in _trials(export, torch_runner, _axes(runner)):
            if larger.keys() & set(trial.ones):
                continue
            try:
                comparisons |= _compare(export, runner, torch_runner, facts, trial)
            except MELoRAError:
                if not trial.ones:
                    raise
                larger |= dict.fromkeys(trial.ones)
    return Verification(
        compared=tuple(comparisons),
        max_abs_error=max(comparison.max_abs_error for comparison in comparisons.values()),
        max_rel_error=max(comparison.max_rel_error for comparison in comparisons.values()),
        conditions=tuple(sizes_above(1, _axes(runner), larger)),
    )


class _Trial(NamedTuple):
    """Inputs to compare with, and what they are in words; `ones` as in `TrialSizes`."""

    words: str
    inputs: dict[str, torch.Tensor]
    ones: tuple[str, ...] = ()


def _compare(
    export: Export, runner: OrtRunner, torch_runner: TorchRunner, facts: GraphFacts, trial: _Trial
) -> dict[str, Comparison]:
    """One comparison for each adapter that the graph's form is to be tried with, by what it is in words."""
    found = {}
    for adapter in export.adapter.trials(export.model, export.sites, facts):
        words = f"{trial.words}, {adapter.name} adapter" if adapter.name else trial.words
        with adapter.context:
            comparison = compare(runner.with_tensors(adapter.inputs()), torch_runner, trial.inputs)
        if not comparison.max_rel_error <= export.options.precision.tolerance:
            raise MELoRAError(f"the ONNX graph is not equal to torch at {words}: {comparison}")
        found[words] = comparison
    return found


def _axes(runner: OrtRunner) -> dict[str, list[Any]]:
    """Each input's axes: a size, or the name of a dynamic axis."""
    return {value.name: value.shape for value in runner.session.get_inputs()}


def _trials(export: Export, torch_runner: TorchRunner, axes: Mapping[str, list[Any]]) -> Iterator[_Trial]:
    """Inputs of several sizes and with padding; sizes that the export did not assume are left out, and those that the
    model itself refuses.
    """
    tensors = {name: export.inputs[name] for name in axes}
    example = {
        axis: tensors[name].size(index)
        for name, shape in axes.items()
        for index, axis in enumerate(shape)
        if isinstance(axis, str)
    }
    for number, sizes in enumerate(trial_sizes(example, export.ranges())):
        inputs = _resized(tensors, axes, sizes.sizes)
        shapes = {name: tensor.shape for name, tensor in inputs.items()}
        if number == 0 or (holds(export.conditions, shapes) and _accepts(torch_runner, inputs)):
            yield _Trial(str(sizes), inputs, sizes.ones)
    mask = tensors.get("attention_mask")
    if mask is not None and mask.dim() == 2 and mask.size(1) > 1:
        padded = mask.clone()
        padded[0, mask.size(1) // 2 :] = 0
        yield _Trial("padding", {**tensors, "attention_mask": padded})


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
