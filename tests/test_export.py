"""`export_onnx`: structure, numbers against torch, files, and what is left behind when it fails."""

import contextlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from support.exports import CONFIG, Exports, adapted_bert
from support.models import (
    TOWER_SITES,
    assert_unchanged,
    bert_classifier,
    fill,
    gpt2,
    randn,
    rewritten_tower,
    tokens,
    tower,
)
from support.onnx_files import data_of
from torch import nn

import melora_fx
from exporters import ExportReport, OrtRunner, TorchRunner, compare, export_onnx
from exporters import export as export_module
from exporters import verify as verify_module
from exporters.graph import passes as passes_module
from melora_fx import MELoRAError
from melora_fx.rewriting import sites as sites_module
from melora_fx.rewriting.sites import is_disabled, make_site
from melora_fx.saving.adapter_file import read_adapter


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return adapted_bert()


@pytest.fixture
def base_report(exports: Exports) -> ExportReport:
    return exports("bert")


@pytest.fixture
def merged_report(exports: Exports) -> ExportReport:
    return exports("adapted bert", adapter="fold")


@pytest.fixture
def unmerged_report(exports: Exports) -> ExportReport:
    return exports("adapted bert", adapter="keep")


def test_the_merged_graph_has_the_base_graphs_nodes(base_report: ExportReport, merged_report: ExportReport) -> None:
    assert merged_report.op_counts == base_report.op_counts
    assert (base_report.adapter, merged_report.adapter) == ("none", "fold")


def test_the_unmerged_graph_has_two_products_more_a_site(
    base_report: ExportReport, unmerged_report: ExportReport, model: nn.Module
) -> None:
    more = unmerged_report.op_counts["MatMul"] - base_report.op_counts["MatMul"]
    assert more == 2 * len(melora_fx.sites(model))


@pytest.mark.parametrize("adapter", ["merged", "unmerged"])
@pytest.mark.parametrize("shape", [(1, 5), (3, 9), (7, 2)], ids=str)
def test_both_equal_torch_at_other_shapes(
    adapter: str,
    shape: tuple[int, int],
    model: nn.Module,
    merged_report: ExportReport,
    unmerged_report: ExportReport,
) -> None:
    report = {"merged": merged_report, "unmerged": unmerged_report}[adapter]
    comparison = compare(OrtRunner(report.path), TorchRunner(model), tokens(*shape))
    assert comparison.max_rel_error <= 1e-5


def test_the_merged_graph_is_not_the_base(model: nn.Module, merged_report: ExportReport) -> None:
    with melora_fx.disabled(model):
        assert compare(OrtRunner(merged_report.path), TorchRunner(model), tokens()).max_abs_error > 1e-2


