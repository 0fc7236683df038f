"""Public docstrings say what users have to know: every argument, and every error."""

import dataclasses
import inspect
from typing import Any

import pytest

import exporters
import melora_fx

PUBLIC = {name: getattr(package, name) for package in (melora_fx, exporters) for name in package.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
RECORDS = {name: value for name, value in PUBLIC.items() if dataclasses.is_dataclass(value)}
RAISE_NOTHING = ("adapter_parameters",)


def _section(value: Any, title: str) -> str:
    """Returns the text of a section of a docstring, without its indentation; empty if there is none."""
    text = inspect.getdoc(value) or ""
    lines = iter(text.partition(f"\n{title}:\n")[2].splitlines())
    taken = []
    for line in lines:
        if line and not line.startswith(" "):
            break
        taken.append(line.removeprefix("    "))
    return "\n".join(taken)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described(name: str) -> None:
    described = _section(FUNCTIONS[name], "Args")
    missing = [each for each in inspect.signature(FUNCTIONS[name]).parameters if f"\n{each}: " not in f"\n{described}"]
    assert not missing


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in RAISE_NOTHING])
def test_errors_are_described(name: str) -> None:
    assert "Error: " in _section(FUNCTIONS[name], "Raises")


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_is_described(name: str) -> None:
    described = _section(RECORDS[name], "Attributes") or _section(RECORDS[name], "Args")
    fields = [field.name for field in dataclasses.fields(RECORDS[name]) if field.init]
    assert [field for field in fields if f"\n{field}: " not in f"\n{described}"] == []
