"""Checks the names of a graph's inputs, and that their sizes are within what it was exported and loaded for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from exporters.onnx_files.cache_names import MASK, PAST_AXIS, TOTAL_AXIS
from melora_fx import MELoRAError
from melora_fx.whole_capture.conditions import Condition, Shaped

from .providers import Shapes


class InputCheck(NamedTuple):
    """The rules for the inputs of a graph.

    Attributes:
        path: the graph's file, for error texts.
        axes: input → its axes, each a size or the name of a dynamic axis.
        ranges: dynamic axis → (min, opt, max), as requested for the session.
        conditions: what the export assumed about sizes. With other sizes ONNX Runtime computes something else than the
            model.
    """

    path: Path
    axes: Mapping[str, Sequence[int | str]]
    ranges: Shapes
    conditions: Sequence[Condition]

    def refuse(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises MELoRAError if the names or shapes of the inputs break a rule."""
        missing = [name for name in self.axes if name not in shapes]
        unknown = [name for name in shapes if name not in self.axes]
        if missing or unknown:
            raise MELoRAError(f"`{self.path}` needs the inputs {[*self.axes]}: missing {missing}, unknown {unknown}")
        if lines := [*self._outside_of_ranges(shapes), *self._against_conditions(shapes), *self._wrong_masks(shapes)]:
            raise MELoRAError(f"`{self.path}`: " + "; ".join(lines))

    def _outside_of_ranges(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        lines = []
        for name, shape in shapes.items() if self.ranges else ():
            for axis, size in zip(self.axes[name], shape, strict=False):
                smallest, _, largest = self.ranges.get(str(axis), (size, size, size))
                if not smallest <= size <= largest:
                    lines.append(f"`{axis}` of {name} is {size}, `shapes` says {smallest} to {largest}")
        return lines

    def _wrong_masks(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Returns an error if a mask does not cover a decoder's cached and new tokens: results would be incorrect."""
        sizes: dict[int | str, int] = {}
        for name, axes in self.axes.items():
            sizes |= dict(zip(axes, shapes[name], strict=False))
        past, new, total = (sizes.get(axis) for axis in (PAST_AXIS, "sequence", TOTAL_AXIS))
        if past is None or new is None or total is None or total == past + new:
            return []
        return [f"`{MASK}` has {total} columns: the cache has {past} tokens, and {new} are new"]

    def _against_conditions(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        if any(len(shape) != len(self.axes[name]) for name, shape in shapes.items()):
            return []  # ONNX Runtime reports that
        inputs = {name: Shaped(tuple(shape)) for name, shape in shapes.items()}
        return [
            f"the export assumed that {condition.text}, and "
            + " and ".join(f"`{name}` has shape {inputs[name].shape}" for name in condition.names)
            + ": export again with `example_inputs` of such sizes, and with `verify=True`, which tries one entry too"
            for condition in self.conditions
            if not condition.holds(inputs)
        ]
