"""Makes inputs for a graph from the names, types and axes of its inputs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from exporters.onnx_files.cache_names import PAST_AXIS, TOTAL_AXIS, has_cache
from exporters.onnx_runtime import Arrays
from exporters.private import is_nameless_axis
from melora_fx import MELoRAError

from .ort_runner import OrtRunner

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_TOKEN_IDS = (3, 32)
"""(first, end): ids that every vocabulary has, above those that usually mean padding."""


def axis_roles(runner: OrtRunner) -> frozenset[str]:
    """Returns which of "batch" and "sequence" the graph's inputs leave free."""
    roles = {_role(axis, index) for value in runner.session.get_inputs() for index, axis in enumerate(value.shape)}
    return frozenset(role for role in roles if role)


def make_inputs(
    runner: OrtRunner, batch: int, sequence: int, axes: Mapping[str, int] | None = None, *, seed: int = 0
) -> Arrays:
    """Returns arrays for every input of the graph: token ids, masks of ones, positions in order, normal floats.

    Args:
        runner: the runner of the graph.
        batch, sequence: sizes of the axes whose names contain "batch" and "seq"; a free axis without a name counts as
            batch if it is the first, as sequence if it is the second.
        axes: sizes of further axes by name, which override the rule above. A decoder's cache is empty, unless
            `past_sequence` is its number of tokens.
        seed: seed of the random values.

    Raises:
        ValueError: if no input has an axis of `axes`.
        MELoRAError: if the size of an axis does not follow from these, or no values can be made for an input's type.
    """
    sizes = dict(axes or {})
    if has_cache(runner.input_names):
        sizes.setdefault(PAST_AXIS, 0)
        sizes |= dict.fromkeys(_free_axes(runner) & {TOTAL_AXIS}, sizes[PAST_AXIS] + sequence)
    shapes = _input_shapes(runner, {"batch": batch, "sequence": sequence}, sizes)
    generator = np.random.default_rng(seed)
    return {
        value.name: _values(runner, value, shapes[value.name], generator, first=sizes.get(PAST_AXIS, 0))
        for value in runner.session.get_inputs()
    }


def _input_shapes(
    runner: OrtRunner, size_by_role: Mapping[str, int], size_by_name: Mapping[str, int]
) -> dict[str, list[int]]:
    """Returns the shape of each input; its free axes are sized by name, or else by role."""
    inputs = runner.session.get_inputs()
    free = _free_axes(runner)
    if strangers := [f"`{name}`" for name in size_by_name if name not in free]:
        raise ValueError(f"no input of `{runner.path}` has an axis {', '.join(strangers)}: {', '.join(sorted(free))}")
    shapes: dict[str, list[int]] = {value.name: [] for value in inputs}
    unknown = []
    for value in inputs:
        for index, axis in enumerate(value.shape):
            by_role = size_by_role.get(_role(axis, index) or "", -1)
            size = axis if isinstance(axis, int) else size_by_name.get(axis or "", by_role)
            if size < 0:
                unknown.append(f"`{axis}` of `{value.name}`")
            shapes[value.name].append(size)
    if unknown:
        raise MELoRAError(
            f"`{runner.path}` has axes that are neither batch nor sequence: {', '.join(unknown)}: "
            "pass their sizes (`--axis NAME=SIZE`)"
        )
    return shapes


def _free_axes(runner: OrtRunner) -> set[str]:
    return {axis for value in runner.session.get_inputs() for axis in value.shape if isinstance(axis, str)}


def _role(axis: str | int | None, index: int) -> str | None:
    """Returns "batch" or "sequence", or None if the axis is fixed or has another meaning."""
    if isinstance(axis, int):
        return None
    if axis is None or is_nameless_axis(axis):
        return ("batch", "sequence")[index] if index < 2 else None
    if not axis.isidentifier():  # an expression of other axes
        return None
    if "batch" in axis.lower():
        return "batch"
    return "sequence" if "seq" in axis.lower() else None


def _values(
    runner: OrtRunner, value: Any, shape: list[int], generator: np.random.Generator, *, first: int
) -> np.ndarray:
    """Returns the values of one input; `first` is the position of the first new token."""
    name, kind = value.name, value.type
    if kind in _FLOATS:
        return generator.standard_normal(shape).astype(_FLOATS[kind])
    if kind == "tensor(bool)":
        return np.ones(shape, bool)
    if kind not in _INTEGERS:
        known = ", ".join([*_FLOATS, *_INTEGERS, "tensor(bool)"])
        raise MELoRAError(f"`{name}` of `{runner.path}` is a {kind}: inputs can only be made of {known}")
    dtype = _INTEGERS[kind]
    if "mask" in name:
        return np.ones(shape, dtype)
    if "type_ids" in name:
        return np.zeros(shape, dtype)
    if "position" in name:
        return np.broadcast_to(first + np.arange(shape[-1] if shape else 1, dtype=dtype), shape).copy()
    return generator.integers(*_TOKEN_IDS, size=shape, dtype=dtype)
