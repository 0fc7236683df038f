"""Measures how much of an error rounding explains: how far a model's outputs move with the last bits of its weights.

Some inputs are ill-conditioned: on one text a model can amplify a rounding error far more than on another. On such
inputs a correct runtime that sums in another order differs from torch as much as a reordered torch would.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import nn

from exporters.graph.export import Precision
from exporters.measuring.compare import Comparison, compare_steps_of
from exporters.onnx_runtime import Arrays
from melora_fx import MELoRAError

_FACTOR = 8
"""The margin over the measured change: a graph also rounds between the weights, and its errors are not random."""
_DRAWS = 3
_MOST = 10
"""The most that rounding may explain, in tolerances, because a last bit can change which experts a model selects."""


def refuse_unequal(
    words: str,
    comparison: Comparison,
    tolerance: float,
    model: nn.Module,
    precision: Precision,
    run: Callable[[], Sequence[Arrays]],
    scales: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Raises MELoRAError if an error is above the tolerance and rounding does not explain it.

    `words` says what was compared. The other arguments are those of `rounding_allowance`, which is measured only if it
    can change the decision.
    """
    error = comparison.max_rel_error
    if error <= tolerance:
        return
    if error <= _MOST * precision.tolerance_of_more and error <= rounding_allowance(model, precision, run, scales):
        return
    raise MELoRAError(f"the ONNX graph is not equal to torch at {words}: {comparison}")


def rounding_allowance(
    model: nn.Module,
    precision: Precision,
    run: Callable[[], Sequence[Arrays]],
    scales: Mapping[str, float] = MappingProxyType({}),
) -> float:
    """Returns the relative error that rounding explains in the outputs of `run`, which computes them with `model`.

    Args:
        model: its float32 parameters change by the precision's epsilon, at random, and are restored afterwards.
        precision: the precision of the graph.
        run: returns the outputs of each step.
        scales: as in `compare`, and the same as for the error that is to be explained.
    """
    before = run()
    found = 0.0
    for draw in range(_DRAWS):
        with _changed_weights(model, precision.epsilon, seed=draw):
            found = max(found, compare_steps_of(run(), before, scales).max_rel_error)
    return min(_FACTOR * found, _MOST * precision.tolerance_of_more)


@contextmanager
def _changed_weights(model: nn.Module, epsilon: float, seed: int) -> Iterator[None]:
    """Multiplies each float32 parameter by 1 ± epsilon, with a random sign per value."""
    parameters = [parameter for parameter in model.parameters() if parameter.dtype == torch.float32]
    before = [parameter.data for parameter in parameters]
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter in parameters:
            signs = (
                torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.int8).to(parameter.device) * 2 - 1
            )
            parameter.data = parameter.data * (1 + epsilon * signs)
        yield
    finally:
        for parameter, values in zip(parameters, before, strict=True):
            parameter.data = values