def test_the_report_says_what_the_file_is(merged_report: ExportReport) -> None:
    graph = onnx.load(merged_report.path, load_external_data=False)
    folder = Path(merged_report.path).parent
    assert merged_report.num_nodes == len(graph.graph.node) == sum(merged_report.op_counts.values())
    assert merged_report.opset == next(entry.version for entry in graph.opset_import if not entry.domain)
    assert merged_report.inputs == {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
    assert merged_report.outputs == {"logits": ("batch", 3)}
    sizes = {"batch=2 sequence=5", "batch=1 sequence=5", "batch=2 sequence=1", "batch=2 sequence=20"}
    assert sizes | {"padding"} <= set(merged_report.compared)
    assert 0 < merged_report.max_abs_error <= 1e-4
    data = data_of(folder / "model.onnx").name
    assert set(merged_report.files) == {"model.onnx", data, "model.export.json", "config.json"}
    assert all((folder / name).is_file() for name in merged_report.files)
    saved = json.loads((folder / "model.export.json").read_text())
    assert saved["op_counts"] == merged_report.op_counts
    assert "no tokenizer files" in str(merged_report)


def test_weights_are_in_the_data_file(merged_report: ExportReport) -> None:
    graph = onnx.load(merged_report.path, load_external_data=False).graph
    external = [item for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]
    data = data_of(Path(merged_report.path))
    assert {entry.value for item in external for entry in item.external_data if entry.key == "location"} == {data.name}
    assert sum(int(np.prod(item.dims)) for item in external) > 1000


@pytest.mark.slow
def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    target = tmp_path / "target"
    model = bert_classifier(num_layers=1)
    model.save_pretrained(source)
    (source / "vocab.txt").write_text("[PAD]\n")
    loaded = type(model).from_pretrained(source)
    report = export_onnx(loaded, tokens(), target, verify=False)
    assert (target / "vocab.txt").read_text() == "[PAD]\n"
    assert report.notes == ()
    assert report.path == str(target / "model.onnx")
    assert report.max_abs_error is None


@pytest.mark.slow
def test_a_causal_lm_without_a_cache(tmp_path: Path) -> None:
    model = fill(melora_fx.rewrite(gpt2(num_layers=1), ["c_attn", "c_fc"], CONFIG))
    report = export_onnx(model, {"input_ids": tokens()["input_ids"]}, tmp_path, adapter="keep", use_cache=False)
    assert list(report.inputs) == ["input_ids"]
    assert list(report.outputs) == ["logits"]
    assert model.config.use_cache


@pytest.mark.default_cases("in_place-fold")
@pytest.mark.parametrize("adapter", ["fold", "keep"])
@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_any_other_module(tmp_path: Path, adapter: str, whole: bool) -> None:
    options = {"example_inputs": (randn(2, 5, 24),)} if whole else {}
    model = rewritten_tower(**options)
    with assert_unchanged(model):
        report = export_onnx(model, (randn(1, 5, 24),), tmp_path / "tower.onnx", adapter=adapter)
    assert report.inputs == {"x": ("batch", "sequence", 24)}
    assert report.outputs == {"output": ("batch", "sequence", 6)}
    inputs = {"x": randn(4, 3, 24)}
    assert compare(OrtRunner(tmp_path / "tower.onnx"), TorchRunner(model), inputs).max_rel_error <= 1e-5


def test_training_mode_is_kept_and_dropout_not_exported(tmp_path: Path) -> None:
    model = tower(dropout=0.5).train()
    report = export_onnx(model, (randn(2, 24),), tmp_path)
    assert all(module.training for module in model.modules())
    assert "Dropout" not in report.op_counts


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"adapter": "merge"}, "`adapter` (='merge')"),
        ({"target": "tpu"}, "`target` (='tpu')"),
        ({"precision": "int8"}, "`precision` (='int8')"),
        ({"form": "loop"}, "`form` (='loop')"),
    ],
    ids=["adapter", "target", "precision", "form"],
)
def test_unknown_options_name_the_known_ones(tmp_path: Path, options: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match="must be one of") as caught:
        export_onnx(tower(), (randn(2, 24),), tmp_path, **options)
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_swap_is_refused_inside_disabled(tmp_path: Path, model: nn.Module) -> None:
    with (
        melora_fx.disabled(model),
        assert_unchanged(model),
        pytest.raises(MELoRAError, match=r'`adapter="swap"` .*`disabled`.*: export outside of the block'),
    ):
        export_onnx(model, tokens(), tmp_path / "new", adapter="swap")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["fold", "keep"])
def test_inside_disabled_the_others_export_the_base(
    adapter: str, model: nn.Module, tmp_path: Path, base_report: ExportReport
) -> None:
    with melora_fx.disabled(model):
        report = export_onnx(model, tokens(), tmp_path, adapter=adapter, verify=False)
    assert (report.adapter, report.op_counts) == ("none", base_report.op_counts)
    weights = [data_of(Path(each.path)).read_bytes() for each in (report, base_report)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["fold", "keep", "swap"])
