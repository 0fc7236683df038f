"""What a case of the second table in docs/CAPTURES.md says, and whether it holds."""

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import melora_fx
from exporters import OrtRunner, export_onnx
from melora_fx import MELoRAConfig, MELoRAError
from support.hand_written.checks import write_updates
from support.models import assert_unchanged, fill, randn

CONFIG = MELoRAConfig(rank=2, num_blocks=3, alpha=5.0)
AT_REWRITE = "refused by `rewrite`"
Inputs = tuple[Any, ...] | dict[str, Any]
"""Arguments by position, or by name."""


@dataclass(frozen=True)
class WholeCase:
    """A model, the example that it is captured with, and calls of another kind.

    Attributes:
        what: the row of the table, in plain English.
        build: makes the model; two calls give equal models.
        example: what it is captured with.
        right: call in words → its inputs, which the capture computes as the model does.
        refused: call in words → its inputs and what the refusal says, a regular expression.
        at_rewrite: what `rewrite` says where the capture itself is refused.
        warns: what `rewrite` warns of.
        dynamic_axes: as in `rewrite`.
        exported: the ONNX file of the model is right and refused at the same calls.
        capture_alone: only the capture needs the refusals; the file's operators would give the right result too.
    """

    id: str
    area: str
    what: str
    build: Callable[[], nn.Module]
    example: Inputs
    right: Mapping[str, Inputs] = field(default_factory=dict)
    refused: Mapping[str, tuple[Inputs, str]] = field(default_factory=dict)
    at_rewrite: str = ""
    warns: str = ""
    dynamic_axes: Any = "auto"
    exported: bool = False
    capture_alone: bool = False

    @property
    def result(self) -> str:
        """The last cell of the row."""
        if self.at_rewrite:
            return AT_REWRITE
        parts = [f"right: {', '.join(['like the example', *self.right])}"]
        parts += [f"refused: {', '.join(self.refused)}"] if self.refused else []
        parts += ["`rewrite` warns"] if self.warns else []
        return "; ".join(parts)


CASES: dict[str, WholeCase] = {}
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def whole(area: str, what: str, example: Inputs, **options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Puts the class below it into CASES; its name is the case's id."""

    def add(model_class: type[nn.Module]) -> type[nn.Module]:
        name = _WORDS.sub("-", model_class.__name__).lower()
        assert name not in CASES, name
        CASES[name] = WholeCase(name, area, what, model_class, example, **options)
        return model_class

    return add


def check(case: WholeCase) -> str:
    """The row's last cell, if all holds that the case says: at B = 0, with filled adapters, and after `fold`.

    Raises:
        AssertionError: it does not.
    """
    plain, model = _made(case), _made(case)
    example = copy.deepcopy(case.example)
    rewrite = partial(
        melora_fx.rewrite, model, "all-linear", CONFIG, example_inputs=example, dynamic_axes=case.dynamic_axes
    )
    if case.at_rewrite:
        with assert_unchanged(model), pytest.raises(MELoRAError, match=case.at_rewrite):
            rewrite()
        return case.result
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = rewrite()
    _assert_equal(example, case.example)
    told = [str(warning.message) for warning in caught]
    assert bool(case.warns) == any(re.search(case.warns or "changes|keeps", text) for text in told), told
    _check_calls(case, model, plain)
    oracle = _made(case)
    write_updates(fill(model), oracle)
    _check_calls(case, model, oracle)
    _check_calls(case, melora_fx.fold(model), oracle)
    return case.result


def _check_calls(case: WholeCase, model: nn.Module, oracle: nn.Module) -> None:
    buffers = dict(model.named_buffers())
    for name, buffer in oracle.named_buffers():
        buffer.copy_(buffers[name])
    for inputs in (case.example, *case.right.values()):
        _assert_near(_called(model, inputs), _called(oracle, inputs))
    for inputs, text in case.refused.values():
        with pytest.raises((MELoRAError, TypeError), match=text):
            _called(model, inputs)


def check_onnx(case: WholeCase, folder: Path) -> None:
    """`OrtRunner` computes what the model does, or refuses; where it refuses, plain ONNX Runtime would be wrong
    (unless `capture_alone` says otherwise).

    Raises:
        AssertionError: for anything else.
    """
    model = _made(case)
    report = export_onnx(model, copy.deepcopy(case.example), folder, dynamic_axes=case.dynamic_axes)
    runner = OrtRunner(report.path)
    for inputs in (case.example, *case.right.values()):
        named = _named(model, inputs)
        got = runner.run(named)
        _assert_near([torch.from_numpy(value) for value in got.values()], _called(model, inputs))
    session = onnxruntime.InferenceSession(report.path)
    for words, (inputs, text) in case.refused.items():
        named = _named(model, inputs)
        with pytest.raises(MELoRAError, match=text):
            runner.run(named)
        is_right = _is_right(session, named, model, inputs)
        assert is_right == case.capture_alone, f"{words}: refused; without the check {'right' if is_right else 'wrong'}"
    assert report.ranges
    assert runner.describe()["assumed"] == list(report.assumed)


def _is_right(session: Any, named: dict[str, torch.Tensor], model: nn.Module, inputs: Inputs) -> bool:
    try:
        got = session.run(None, {name: value.numpy() for name, value in named.items()})
        _assert_near([torch.from_numpy(np.asarray(value)) for value in got], _called(model, inputs))
    except Exception:  # ONNX Runtime's own, or the model's
        return False
    return True


def _named(model: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    names = list(model.forward.__code__.co_varnames[1:])
    given = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=False))
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


def _made(case: WholeCase) -> nn.Module:
    torch.manual_seed(0)
    return case.build().eval()


def _called(model: nn.Module, inputs: Inputs) -> list[Any]:
    """The leaves of what comes out, of copies of the inputs."""
    inputs = copy.deepcopy(inputs)
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return pytree.tree_leaves(output)


def _assert_near(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _assert_equal(actual: Any, expected: Any) -> None:
    """The same leaves, bit for bit."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    assert all(torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want for got, want in pairs)


def x(*shape: int, seed: int = 1) -> torch.Tensor:
    return randn(*shape, seed=seed)


class Child(nn.Module):
    """Has one nn.Linear, 24 → 36."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 36)
