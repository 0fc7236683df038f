"""Compares the outputs of two runners."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from exporters.runtime.torch_runner import Runner
from melora_fx import MELoRAError


@dataclass(frozen=True)
class Comparison:
    """The errors of `runner_a` against `runner_b`.

    Attributes:
        max_abs_errors: output → max |a - b|.
        max_rel_errors: output → max |a - b| divided by max |b| or by the scale of the output, whichever is larger.
    """

    max_abs_errors: dict[str, float]
    max_rel_errors: dict[str, float]

    @property
    def max_abs_error(self) -> float:
        """The largest absolute error over all outputs."""
        return max(self.max_abs_errors.values())

    @property
    def max_rel_error(self) -> float:
        """The largest relative error over all outputs."""
        return max(self.max_rel_errors.values())

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: max abs error {error:.1e}, relative {self.max_rel_errors[name]:.1e}"
            for name, error in self.max_abs_errors.items()
        )


def compare(
    runner_a: Runner, runner_b: Runner, inputs: Mapping[str, Any], scales: Mapping[str, float] = MappingProxyType({})
) -> Comparison:
    """Runs both runners on the same inputs and compares every output.

    A value that is finite in only one of the two outputs counts as an infinite error.

    Args:
        runner_a: the runner whose outputs are judged.
        runner_b: the runner to compare with; errors are relative to its outputs.
        inputs: arrays or tensors by name, as for `Runner.run`.
        scales: output → least value that its error is divided by, because a few values may all be small by chance.

    Raises:
        MELoRAError: if the outputs have different names or shapes.
    """
    return compare_arrays(runner_a.run(inputs), runner_b.run(inputs), scales)


def compare_arrays(
    outputs_a: Mapping[str, np.ndarray],
    outputs_b: Mapping[str, np.ndarray],
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Comparison:
    """Compares outputs that are already computed, as `compare` does."""
    if outputs_a.keys() != outputs_b.keys():
        raise MELoRAError(f"the outputs have different names: {[*outputs_a]} and {[*outputs_b]}")
    abs_errors = {}
    rel_errors = {}
    for name, expected in outputs_b.items():
        if outputs_a[name].shape != expected.shape:
            raise MELoRAError(f"output `{name}` has the shapes {outputs_a[name].shape} and {expected.shape}")
        abs_errors[name], rel_errors[name] = _errors(outputs_a[name], expected, scales.get(name, 0.0))
    return Comparison(abs_errors, rel_errors)


def compare_steps_of(
    steps_a: Sequence[Mapping[str, np.ndarray]],
    steps_b: Sequence[Mapping[str, np.ndarray]],
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Comparison:
    """Returns the largest errors over all steps, relative to the largest value of an output so far, as in `compare`."""
    found = []
    for outputs_a, outputs_b in zip(steps_a, steps_b, strict=True):
        scales = {name: max(scales.get(name, 0.0), largest(value)) for name, value in outputs_b.items()}
        found.append(compare_arrays(outputs_a, outputs_b, scales))
    names = found[0].max_abs_errors
    return Comparison(
        {name: max(each.max_abs_errors[name] for each in found) for name in names},
        {name: max(each.max_rel_errors[name] for each in found) for name in names},
    )


def largest(values: np.ndarray) -> float:
    """Returns the largest |value| of the finite values; 0 if there are none."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _errors(actual: np.ndarray, expected: np.ndarray, least_scale: float) -> tuple[float, float]:
    """Returns the (absolute, relative) error. The relative one is divided by the largest finite |expected| or by
    `least_scale`, whichever is larger, unless both are zero.
    """
    actual = actual.astype(np.float64)
    expected = expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        difference = np.where(same, 0.0, np.abs(actual - expected))
    error = float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))
    scale = max(largest(expected), least_scale)
    return error, error / scale if scale else error
