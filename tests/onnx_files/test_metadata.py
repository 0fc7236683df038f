"""Reading the description in an exported file."""

from pathlib import Path

import onnx
import pytest
from onnx import helper
from support.exports import Exports
from support.models import TOWER_CONFIG, TOWER_SITES

from exporters.onnx_files.metadata import METADATA_KEY, read_facts
from exporters.onnx_files.weight_place import WeightPlace
from melora_fx import MELoRAError


def test_facts_come_back_as_objects(exports: Exports) -> None:
    facts = read_facts(exports("adapted tower", adapter="fold").path)
    assert facts.adapter == "fold"
    assert facts.configs == dict.fromkeys(TOWER_SITES, TOWER_CONFIG)
    assert facts.fingerprints["up"]["shape"] == [36, 24]
    assert facts.weights["up.weight"] == WeightPlace("up.weight", False)
    assert facts.kept == {}


def test_files_without_a_description(tmp_path: Path) -> None:
    graph = helper.make_graph([], "empty", [], [])
    onnx.save(helper.make_model(graph), tmp_path / "other.onnx")
    with pytest.raises(MELoRAError, match="was not written by `export_onnx`"):
        read_facts(tmp_path / "other.onnx")
    with pytest.raises(MELoRAError, match="cannot be read as an ONNX graph"):
        read_facts(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x01\xff")
    with pytest.raises(MELoRAError, match="cannot be read as an ONNX graph"):
        read_facts(tmp_path / "broken.onnx")


def test_files_of_a_later_version(tmp_path: Path) -> None:
    model = helper.make_model(helper.make_graph([], "empty", [], []))
    helper.set_model_props(model, {METADATA_KEY: '{"format_version": 99}'})
    onnx.save(model, tmp_path / "later.onnx")
    with pytest.raises(MELoRAError, match="has format_version 99"):
        read_facts(tmp_path / "later.onnx")


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "sites": []}'])
def test_a_broken_description(text: str, tmp_path: Path) -> None:
    model = helper.make_model(helper.make_graph([], "empty", [], []))
    helper.set_model_props(model, {METADATA_KEY: text})
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(MELoRAError, match=r"broken\.onnx`: its `melora` entry cannot be read"):
        read_facts(tmp_path / "broken.onnx")
