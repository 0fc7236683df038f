"""An adapter folded into an exported graph: the bits of a fresh export, and what must be refused."""

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from support.adapter_files import edit_tensors
from support.exports import Exports, bert_with_biases
from support.models import (
    TOWER_CONFIG,
    Tied,
    assert_equal,
    bert,
    fill,
    gpt2,
    randn,
    rewritten_tower,
    tokens,
    tower,
)
from support.onnx_files import data_of
from support.zoo import build
from torch import nn

import melora_fx
from exporters import OrtRunner, export_onnx, fold_onnx
from exporters.onnx_files.metadata import read_facts
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter_file import read_adapter

TOWER_INPUTS = {"x": randn(2, 24)}
CASES: dict[str, tuple[str, Any, Any, Any, MELoRAConfig]] = {
    "tower": ("tower", tower, TOWER_INPUTS, "all-linear", TOWER_CONFIG),
    "tower_ranks": ("tower", tower, TOWER_INPUTS, ["up", "conv"], MELoRAConfig(rank=(1, 4, 2), num_blocks=3)),
    "tower_split": ("tower", tower, TOWER_INPUTS, "up", MELoRAConfig(rank=2, num_blocks=2, split=(20, 16))),
    "bert": ("bare bert", lambda: bert(num_layers=1), tokens(), ["query", "key", "value", "dense"], TOWER_CONFIG),
    "gpt2": ("gpt2", lambda: gpt2(num_layers=1), tokens(), ["c_attn", "c_fc", "c_proj"], TOWER_CONFIG),
    "llama": ("llama", lambda: build("Llama")[0], tokens(), "all-linear", MELoRAConfig(rank=2, num_blocks=2)),
}
"""Maps a name to the export of the base, the model, inputs, targets and configuration."""


def base_and_adapter(case: str, exports: Exports, folder: Path, **options: Any) -> nn.Module:
    """Copies the base's export to base/, saves an adapter to adapter/, and returns the rewritten model."""
    name, make, _, targets, config = CASES[case]
    model = make()
    copy_export(exports, name, folder / "base", **options)
    fill(melora_fx.rewrite(model, targets, config))
    melora_fx.save_adapter(model, folder / "adapter")
    return model


def copy_export(exports: Exports, name: str, folder: Path, **options: Any) -> None:
    """Copies the files of an export that is made once."""
    report = exports(name, **options)
    folder.mkdir()
    for file in report.files:
        shutil.copy(Path(report.path).parent / file, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith(".export.json")}


PAIRS = [*((case, "portable") for case in CASES), ("bert", "ort-cpu"), ("gpt2", "ort-cpu"), ("llama", "ort-cuda")]


@pytest.mark.slow_cases(
    "tower_split-portable", "tower_ranks-portable", "bert-ort-cpu", "gpt2-portable", "llama-ort-cuda"
)
@pytest.mark.default_cases("tower-portable")
@pytest.mark.parametrize(("case", "target"), PAIRS)
def test_the_files_are_those_of_a_fresh_export_bit_for_bit(
    case: str, target: str, exports: Exports, tmp_path: Path
) -> None:
    """Also packed and transposed weights, and the graph itself with its description."""
    model = base_and_adapter(case, exports, tmp_path, target=target, precision="fp32")
    before = contents(tmp_path / "base")
    export_onnx(model, CASES[case][2], tmp_path / "fresh", target=target, precision="fp32")
    report = fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
    assert contents(tmp_path / "folded") == contents(tmp_path / "fresh")
    assert contents(tmp_path / "base") == before
    assert {site.name for site in report.sites} == set(melora_fx.sites(model))
    assert len(read_facts(tmp_path / "folded" / "model.onnx").weights) >= len(report.sites)


