"""How much of an error is rounding: what the outputs of a model make of a change in the last bits of its weights.

Some inputs are ill-conditioned: a model can make many times as much of a rounding error in one text as in another, and
another runtime's sums are then as far from torch's as torch's own would be in another order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from exporters.graph.export import Precision
from exporters.measuring.compare import Comparison, compare_arrays, largest
from exporters.onnx_runtime import Arrays
from melora_fx import MELoRAError

_FACTOR = 8
"""A graph rounds at more places than a model has weights, and not at random."""
_DRAWS = 3
_MOST = 10
"""How many times the tolerance rounding may explain: a model that chooses among experts can make anything of it."""


def refuse_unequal(
    words: str,
    comparison: Comparison,
    tolerance: float,
    model: nn.Module,
    precision: Precision,
    run: Callable[[], Sequence[Arrays]],
) -> None:
    """Raises MELoRAError for an error above the tolerance that rounding does not explain.

    `words`: what was compared; the others are those of `rounding_allowance`, which is measured only where it matters.
    """
    error = comparison.max_rel_error
    if error <= tolerance:
        return
    if error <= _MOST * precision.tolerance_of_more and error <= rounding_allowance(model, precision, run):
        return
    raise MELoRAError(f"the ONNX graph is not equal to torch at {words}: {comparison}")


def rounding_allowance(model: nn.Module, precision: Precision, run: Callable[[], Sequence[Arrays]]) -> float:
    """The relative error that rounding explains in the outputs of `run`, which computes them with `model`.

    Args:
        model: its float32 parameters change by the precision's epsilon, at random, and are as before afterwards.
        precision: the graph's.
        run: gives the outputs of each step.
    """
    before = run()
    found = 0.0
    for draw in range(_DRAWS):
        with _changed_weights(model, precision.epsilon, seed=draw):
            found = max(found, compare_steps_of(run(), before).max_rel_error)
    return min(_FACTOR * found, _MOST * precision.tolerance_of_more)


def compare_steps_of(steps_a: Sequence[Arrays], steps_b: Sequence[Arrays]) -> Comparison:
    """The worst errors over all steps, relative to the largest value of an output so far."""
    scales: dict[str, float] = {}
    found = []
    for outputs_a, outputs_b in zip(steps_a, steps_b, strict=True):
        scales = {name: max(scales.get(name, 0.0), largest(value)) for name, value in outputs_b.items()}
        found.append(compare_arrays(outputs_a, outputs_b, scales))
    names = found[0].max_abs_errors
    return Comparison(
        {name: max(each.max_abs_errors[name] for each in found) for name in names},
        {name: max(each.max_rel_errors[name] for each in found) for name in names},
    )


@contextmanager
def _changed_weights(model: nn.Module, epsilon: float, seed: int) -> Iterator[None]:
    """Every floating parameter of the model times 1 ± epsilon, with a sign of its own for each value."""
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