def test_an_export_looks_for_the_sites_once(adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`folded` looks for them itself."""
    model = rewritten_tower()
    seen = Counter[str]()

    def counted(path: str, module: Any, record: Any) -> melora_fx.AdapterSite:
        site = make_site(path, module, record)
        seen[site.name] += 1
        return site

    monkeypatch.setattr(sites_module, "make_site", counted)
    export_onnx(model, (randn(2, 24),), tmp_path, adapter=adapter, verify=False)
    assert seen == dict.fromkeys(TOWER_SITES, 2 if adapter == "fold" else 1)


def test_a_model_that_cannot_be_exported_leaves_nothing(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(MELoRAError, match="`Branching` cannot be exported"):
        export_onnx(Branching(), (randn(2, 24),), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def nothing_is_near_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = tuple(precision._replace(tolerance=0.0, tolerance_of_more=0.0) for precision in export_module.PRECISIONS)
    monkeypatch.setattr(export_module, "PRECISIONS", exact)


@pytest.mark.usefixtures("nothing_is_near_enough")
def test_a_graph_unlike_torch_is_refused_and_kept_for_inspection(tmp_path: Path) -> None:
    model = rewritten_tower()
    for _ in range(2):
        with (
            pytest.raises(MELoRAError, match=r"not equal to torch[^$]*left in .*model\.failed"),
            assert_unchanged(model),
        ):
            export_onnx(model, (randn(2, 24),), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.failed"]
    OrtRunner(tmp_path / "model.failed" / "model.onnx").run({"x": randn(2, 24)})


@pytest.mark.usefixtures("nothing_is_near_enough")
def test_a_failed_export_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(MELoRAError):
        export_onnx(tower(), (randn(2, 24),), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.failed", "model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"


@pytest.mark.default_cases("fuse-swap")
@pytest.mark.parametrize("adapter", ["fold", "swap"])
@pytest.mark.parametrize("step", ["fuse", "save", "compare"])
def test_an_interrupted_export_leaves_the_model_and_the_old_file(
    step: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C arrives while the fold state, the adapters or the modes are changed."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model = rewritten_tower().train()
    model.norm.eval()
    (tmp_path / "model.onnx").write_text("old")
    module, name, value = {
        "fuse": (passes_module, "PASSES", (*passes_module.PASSES[:5], interrupt)),
        "save": (onnx_ir, "to_proto", interrupt),
        "compare": (verify_module, "compare", interrupt),
    }[step]
    monkeypatch.setattr(module, name, value)
    with pytest.raises(KeyboardInterrupt), assert_unchanged(model):
        export_onnx(model, (randn(2, 24),), tmp_path, adapter=adapter)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.default_cases("1")
@pytest.mark.parametrize("forward", range(4))
def test_an_interrupted_forward_leaves_the_model(forward: int, tmp_path: Path) -> None:
    """The forwards of the example, the exporter and the comparison (adapters off, the model's own, and random)."""
    calls = iter(range(100))

    def interrupt(*_: Any) -> None:
        if next(calls) == forward:
            raise KeyboardInterrupt

    model = rewritten_tower()
    model.norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), assert_unchanged(model):
        export_onnx(model, (randn(2, 24),), tmp_path, adapter="swap")
    assert not is_disabled(model)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MELoRAError, match="cannot be written"):
        export_onnx(tower(), (randn(2, 24),), tmp_path / "file" / "model.onnx")


def test_without_onnx_runtime_verification_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MELoRAError, match=r"melora_fx\[cpu\]"):
        export_onnx(tower(), (randn(2, 24),), tmp_path)
    assert not os.listdir(tmp_path)
    assert export_onnx(tower(), (randn(2, 24),), tmp_path, verify=False).compared == ()


def metadata_of(path: Path) -> dict[str, Any]:
    entries = onnx.load(path, load_external_data=False).metadata_props
    return json.loads(next(entry.value for entry in entries if entry.key == "melora"))


def test_the_file_says_what_it_is(
    model: nn.Module, base_report: ExportReport, merged_report: ExportReport, tmp_path: Path
) -> None:
    base = metadata_of(Path(base_report.path))
    merged = metadata_of(Path(merged_report.path))
    melora_fx.save_adapter(model, tmp_path)
    assert (base["adapter"], base["adapter_sha256"], base["sites"]) == ("none", "none", {})
    assert (merged["adapter"], merged["adapter_sha256"]) == ("fold", read_adapter(tmp_path).sha256)
    assert merged["model"] == "BertForSequenceClassification"
    header = json.loads((tmp_path / "adapter_config.json").read_text())
    assert merged["sites"] == header["sites"], "the base's fingerprints, not the folded weights'"


