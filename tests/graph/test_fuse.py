"""ONNX Runtime's fused operators; every weight is found again after the fusions."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.exports import CONFIG, MODELS, Exports
from support.models import bert_classifier, fill, gpt2, randn, tokens
from torch import nn
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

import melora_fx
from exporters import ExportReport, OrtRunner, compare, export_onnx
from exporters.graph.build import build_graph, count_ops
from exporters.onnx_files.metadata import read_facts
from exporters.targets import TARGETS, find


@pytest.mark.default_cases("ort-cpu")
@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
@pytest.mark.slow
def test_the_merged_graph_has_the_base_graphs_operators(target: str, exports: Exports) -> None:
    """For a CPU the graph is written as its sessions compute it, without these operators (tests/spelling)."""
    base = exports("bert", target=target, precision="fp32")
    merged = exports("adapted bert", target=target, precision="fp32")
    assert merged.op_counts == base.op_counts
    fused = {"SkipLayerNormalization", "BiasGelu", "MultiHeadAttention"}
    assert fused & merged.op_counts.keys() == (fused if target == "ort-cuda" else set())
    assert_weights_where_it_says(merged, MODELS["adapted bert"][0]())


def assert_weights_where_it_says(report: ExportReport, model: nn.Module) -> None:
    weights = weights_where_it_says(report)
    with melora_fx.folded(model):
        expected = {n: p.detach().numpy() for n, p in model.named_parameters() if p.dim() == 2 and "lora" not in n}
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, expected[name])


def weights_where_it_says(report: ExportReport) -> dict[str, np.ndarray]:
    """Returns the values at each place that the file names for a weight, in the model's orientation."""
    graph = onnx.load(report.path).graph
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    weights = {}
    for name, place in read_facts(report.path).weights.items():
        value = stored[place.initializer]
        value = value[:, slice(*place.columns)] if place.columns else value
        weights[name] = value.T if place.is_transposed else value
    return weights


@pytest.mark.slow
def test_the_fusions_are_those_of_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stand-ins for the weights, with other types and values, change no fusion, and no pass logs a problem."""
    model = bert_classifier(num_layers=1)
    report = export_onnx(model, tokens(), tmp_path, target="ort-cuda", precision="fp32", verify=False)
    assert not caplog.records
    graph_model = build_graph(model, tokens()).graph_model
    fuse_for_onnxruntime(graph_model, find("target", "ort-cuda", TARGETS).fusions)
    assert report.op_counts == count_ops(graph_model)


@pytest.mark.slow
def test_packed_weights_are_named_after_what_they_hold(exports: Exports) -> None:
    report = exports("adapted bert", target="ort-cuda", precision="fp32")
    place = read_facts(report.path).weights["bert.encoder.layer.0.attention.self.key.weight"]
    assert place.initializer == "bert.encoder.layer.0.attention.self.{query,key,value}.weight.T"
    assert place.columns == (24, 48)


class Gated(nn.Module):
    """An MLP: gate and up share an input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(24, 48, bias=False) for _ in range(2))
        self.down = nn.Linear(48, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["fold", "swap"])
def test_two_products_of_an_input_stay_apart(adapter: str, tmp_path: Path) -> None:
    model = fill(melora_fx.rewrite(Gated(), "all-linear", CONFIG))
    report = export_onnx(model.eval(), {"x": randn(2, 5, 24)}, tmp_path, target="ort-cpu", adapter=adapter)
    assert "Split" not in report.op_counts
    assert {place.columns for place in read_facts(report.path).weights.values()} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
def test_an_addmm_after_an_attention_gets_rows(target: str, tmp_path: Path) -> None:
    """torch's exporter flattens an attention's output at once in a whole-graph capture of GPT-2."""
    inputs = {"input_ids": tokens()["input_ids"]}
    model = fill(melora_fx.rewrite(gpt2(num_layers=1), ["c_attn", "c_fc"], CONFIG, example_inputs=inputs))
    report = export_onnx(model, inputs, tmp_path, target=target, precision="fp32")
    assert ("SkipLayerNormalization" in report.op_counts) == (target == "ort-cuda")
    assert len(report.compared) >= 5


class Siblings(torch.nn.Module):
    """Three products of one input, packed side by side by the fusions, and a fourth of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (torch.nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x) * self.second(x) + self.third(x)))


@pytest.mark.default_cases("equal-ort-cpu")
@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
@pytest.mark.parametrize("alike", ["none", "transposed", "equal"])
def test_weights_of_one_shape_keep_their_names(target: str, alike: str, tmp_path: Path) -> None:
    model = Siblings().eval()
    with torch.no_grad():
        if alike != "none":
            model.second.weight.copy_(model.first.weight.t() if alike == "transposed" else model.first.weight)
    report = export_onnx(model, {"x": randn(2, 5, 24)}, tmp_path, target=target, precision="fp32")
    places = read_facts(report.path).weights
    left_out = {"first.weight", "second.weight"} if alike == "equal" else set()
    assert places.keys() == {f"{name}.weight" for name, _ in model.named_children()} - left_out
    assert any(place.columns for place in places.values()) == (target == "ort-cuda" and alike != "equal")
    for name, weight in weights_where_it_says(report).items():
        np.testing.assert_array_equal(weight, model.get_parameter(name).detach().numpy())


@pytest.mark.slow
def test_swappable_adapters_survive_the_fusions(exports: Exports, tmp_path: Path) -> None:
    """Equal to `keep` with the model's own adapter, and bit for bit equal to the base's graph without one."""
    report = exports("adapted gpt2", adapter="swap", target="ort-cpu")
    assert report.num_adapter_inputs == 4
    assert sum("random adapter" in words for words in report.compared) >= 3
    melora_fx.save_adapter(MODELS["adapted gpt2"][0](), tmp_path / "adapter")
    swap = OrtRunner(report.path)
    base = OrtRunner(exports("gpt2", target="ort-cpu").path)
    keep = OrtRunner(exports("adapted gpt2", adapter="keep", target="ort-cpu").path)
    np.testing.assert_array_equal(swap.run(tokens())["logits"], base.run(tokens())["logits"])
    with_adapter = swap.run(tokens(), adapter=tmp_path / "adapter")["logits"]
    assert np.abs(with_adapter - keep.run(tokens())["logits"]).max() <= 1e-5 * np.abs(with_adapter).max()
    assert compare(swap, keep, tokens()).max_rel_error > 1e-2


@pytest.mark.slow
def test_the_description_is_json_with_the_target(exports: Exports) -> None:
    report = exports("adapted bert", target="ort-cuda", precision="fp16", adapter="fold")
    graph = onnx.load(report.path, load_external_data=False)
    facts = json.loads(next(entry.value for entry in graph.metadata_props if entry.key == "melora"))
    assert (facts["target"], facts["precision"]) == ("ort-cuda", "fp16")
