"""Lists what `match` says of a parameter in each operand of torch's operators that multiply matrices.

`python -m support.operator_database` prints a JSON list of cases. It runs in its own process, because importing torch's
database of operators disables the setters of `torch.backends`.

An operator multiplies matrices if one of its samples calls one of KERNELS, or if it is one of SOLVERS, whose kernels
multiply without a visible dispatch. An operand counts if two of its sides are longer than 1 and it is not only added.
"""

import contextlib
import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import melora_fx
from melora_fx import MELoRAConfig
from support.models import randn

KERNELS = {
    *("mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv", "dot", "vdot", "_trilinear", "convolution", "linear"),
    *("_scaled_dot_product_flash_attention_for_cpu", "_cdist_forward", "_grouped_mm"),
}
"""ATen operators that multiply matrices."""

SOLVERS = {
    *("matrix_exp", "linalg.inv", "linalg.pinv", "linalg.solve", "linalg.lstsq", "linalg.solve_triangular"),
    *(
        "linalg.lu_solve",
        "linalg.householder_product",
        "cholesky_solve",
        "lu_solve",
        "triangular_solve",
        "ormqr",
        "kron",
    ),
}

NO_FACTORS = {
    *(("addmm", 0), ("addmv", 0), ("addbmm", 0), ("baddbmm", 0)),
    *(("nn.functional.scaled_dot_product_attention", 3), ("nn.functional.linear_cross_entropy", 2)),
}
"""Operators and positions of operands that are added, or multiplied element by element."""

CONFIG = MELoRAConfig(rank=1, num_blocks=1)
_MOST_SAMPLES = 40


class Kernels(TorchDispatchMode):
    """Records the ATen operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class Operator(nn.Module):
    """Calls `operator` with a parameter, `w`, in place of one operand; the other tensors are inputs."""

    def __init__(self, operator: Any, operands: list[Any], options: dict[str, Any], position: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.w = nn.Parameter(item_at(operands, position).detach().clone())
        self.operator = operator
        self.operands = operands
        self.options = options
        self.position = position

    def forward(self, h: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, torch.Tensor]:
        numbers = itertools.count()
        operands = [self._filled(value, (index,), tensors, numbers) for index, value in enumerate(self.operands)]
        return self.operator(*operands, **self.options), self.linear(h)

    def _filled(self, value: Any, position: tuple[int, ...], tensors: Any, numbers: Iterator[int]) -> Any:
        if position == self.position:
            return self.w
        if isinstance(value, torch.Tensor):
            return tensors[next(numbers)]
        if isinstance(value, list | tuple):
            return type(value)([self._filled(v, (*position, i), tensors, numbers) for i, v in enumerate(value)])
        return value


def item_at(operands: Any, position: tuple[int, ...]) -> Any:
    for index in position:
        operands = operands[index]
    return operands


def tensors_in(operands: Any, position: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Yields the tensors in nested lists of operands, with their positions."""
    for index, value in enumerate(operands):
        if isinstance(value, torch.Tensor):
            yield (*position, index), value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value, (*position, index))


def multiplies(entry: Any, samples: list[Any]) -> bool:
    """Returns whether the operator is one of SOLVERS or a sample calls one of KERNELS."""
    if entry.name in SOLVERS:
        return True
    for sample in samples:
        with Kernels() as kernels, contextlib.suppress(Exception):
            entry(sample.input, *sample.args, **sample.kwargs)
        if kernels.names & KERNELS:
            return True
    return False


def cases() -> Iterator[dict[str, Any]]:
    """Yields a case for each factor of each operator that multiplies, in each capture; one if it has no factor."""
    from torch.testing._internal.common_methods_invocations import op_db

    for entry in op_db:
        if torch.float32 not in entry.supported_dtypes("cpu"):
            continue
        samples = list(itertools.islice(entry.sample_inputs("cpu", torch.float32), _MOST_SAMPLES))
        if multiplies(entry, samples):
            yield from _cases_of(entry, samples) or [{"operator": entry.name, "operand": None}]


def _cases_of(entry: Any, samples: list[Any]) -> list[dict[str, Any]]:
    """Returns the cases of each operand in the first sample that can be exported; only in place if none can."""
    done: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for sample in samples:
        operands = [sample.input, *sample.args]
        for position, tensor in tensors_in(operands):
            is_matrix = tensor.is_floating_point() and sum(size > 1 for size in tensor.shape) > 1
            is_done = len(done.get(position, ())) == 2
            if is_matrix and not is_done and (entry.name, position[0]) not in NO_FACTORS:
                found = said(entry, operands, sample.kwargs, position)
                done[position] = max(found, done.get(position, []), key=len)
    return [case for found in done.values() for case in found]


def said(entry: Any, operands: list[Any], options: dict[str, Any], position: tuple[int, ...]) -> list[dict[str, Any]]:
    """Returns what `match` says in place, and of a whole capture if the sample can be exported."""
    h = randn(2, 2)
    others = tuple(tensor.detach() for where, tensor in tensors_in(operands) if where != position)
    model = Operator(entry.op, operands, options, position)
    found = []
    whole: dict[str, Any] = {"example_inputs": (h, others), "dynamic_axes": {}}
    for capture, options_of_match in (("in_place", {}), ("whole", whole)):
        try:
            report = melora_fx.match(model, "all-linear", CONFIG, **options_of_match)
        except Exception:
            assert capture == "whole"
            continue
        named = [site.name for site in (*report.sites, *report.untargeted)]
        reason = "a site" if "w" in named else dict(report.skipped).get("w", "")
        found.append({"operator": entry.name, "operand": list(position), "capture": capture, "said": reason})
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    json.dump(list(cases()), sys.stdout, indent=1)
