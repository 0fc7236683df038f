"""The tables of names that `export_onnx` accepts."""

from typing import Any

import pytest

from exporters.runtime.providers import PROVIDERS
from exporters.targets import ADAPTERS, FORMS, NO_ADAPTER, PRECISIONS, TARGETS, find, in_words

TABLES = {"target": TARGETS, "precision": PRECISIONS, "adapter": (*ADAPTERS, NO_ADAPTER), "form": FORMS}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_names_are_unique_and_found(table: tuple[Any, ...]) -> None:
    assert [find("option", entry.name, table) for entry in table] == [*table]
    assert len({entry.name for entry in table}) == len(table)
    assert all(f'"{entry.name}": {entry.about}' in in_words(table) for entry in table)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_target_names_what_there_is(target: Any) -> None:
    assert target.provider in PROVIDERS
    assert find("precision", "auto", PRECISIONS, auto=target.precision).name == target.precision


@pytest.mark.parametrize("name", ["tpu", "auto", None, ["portable"]], ids=str)
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"`target` .* must be one of 'portable', 'ort-cpu', 'ort-cuda', 'tensorrt'"):
        find("target", name, TARGETS)