@pytest.mark.parametrize("name", ["base", "merged", "unmerged"])
def test_the_file_says_where_each_weight_lives(
    name: str,
    model: nn.Module,
    base_report: ExportReport,
    merged_report: ExportReport,
    unmerged_report: ExportReport,
) -> None:
    path = Path({"base": base_report, "merged": merged_report, "unmerged": unmerged_report}[name].path)
    graph = onnx.load(path)
    initializers = {item.name: onnx.numpy_helper.to_array(item) for item in graph.graph.initializer}
    plain = bert_classifier(num_layers=1)
    weights = {key: value for key, value in plain.named_parameters() if value.dim() == 2}
    places = metadata_of(path)["weights"]
    assert set(places) == set(weights)
    context = melora_fx.folded(model) if name == "merged" else contextlib.nullcontext()
    with context:
        current = dict(model.named_parameters())
        for key, place in places.items():
            stored = initializers[place["initializer"]]
            np.testing.assert_array_equal(stored.T if place["is_transposed"] else stored, current[key].detach().numpy())


@pytest.mark.slow
def test_names_are_readable(unmerged_report: ExportReport) -> None:
    graph = onnx.load(unmerged_report.path, load_external_data=False).graph
    names = {item.name for item in graph.initializer}
    query = "bert.encoder.layer.0.attention.self.query"
    assert {f"{query}.weight.T", f"{query}.lora_a.blockdiag.T", f"{query}.lora_b.blockdiag.T"} <= names
    large = [item.name for item in graph.initializer if len(item.dims) > 1 and item.name.startswith("val_")]
    assert not large


@pytest.mark.slow
def test_the_same_export_twice_gives_the_same_bytes(
    tmp_path: Path, model: nn.Module, unmerged_report: ExportReport
) -> None:
    """The first export may be another process's."""
    first = Path(unmerged_report.path).parent
    second = tmp_path
    export_onnx(model, tokens(), second, adapter="keep")
    for file in ("model.onnx", data_of(second / "model.onnx").name):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    text = (second / "model.onnx").read_bytes()
    assert b"site-packages" not in text, "the graph contains a path of this machine"


def test_weights_that_share_an_initializer_are_left_out(tmp_path: Path) -> None:
    """The exporter stores equal matrices once: an edit would change both."""
    model = tower()
    with torch.no_grad():
        model.gate.weight.copy_(model.up.weight)
    export_onnx(model, {"x": randn(2, 5, 24)}, tmp_path)
    places = metadata_of(tmp_path / "model.onnx")["weights"]
    assert {"gate.weight", "up.weight"}.isdisjoint(places)
    assert "head.weight" in places


@pytest.mark.slow
def test_axes_are_dynamic_or_fixed_as_asked(tmp_path: Path) -> None:
    """A fixed batch of one is not doubled."""
    axes = {"input_ids": {1: "length"}, "attention_mask": {1: "length"}}
    report = export_onnx(bert_classifier(num_layers=1), tokens(1, 7), tmp_path, dynamic_axes=axes)
    assert report.inputs == {"input_ids": (1, "length"), "attention_mask": (1, "length")}
    assert report.outputs == {"logits": (1, 3)}
    assert {"length=7", "length=8", "length=1", "length=28"} <= set(report.compared)
    report = export_onnx(tower(), {"x": randn(1, 24)}, tmp_path / "fixed.onnx", dynamic_axes={})
    assert report.inputs == {"x": (1, 24)}