@pytest.mark.slow_cases("portable-bert", "ort-cpu-gpt2")
@pytest.mark.parametrize("case", ["bert", "gpt2"])
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_half_precision(case: str, target: str, exports: Exports, tmp_path: Path) -> None:
    """The sum uses the rounded base: exactly one more rounding than in a fresh export."""
    model = base_and_adapter(case, exports, tmp_path, target=target, precision="fp16")
    inputs = {name: value.numpy() for name, value in CASES[case][2].items()}
    export_onnx(model, CASES[case][2], tmp_path / "fresh", target=target, precision="fp16", verify=False)
    report = fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
    assert {site.dtype for site in report.sites} == {"float16"}
    outputs = [OrtRunner(tmp_path / name / "model.onnx").run(inputs) for name in ("base", "fresh", "folded")]
    for base, fresh, folded in zip(*(list(output.values()) for output in outputs), strict=True):
        np.testing.assert_allclose(folded, fresh, rtol=0.02, atol=0.02)
        assert np.abs(folded - fresh).max() < 0.1 * np.abs(base - fresh).max()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_a_trained_head_is_exchanged(target: str, exports: Exports, tmp_path: Path) -> None:
    model = bert_with_biases()
    inputs = tokens()
    base = Path(exports("bert with biases", target=target).path).parent
    fill(melora_fx.rewrite(model, ["query", "value"], TOWER_CONFIG, keep_trainable=["classifier", "pooler"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classifier" in name or "pooler" in name:
                parameter.add_(randn(*parameter.shape))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    export_onnx(model, inputs, tmp_path / "fresh", target=target, verify=False)
    fold_onnx(base, tmp_path / "adapter", tmp_path / "folded")
    data = [data_of(tmp_path / name / "model.onnx").read_bytes() for name in ("fresh", "folded")]
    feed = {name: value.numpy() for name, value in inputs.items()}
    outputs = [OrtRunner(tmp_path / name / "model.onnx").run(feed)["logits"] for name in ("fresh", "folded")]
    assert_equal(torch.from_numpy(outputs[1]), torch.from_numpy(outputs[0]))
    assert len(data[0]) == len(data[1])


@pytest.mark.slow
def test_a_head_that_the_graph_has_quantised(exports: Exports, tmp_path: Path) -> None:
    model = bert_with_biases()
    fill(melora_fx.rewrite(model, ["query"], TOWER_CONFIG, keep_trainable="classifier"))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    graph = onnx.load(exports("bert with biases", target="portable").path)
    (bias,) = (tensor for tensor in graph.graph.initializer if tensor.name == "classifier.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.ones(3, np.int8), bias.name))
    onnx.save(graph, tmp_path / "base.onnx")
    with pytest.raises(MELoRAError, match=r"`classifier\.bias`: the graph's weight is quantised"):
        fold_onnx(tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "out.onnx")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
def test_a_head_of_another_size_and_one_that_the_graph_lacks(exports: Exports, tmp_path: Path) -> None:
    model = bert_with_biases()
    model.classifier = nn.Linear(24, 7)
    fill(melora_fx.rewrite(model, ["query"], TOWER_CONFIG, keep_trainable="classifier"))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    with_head = exports("bert with biases", target="portable").path
    without = exports("bare bert", target="portable", precision="fp32").path
    with pytest.raises(
        MELoRAError, match=r"(?s)`classifier.bias`: saved as \(7,\).*`classifier.weight`: saved as \(7, 24\)"
    ):
        fold_onnx(with_head, tmp_path / "adapter", tmp_path / "out.onnx")
    with pytest.raises(MELoRAError, match="does not say where the weights"):
        fold_onnx(without, tmp_path / "adapter", tmp_path / "out.onnx")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
def test_a_value_that_the_exporter_stores_once_for_two_is_not_a_head_of_its_own(tmp_path: Path) -> None:
    """Two biases of zeros are one initializer of the graph."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(24, 24)
            self.down = nn.Linear(24, 24)
            nn.init.zeros_(self.up.bias)
            nn.init.zeros_(self.down.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.down(torch.tanh(self.up(x))))

    for head, site in (("up", "down"), ("down", "up")):
        torch.manual_seed(0)
        model = Twins()
        export_onnx(model, {"x": randn(2, 24)}, tmp_path / "base.onnx", verify=False)
        fill(melora_fx.rewrite(model, site, TOWER_CONFIG, keep_trainable=head))
        with torch.no_grad():
            model.get_submodule(head).bias.fill_(1.0)
        melora_fx.save_adapter(model, tmp_path / "adapter")
        export_onnx(model, {"x": randn(2, 24)}, tmp_path / "fresh.onnx", verify=False)
        try:
            fold_onnx(tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "folded.onnx")
        except MELoRAError as error:
            assert f"`{head}.bias`: the graph has no such weight" in str(error)  # noqa: PT017
            continue
        x = {"x": randn(2, 24).numpy()}
        outputs = [OrtRunner(tmp_path / f"{name}.onnx").run(x)["output"] for name in ("fresh", "folded")]
        np.testing.assert_array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize("adapter", ["fold", "keep", "swap"])
def test_graphs_that_hold_an_adapter_or_inputs_for_one(adapter: str, exports: Exports, tmp_path: Path) -> None:
    melora_fx.save_adapter(rewritten_tower(), tmp_path / "adapter")
    text = "already contains an adapter" if adapter == "fold" else f"not a graph of only the base (`{adapter}`)"
    with pytest.raises(MELoRAError, match=re.escape(text)):
        fold_onnx(exports("adapted tower", adapter=adapter).path, tmp_path / "adapter", tmp_path / "out.onnx")


def test_a_second_adapter_on_a_folded_graph_and_the_base_in_its_own_place(exports: Exports, tmp_path: Path) -> None:
    base_and_adapter("tower", exports, tmp_path)
    fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
    folded = contents(tmp_path / "folded")
    facts = read_facts(tmp_path / "folded" / "model.onnx")
    assert (facts.adapter, facts.adapter_sha256) == ("fold", read_adapter(tmp_path / "adapter").sha256)
    with pytest.raises(MELoRAError, match=f"already contains an adapter .*{facts.adapter_sha256[:12]}"):
        fold_onnx(tmp_path / "folded", tmp_path / "adapter", tmp_path / "twice")
    base = contents(tmp_path / "base")
    with pytest.raises(MELoRAError, match=r"model\.onnx` belongs to the base's graph, which a fold keeps"):
        fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "base" / "model.onnx")
    assert contents(tmp_path / "base") == base
    assert contents(tmp_path / "folded") == folded
    assert not (tmp_path / "twice").exists()


def test_a_base_that_was_renamed_keeps_its_weights(exports: Exports, tmp_path: Path) -> None:
    """Their files still have its old name, which the folded graph gets."""
    base_and_adapter("tower", exports, tmp_path)
    folder = tmp_path / "base"
    before = contents(folder)
    (folder / "model.onnx").rename(folder / "moved.onnx")
    fold_onnx(folder / "moved.onnx", tmp_path / "adapter", folder)
    fold_onnx(folder / "moved.onnx", tmp_path / "adapter", tmp_path / "folded")
    expected = before | {"moved.onnx": before["model.onnx"]} | contents(tmp_path / "folded")
    assert contents(folder) == expected


@pytest.mark.slow
def test_another_base_another_model_and_values_that_are_not_finite(exports: Exports, tmp_path: Path) -> None:
    base_and_adapter("tower", exports, tmp_path)
    export_onnx(tower(seed=5), {"x": randn(2, 24)}, tmp_path / "other", verify=False)
    bert_graph = exports("bare bert", target="portable", precision="fp32").path
    with pytest.raises(MELoRAError, match="trained on another base model"):
        fold_onnx(tmp_path / "other", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(MELoRAError, match="does not say where the weights"):
        fold_onnx(bert_graph, tmp_path / "adapter", tmp_path / "out")
    edit_tensors(tmp_path / "adapter", lambda tensors: tensors["gate.lora_b"][0, 0].fill_(float("nan")))
    with pytest.raises(MELoRAError, match=r"holds NaN or infinity in 'gate\.lora_b'"):
        fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*lose more than")
def test_a_sum_beyond_half_precision_leaves_the_earlier_graph(exports: Exports, tmp_path: Path) -> None:
    model = base_and_adapter("tower", exports, tmp_path, target="portable", precision="fp16")
    with torch.no_grad():
        melora_fx.adapter_parameters(model)["gate.lora_b"].fill_(1e6)
        melora_fx.adapter_parameters(model)["gate.lora_a"].fill_(1.0)
    melora_fx.save_adapter(model, tmp_path / "large")
    (tmp_path / "out.onnx").write_text("earlier")
    with pytest.raises(MELoRAError, match="`gate`: the sum of weight and update is beyond the range of float16"):
        fold_onnx(tmp_path / "base", tmp_path / "large", tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_text() == "earlier"
    assert {file.name for file in tmp_path.iterdir()} == {"base", "adapter", "large", "out.onnx"}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_tied_weights_are_refused(target: str, exports: Exports, tmp_path: Path) -> None:
    graph = exports("gpt2", target=target).path
    model = fill(melora_fx.rewrite(gpt2(num_layers=1), ["lm_head"], TOWER_CONFIG))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(MELoRAError, match=r"(?s)they belong to another model, are tied.*`lm_head`"):
        fold_onnx(graph, tmp_path / "adapter", tmp_path / "out.onnx")


def test_a_weight_of_two_modules_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    export_onnx(model, {"x": randn(2, 24)}, tmp_path / "base.onnx", verify=False)
    fill(melora_fx.rewrite(model, "a", TOWER_CONFIG))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(MELoRAError, match=r"(?s)are tied.*`a`"):
        fold_onnx(tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "out.onnx")


@pytest.mark.slow
def test_equal_weights_of_two_modules_are_told_apart_or_refused(tmp_path: Path) -> None:
    """The exporter may store equal weights only once."""
    model = tower()
    with torch.no_grad():
        model.gate.weight.copy_(model.up.weight)
    export_onnx(model, {"x": randn(2, 24)}, tmp_path / "base.onnx", verify=False)
    fill(melora_fx.rewrite(model, "gate", TOWER_CONFIG))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    export_onnx(model, {"x": randn(2, 24)}, tmp_path / "fresh.onnx", verify=False)
    try:
        fold_onnx(tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "folded.onnx")
    except MELoRAError as error:
        assert "does not say where" in str(error)  # noqa: PT017
        return
    x = {"x": randn(2, 24).numpy()}
    outputs = [OrtRunner(tmp_path / f"{name}.onnx").run(x)["output"] for name in ("fresh", "folded")]
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_an_integer_weight_is_refused(exports: Exports, tmp_path: Path) -> None:
    base_and_adapter("tower", exports, tmp_path)
    path = tmp_path / "base" / "model.onnx"
    graph = onnx.load(path)
    weight = next(tensor for tensor in graph.graph.initializer if "gate" in tensor.name)
    values = onnx.numpy_helper.to_array(weight).astype(np.int8)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, path)
    with pytest.raises(MELoRAError, match=r"(?s)quantised, fold before quantising:\n`gate`: INT8"):
        fold_onnx(path, tmp_path / "adapter", tmp_path / "out.onnx")
    assert weight.data_type == TensorProto.INT8


def test_weights_inside_of_the_graph_file(exports: Exports, tmp_path: Path) -> None:
    """A graph that other tools have saved again may have no external data."""
    base_and_adapter("tower", exports, tmp_path)
    fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
    (tmp_path / "one").mkdir()
    onnx.save(onnx.load(tmp_path / "base" / "model.onnx"), tmp_path / "one" / "model.onnx")
    fold_onnx(tmp_path / "one", tmp_path / "adapter", tmp_path / "one-folded")
    x = {"x": randn(2, 24).numpy()}
    outputs = [OrtRunner(tmp_path / name / "model.onnx").run(x)["output"] for name in ("folded", "one-folded")]
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_configuration_and_tokenizer_go_along_and_other_files_stay(exports: Exports, tmp_path: Path) -> None:
    base_and_adapter("bert", exports, tmp_path, target="portable", precision="fp32")
    (tmp_path / "base" / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    data = data_of(tmp_path / "out" / "model.onnx").name
    assert names == {"model.onnx", data, "config.json", "vocab.txt", "mine.txt"}


def test_an_adapter_shared_module_called_twice(tmp_path: Path) -> None:
    """One weight that the graph uses in two places is still one site."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    torch.manual_seed(0)
    model = Twice()
    x = {"x": randn(2, 24)}
    export_onnx(model, x, tmp_path / "base.onnx", verify=False)
    fill(melora_fx.rewrite(model, "layer", TOWER_CONFIG))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    fold_onnx(tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "folded.onnx")
    expected = melora_fx.fold(copy.deepcopy(model))(x["x"]).detach()
    output = OrtRunner(tmp_path / "folded.onnx").run({"x": x["x"].numpy()})["output"]
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-5, atol=1e-5)


def test_weights_that_are_missing_or_cut_short(exports: Exports, tmp_path: Path) -> None:
    base_and_adapter("tower", exports, tmp_path)
    data = data_of(tmp_path / "base" / "model.onnx")
    shutil.copy(data, tmp_path / "whole")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(MELoRAError, match="cut short"):
        fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    data.unlink()
    with pytest.raises(MELoRAError, match="does not exist"):
        fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(MELoRAError, match="is not an adapter folder"):
        fold_onnx(tmp_path / "base", tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fold_into_one_of_two_tensors_in_one_place_of_the_file_leaves_the_other(
    exports: Exports, tmp_path: Path
) -> None:
    """As written by tools that store equal values once."""
    copy_export(exports, "tower", tmp_path / "base")
    path = tmp_path / "base" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    weight, other = (
        next(tensor for tensor in graph.graph.initializer if name in tensor.name) for name in ("gate", "up")
    )
    del other.external_data[:]
    other.external_data.extend(weight.external_data)
    path.write_bytes(graph.SerializeToString())
    model = fill(melora_fx.rewrite(tower(), "gate", TOWER_CONFIG))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    fold_onnx(path, tmp_path / "adapter", tmp_path / "out.onnx")
    before, after = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer}
        for file in (path, tmp_path / "out.onnx")
    )
    folded = melora_fx.fold(model).get_submodule("gate").weight.detach().numpy()
    np.testing.assert_array_equal(after[weight.name], folded)
    del before[weight.name]
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_linked_weights_are_read_and_not_written(link: str, exports: Exports, tmp_path: Path) -> None:
    """As in a Hugging Face cache; onnx_ir itself refuses both kinds of links."""
    base_and_adapter("tower", exports, tmp_path)
    fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "expected")
    data = data_of(tmp_path / "base" / "model.onnx")
    before = data.read_bytes()
    data.rename(tmp_path / "elsewhere")
    getattr(data, link)(tmp_path / "elsewhere")
    fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
    assert contents(tmp_path / "folded") == contents(tmp_path / "expected")
    assert (tmp_path / "elsewhere").read_bytes() == before
    assert not data_of(tmp_path / "folded" / "model.onnx").is_symlink()


def test_a_nodes_constant_in_another_file_is_read_into_the_graph(exports: Exports, tmp_path: Path) -> None:
    base_and_adapter("tower", exports, tmp_path)
    path = tmp_path / "base" / "model.onnx"
    graph = onnx.load(path)
    value = onnx.numpy_helper.from_array(np.arange(3, dtype=np.float32), "three")
    graph.graph.node.append(onnx.helper.make_node("Constant", [], ["three"], value=value))
    onnx.save(graph, path, save_as_external_data=True, location="all", size_threshold=0, convert_attribute=True)
    fold_onnx(path, tmp_path / "adapter", tmp_path / "out.onnx")
    assert {file.name for file in tmp_path.glob("out*")} == {"out.onnx", data_of(tmp_path / "out.onnx").name}
    node = onnx.load(tmp_path / "out.onnx").graph.node[-1]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(node.attribute[0].t), [0, 1, 2])
