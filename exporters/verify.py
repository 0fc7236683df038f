"""Is an exported file sound, and does ONNX Runtime compute with it what torch computes?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch

from exporters.generation.check import compare_steps
from exporters.graph.export import Export
from exporters.graph.ranges import AxisRange, axis_ranges, holds
from exporters.graph.trial_sizes import Sizes, in_words, trial_sizes
from exporters.measuring.compare import Comparison, compare, largest
from exporters.measuring.rounding import refuse_unequal
from exporters.onnx_files.metadata import read_facts
from exporters.onnx_runtime import Arrays
from exporters.runtime.ort_runner import OrtRunner
from exporters.runtime.torch_runner import TorchRunner
from melora_fx import MELoRAError
from melora_fx.capture.model_settings import in_mode, own_attributes
from melora_fx.whole_capture.conditions import Condition, Shaped
from melora_fx.whole_capture.tried_sizes import beyond, with_single_entries

_RUNTIME_OPS = ("SimplifiedLayerNormalization",)


@dataclass(frozen=True)
class Verification:
    """What was compared with torch, in words, and the worst errors of all comparisons; `conditions`: what must hold of
    the inputs' sizes, which axes of one entry may be right for where the export did not say so, and the reverse.
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

    Compared are the example, one entry along each dynamic axis and along all, the sizes of `trial_sizes.py`, and
    padding; each with all adapters that the graph's form is to be tried with.

    Raises:
        MELoRAError: where an error is above the precision's tolerance and above what rounding explains there, or ONNX
            Runtime cannot run the file; but not for one entry along an axis, which the export takes to have two: then
            it has to.
    """
    if export.has_cache:
        with own_attributes(export.model), in_mode(export.model, training=False):
            return _verification(*compare_steps(export, path))
    with own_attributes(export.model), in_mode(export.model, training=False), export.forward(export.model):
        comparing = _Comparing(export, path)
        comparing.compare(comparing.example)
        comparing.try_single_entries()
        comparing.try_beyond_bounds()
        for sizes in trial_sizes(comparing.example, comparing.ranges()):
            if comparing.are_assumed(sizes) and comparing.model_takes(sizes):
                comparing.compare(sizes)
        comparing.compare_padding()
    return _verification(comparing.comparisons, comparing.conditions)


def _verification(compared: Mapping[str, Comparison], conditions: Sequence[Condition]) -> Verification:
    return Verification(
        compared=tuple(compared),
        max_abs_error=max(comparison.max_abs_error for comparison in compared.values()),
        max_rel_error=max(comparison.max_rel_error for comparison in compared.values()),
        conditions=tuple(conditions),
    )


class _Comparing:
    """The comparisons of one file.

    Attributes:
        example: dynamic axis → its size in the example.
        conditions: what must hold of the inputs' sizes, as far as is known.
        comparisons: what was compared, in words → how near it is.
    """

    def __init__(self, export: Export, path: Path) -> None:
        self._export = export
        self._runner = OrtRunner(path, save_memory=True).without_check()
        self._torch_runner = TorchRunner(partial(export.model, **export.constants()))
        self._facts = read_facts(path)
        self._axes: dict[str, list[Any]] = {value.name: value.shape for value in self._runner.session.get_inputs()}
        self._tensors: dict[str, torch.Tensor] = {name: export.inputs[name] for name in self._axes}
        self.example = {
            axis: self._tensors[name].size(index)
            for name, shape in self._axes.items()
            for index, axis in enumerate(shape)
            if isinstance(axis, str)
        }
        self._scales = {name: largest(value) for name, value in self._torch_runner.run(self._tensors).items()}
        self.conditions = list(export.conditions)
        self.comparisons: dict[str, Comparison] = {}

    def compare(self, sizes: Sizes) -> None:
        """With inputs of these sizes; raises MELoRAError where they are not near."""
        self._compare(in_words(sizes), self._inputs(sizes))

    def compare_padding(self) -> None:
        """With half of a sequence padded, in a model that takes a mask of tokens."""
        mask = self._tensors.get("attention_mask")
        if mask is not None and mask.dim() == 2 and mask.size(1) > 1:
            padded = mask.clone()
            padded[0, mask.size(1) // 2 :] = 0
            self._compare("padding", {**self._tensors, "attention_mask": padded})

    def try_single_entries(self) -> None:
        """Lets axes have one entry where the graph is right, and have two where it is not."""
        right = [axis for axis, size in self.example.items() if size > 1 and self._try_one(axis)]
        if len(right) > 1:
            self._try_one(*right)

    def try_beyond_bounds(self) -> None:
        """Drops doubtful bounds beyond which the graph is right."""
        self.conditions = [condition for condition in self.conditions if not self._is_needless(condition)]

    def _is_needless(self, condition: Condition) -> bool:
        size, tried = beyond(condition) or ("", ())
        places = self._places(self.example)
        axes = [self._axes[name][index] for name, index in places if f"{name}.shape[{index}]" == size]
        return bool(tried) and all(self._is_right(self.example | dict.fromkeys(axes, number)) for number in tried)

    def _is_right(self, sizes: Sizes) -> bool | None:
        """Whether the graph computes what the model does, None where the model takes no such inputs."""
        if not self.model_takes(sizes):
            return None
        try:
            self.compare(sizes)
        except MELoRAError:
            return False
        return True

    def _try_one(self, *axes: str) -> bool:
        sizes = self.example | dict.fromkeys(axes, 1)
        places = [f"{name}.shape[{index}]" for name, index in self._places(axes)]
        right = self._is_right(sizes)
        if right:
            shapes = {name: Shaped(tuple(tensor.shape)) for name, tensor in self._inputs(sizes).items()}
            self.conditions = with_single_entries(self.conditions, places, shapes)
        elif right is False and self.are_assumed(sizes):
            self.conditions.append(Condition(" or ".join(f"{place} > 1" for place in places)))
        return bool(right)

    def ranges(self) -> dict[str, AxisRange]:
        """The sizes of each dynamic axis for which the conditions hold."""
        return axis_ranges(self.conditions, self._axes, {name: value.shape for name, value in self._tensors.items()})

    def are_assumed(self, sizes: Sizes) -> bool:
        """Whether the conditions hold for these sizes."""
        return holds(self.conditions, {name: tensor.shape for name, tensor in self._inputs(sizes).items()})

    def model_takes(self, sizes: Sizes) -> bool:
        """Whether the model itself runs: with more tokens than it has positions, say, it does not."""
        try:
            self._torch_runner.run(self._inputs(sizes))
        except Exception:  # the model's own forward can raise anything
            return False
        return True

    def _compare(self, words: str, inputs: dict[str, torch.Tensor]) -> None:
        """With all adapters that the graph's form is to be tried with."""
        export = self._export
        precision = export.options.precision
        has_more = any(value.numel() > self._tensors[name].numel() for name, value in inputs.items())
        tolerance = precision.tolerance_of_more if has_more else precision.tolerance
        for adapter in export.adapter.trials(export.model, export.sites, self._facts):
            also = f"{words}, {adapter.name} adapter" if adapter.name else words
            with adapter.context:
                runner = self._runner.with_tensors(adapter.inputs())
                comparison = compare(runner, self._torch_runner, inputs, self._scales)
                read = partial(self._read, inputs)
                refuse_unequal(also, comparison, tolerance, export.model, precision, read, self._scales)
            self.comparisons[also] = comparison

    def _read(self, inputs: dict[str, torch.Tensor]) -> list[Arrays]:
        """What torch gives: one step."""
        return [self._torch_runner.run(inputs)]

    def _inputs(self, sizes: Sizes) -> dict[str, torch.Tensor]:
        """The example repeated or cut along its dynamic axes."""
        resized = dict(self._tensors)
        for name, index in self._places(sizes):
            tensor, size = resized[name], sizes[self._axes[name][index]]
            resized[name] = tensor.index_select(index, torch.arange(size) % tensor.size(index))
        return resized

    def _places(self, axes: Iterable[str]) -> list[tuple[str, int]]:
        """Input and index of each of these dynamic axes."""
        named = set(axes)
        return [
            (name, index) for name, shape in self._axes.items() for index, axis in enumerate(shape) if axis in named
        ]