class Flat(nn.Module):
    """Fixes axis 1, whose length must be the weight's number of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("axes", "error", "text"),
    [
        ("all", ValueError, r"`dynamic_axes` \(='all'\) must be \"auto\" or"),
        (None, ValueError, r"`dynamic_axes` \(=None\) must be \"auto\" or"),
        ({"x": [0]}, ValueError, r"`dynamic_axes` \(=\{'x': \[0\]\}\) must be \"auto\" or"),
        ({"x": {0: 2}}, ValueError, "of `x`, axis 0: 2 must be a name such as 'batch'"),
        ({"x": {0: "12"}}, ValueError, "of `x`, axis 0: '12' must be a name such as 'batch'"),
        ({"x": {0: "n", 1: "n"}}, ValueError, "of `x`, axis 1: `n` is 12 here and 2 before"),
        ({"y": {0: "batch"}}, ValueError, "names the input `y`; the inputs are x"),
        ({"x": {2: "depth"}}, ValueError, r"of `x`, of shape \(2, 12\): it has no axis 2"),
        ({"x": {0: "batch", 1: "width"}}, MELoRAError, r"`x` axis 1 \(`width`\): the model fixes it to 12"),
    ],
    ids=["form", "none", "list", "number", "digits", "one_name", "input", "axis", "fixed"],
)
def test_axes_that_cannot_be_dynamic_are_named(axes: Any, error: type[Exception], text: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=text):
        export_onnx(Flat(), {"x": randn(2, 12)}, tmp_path, dynamic_axes=axes)
    assert not list(tmp_path.iterdir())


class Scales(nn.Module):
    """Accepts and returns values of many types."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, flag: bool, x: torch.Tensor, mask: Any = None, scale: Any = 1.0) -> dict[str, Any]:
        y = self.linear(x) * scale if flag else x
        return {"y": y, "bias": self.linear.bias, "none": None, "pair": (x, y.sum())}


@pytest.mark.slow
def test_what_is_no_tensor_is_a_constant_of_the_graph(tmp_path: Path) -> None:
    inputs = {"flag": True, "x": randn(2, 12), "mask": None, "scale": 0.5}
    report = export_onnx(Scales(), inputs, tmp_path / "a.onnx", dynamic_axes={"x": {0: "n"}})
    assert report.inputs == {"x": ("n", 12)}
    assert report.outputs == {"y": ("n", 3), "bias": (3,), "pair_0": ("n", 12), "pair_1": ()}
    report = export_onnx(Scales(), inputs | {"scale": torch.tensor(0.5)}, tmp_path / "b.onnx")
    assert report.inputs == {"x": ("batch", 12), "scale": ()}
    assert len(report.compared) == 4


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        (
            {"x": randn(2, 7)},
            MELoRAError,
            "`Flat` does not accept `example_inputs`: RuntimeError: (addmm: )?mat1 and mat2",
        ),
        ({"z": randn(2, 12)}, MELoRAError, "`Flat` does not accept .* unexpected keyword argument 'z'"),
        ({"x": (randn(2, 12),)}, TypeError, "`example_inputs`: `x` is a tuple, a graph's input must be a tensor"),
    ],
    ids=["size", "name", "tuple"],
)
def test_inputs_that_the_model_does_not_take_are_one_error(
    inputs: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        export_onnx(Flat(), inputs, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_operator_without_a_translation_is_named(tmp_path: Path) -> None:
    class Decomposes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigh(x @ x.mT)[0]

    with pytest.raises(MELoRAError, match=r"No ONNX function found for .*eigh") as caught:
        export_onnx(Decomposes(), {"x": randn(2, 12)}, tmp_path)
    assert "\x1b" not in str(caught.value)
    assert "Next steps" not in str(caught.value)


def test_tensorrt_takes_no_optional_inputs_and_no_data_dependent_shapes(tmp_path: Path) -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)[x[:, 0] > 0]

    with pytest.raises(ValueError, match=r'`target="tensorrt"` accepts no optional inputs, which `adapter="swap"`'):
        export_onnx(rewritten_tower(), {"x": randn(2, 24)}, tmp_path, adapter="swap", target="tensorrt")
    assert not list(tmp_path.iterdir())
    with pytest.raises(MELoRAError, match=r"(?s)NonZero.*left in .*model\.failed"):
        export_onnx(Picks(), {"x": randn(2, 12)}, tmp_path, target="tensorrt", verify=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.failed"]
