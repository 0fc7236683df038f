"""Checks that an exported file is valid, and that ONNX Runtime computes with it what torch computes."""

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
    """The result of the comparisons with torch.

    Attributes:
        compared: the comparisons, in words.
        max_abs_error, max_rel_error: the largest errors of all comparisons.
        conditions: the conditions on the inputs' sizes, corrected by trials. The export may exclude sizes for which the
            graph is correct, such as one entry along an axis, and allow sizes for which it is not.
    """

    compared: tuple[str, ...]
    max_abs_error: float
    max_rel_error: float
    conditions: tuple[Condition, ...]


def check_file(path: Path) -> None:
    """Checks a file with `onnx.checker` and strict shape inference. Skips graphs with operators that ONNX Runtime adds
    to the standard domain: the checker does not know them.

    Raises:
        MELoRAError: if the checker refuses the file.
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

    Compares the example; one entry along each dynamic axis, and along all axes for which one entry is correct; sizes
    beyond doubtful bounds; the sizes of `trial_sizes.py`; and padding. Each comparison runs with all trial adapters of
    the graph's adapter form. A decoder with a cache is compared step by step instead (`compare_steps`).

    Raises:
        MELoRAError: if an error is above the precision's tolerance and above what rounding explains, or if ONNX
            Runtime cannot run the file. If a trial with one entry along an axis, or beyond a doubtful bound, fails,
            the graph's conditions exclude its sizes instead.
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
        conditions: the conditions on the inputs' sizes that are known so far.
        comparisons: the sizes compared, in words → the errors.
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
        """Compares inputs of these sizes; raises MELoRAError if an error is above the tolerance."""
        self._compare(in_words(sizes), self._inputs(sizes))

    def compare_padding(self) -> None:
        """Compares with half of the first sequence padded, if the model accepts a mask of tokens."""
        mask = self._tensors.get("attention_mask")
        if mask is not None and mask.dim() == 2 and mask.size(1) > 1:
            padded = mask.clone()
            padded[0, mask.size(1) // 2 :] = 0
            self._compare("padding", {**self._tensors, "attention_mask": padded})

    def try_single_entries(self) -> None:
        """Allows one entry along axes for which the graph is correct with it, and requires more along the others."""
        right = [axis for axis, size in self.example.items() if size > 1 and self._try_one(axis)]
        if len(right) > 1:
            self._try_one(*right)

    def try_beyond_bounds(self) -> None:
        """Drops doubtful bounds if the graph is correct beyond them."""
        self.conditions = [condition for condition in self.conditions if not self._is_needless(condition)]

    def _is_needless(self, condition: Condition) -> bool:
        size, tried = beyond(condition) or ("", ())
        places = self._places(self.example)
        axes = [self._axes[name][index] for name, index in places if f"{name}.shape[{index}]" == size]
        return bool(tried) and all(self._is_right(self.example | dict.fromkeys(axes, number)) for number in tried)

    def _is_right(self, sizes: Sizes) -> bool | None:
        """Returns whether the graph computes what the model does; None if the model cannot run at these sizes."""
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
        """Returns the range of sizes of each dynamic axis for which the conditions are true."""
        return axis_ranges(self.conditions, self._axes, {name: value.shape for name, value in self._tensors.items()})

    def are_assumed(self, sizes: Sizes) -> bool:
        """Returns whether the conditions are true for these sizes."""
        return holds(self.conditions, {name: tensor.shape for name, tensor in self._inputs(sizes).items()})

    def model_takes(self, sizes: Sizes) -> bool:
        """Returns whether the model itself runs at these sizes. With more tokens than positions it does not."""
        try:
            self._torch_runner.run(self._inputs(sizes))
        except Exception:  # the model's own forward can raise anything
            return False
        return True

    def _compare(self, words: str, inputs: dict[str, torch.Tensor]) -> None:
        """Compares with all trial adapters of the graph's adapter form."""
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
        """Returns torch's outputs, as the only step."""
        return [self._torch_runner.run(inputs)]

    def _inputs(self, sizes: Sizes) -> dict[str, torch.Tensor]:
        """Returns the example, repeated or cut to these sizes along its dynamic axes."""
        resized = dict(self._tensors)
        for name, index in self._places(sizes):
            tensor, size = resized[name], sizes[self._axes[name][index]]
            resized[name] = tensor.index_select(index, torch.arange(size) % tensor.size(index))
        return resized

    def _places(self, axes: Iterable[str]) -> list[tuple[str, int]]:
        """Returns each place of these dynamic axes: the input's name and the index of the axis."""
        named = set(axes)
        return [
            (name, index) for name, shape in self._axes.items() for index, axis in enumerate(shape) if axis in named
        ]
