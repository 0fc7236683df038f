"""The class of a case in docs/CAPTURES.md's table of whole captures, and its checks."""

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
    """A model, the example that it is captured with, and other calls.

    Attributes:
        what: the case's text in the table, in plain English.
        build: builds the model; two calls return equal models.
        example: the inputs that it is captured with.
        right: call in words → its inputs; the capture computes what the model computes.
        refused: call in words → its inputs, and a regular expression that the text of the refusal must match.
        at_rewrite: a regular expression for the error of `rewrite`, if the capture itself is refused.
        warns: a regular expression for the warning of `rewrite`.
        dynamic_axes: as in `rewrite`.
        exported: the model's ONNX file is correct, and refused, for the same calls.
        capture_alone: only the capture needs the refusals; the file's operators would compute the correct result too.
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
        parts = [f"correct: {', '.join(['like the example', *self.right])}"]
        parts += [f"refused: {', '.join(self.refused)}"] if self.refused else []
        parts += ["`rewrite` warns"] if self.warns else []
        return "; ".join(parts)


CASES: dict[str, WholeCase] = {}
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def whole(area: str, what: str, example: Inputs, **options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Returns a decorator that registers a model class in CASES; its name becomes the case's id."""

    def add(model_class: type[nn.Module]) -> type[nn.Module]:
        name = _WORDS.sub("-", model_class.__name__).lower()
        assert name not in CASES, name
        CASES[name] = WholeCase(name, area, what, model_class, example, **options)
        return model_class

    return add


def check(case: WholeCase) -> str:
    """Checks a case at B = 0, with filled adapters and after `fold`, and returns the last cell of its row.

    Raises:
        AssertionError: if the model does not do what the case says.
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
    """Checks that `OrtRunner` computes what the model computes, or refuses. If it refuses, plain ONNX Runtime must fail
    or be incorrect, unless `capture_alone` is set.

    Raises:
        AssertionError: in all other cases.
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
    except Exception:  # from ONNX Runtime or from the model
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
    """Calls the model with copies of the inputs and returns the leaves of its output."""
    inputs = copy.deepcopy(inputs)
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return pytree.tree_leaves(output)


def _assert_near(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _assert_equal(actual: Any, expected: Any) -> None:
    """Checks that the leaves are the same, bit for bit."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    assert all(torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want for got, want in pairs)


def x(*shape: int, seed: int = 1) -> torch.Tensor:
    return randn(*shape, seed=seed)


class Child(nn.Module):
    """Has one nn.Linear, 24 → 36."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 36)
