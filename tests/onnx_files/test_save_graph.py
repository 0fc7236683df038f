"""Graphs that know what their weights must be."""

import json
import shutil
from pathlib import Path

import onnx
import pytest
from support.exports import Exports
from support.models import adapted_kept_tower, randn

import melora_fx
from exporters import OrtRunner, fold_onnx
from exporters.onnx_files.onnx_file import read_graph
from exporters.onnx_files.save_graph import WEIGHTS_KEY, check_weights, known_digests
from melora_fx import MELoRAError


@pytest.fixture
def graph(exports: Exports, tmp_path: Path) -> Path:
    """A graph that a test may change."""
    source = Path(exports("kept tower").path)
    shutil.copytree(source.parent, tmp_path / "graph")
    return tmp_path / "graph" / source.name


def data_file(graph: Path) -> Path:
    (found,) = graph.parent.glob("*.data")
    return found


def test_each_weight_has_its_hash(graph: Path) -> None:
    model = read_graph(graph)
    digests = known_digests(model)
    assert digests.keys() == model.graph.initializers.keys()
    assert {"up.weight", "norm.bias"} <= digests.keys()
    assert all(len(digest) == 64 for digest in digests.values())


def test_a_changed_weight_is_named(graph: Path) -> None:
    OrtRunner(graph, verify=True)
    tensor = read_graph(graph).graph.initializers["gate.weight"].const_value
    with data_file(graph).open("r+b") as file:
        file.seek(tensor.offset + 5)
        file.write(b"\x01")
    OrtRunner(graph)
    with pytest.raises(MELoRAError, match=r"have changed since they were written: 'gate\.weight'; copy or export"):
        OrtRunner(graph, verify=True)


def test_a_changed_weight_in_the_graph_itself_is_named(graph: Path) -> None:
    model = onnx.load(graph, load_external_data=False)
    (bias,) = [value for value in model.graph.initializer if value.name == "norm.bias"]
    bias.raw_data = bias.raw_data[:-1] + b"\x01"
    onnx.save(model, graph)
    with pytest.raises(MELoRAError, match=r"'norm\.bias'"):
        OrtRunner(graph, verify=True)


def test_a_folded_graph_has_the_hashes_of_its_own_weights(graph: Path, tmp_path: Path) -> None:
    melora_fx.save_adapter(adapted_kept_tower(), tmp_path / "adapter")
    fold_onnx(graph, tmp_path / "adapter", tmp_path / "folded.onnx")
    before, after = (known_digests(read_graph(path)) for path in (graph, tmp_path / "folded.onnx"))
    changed = {name for name in before if before[name] != after[name]}
    assert {"up.weight", "gate.weight", "norm.bias"} <= changed
    assert "own.projection" in {name.removesuffix(".T") for name in before.keys() - changed}
    runner = OrtRunner(tmp_path / "folded.onnx", verify=True)
    assert runner.run({"x": randn(2, 24)}).keys() == {"output"}


@pytest.mark.parametrize("text", [None, "{}", "[]", "no JSON", '{"up.weight": 3}'])
def test_graphs_that_do_not_say_are_refused(text: str | None, graph: Path) -> None:
    model = onnx.load(graph, load_external_data=False)
    for index, entry in enumerate(model.metadata_props):
        if entry.key == WEIGHTS_KEY:
            if text is None:
                del model.metadata_props[index]
            else:
                entry.value = text
    onnx.save(model, graph)
    OrtRunner(graph)
    with pytest.raises(MELoRAError, match="contains no hashes of its weights"):
        OrtRunner(graph, verify=True)


def test_a_weight_that_the_graph_does_not_know_is_named(graph: Path) -> None:
    model = read_graph(graph)
    digests = known_digests(model)
    del digests["up.weight"]
    model.metadata_props[WEIGHTS_KEY] = json.dumps(digests)
    with pytest.raises(MELoRAError, match=r"'up\.weight'"):
        check_weights(graph, model)
