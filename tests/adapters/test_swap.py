"""One session, many adapters: optional inputs of any rank, and ONNX Runtime's own adapter files."""

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.decoders import example, llama
from support.exports import CONFIG, Exports
from support.models import bert_classifier, fill, output_of, randn, rewritten_tower, tokens, tower
from torch import nn

import melora_fx
from exporters import OrtRunner, TorchRunner, export_onnx, write_ort_adapter
from exporters.onnx_files.metadata import read_facts
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter_file import read_adapter


def adapted(seed: int, rank: int = 2, targets: object = "all-linear") -> nn.Module:
    model = bert_classifier(num_layers=1)
    melora_fx.rewrite(model, targets, MELoRAConfig(rank, 3), keep_trainable="classifier")
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.add_(randn(*parameter.shape, seed=seed))
    return fill(model, seed=seed)


@pytest.fixture(scope="module")
def swappable(exports: Exports) -> str:
    report = exports("adapted bert", adapter="swap")
    assert report.num_adapter_inputs == 2 * 7 + 2
    return report.path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, swappable: str) -> Path:
    """Adapters of ranks 1 to 9, as folders and most as files too, that were never in the exported model."""
    folder = tmp_path_factory.mktemp("swap")
    for seed, rank in enumerate((1, 2, 9), start=1):
        melora_fx.save_adapter(adapted(seed, rank), folder / f"adapter{seed}")
        write_ort_adapter(folder / f"adapter{seed}", swappable, folder / f"adapter{seed}.onnx_adapter")
    melora_fx.save_adapter(adapted(4, targets=["query"]), folder / "adapter4")
    return folder


@pytest.fixture(scope="module")
def runner(swappable: str) -> OrtRunner:
    return OrtRunner(swappable)


def test_without_an_adapter_it_is_the_base_bit_for_bit(runner: OrtRunner, exports: Exports) -> None:
    inputs = tokens(3, 7)
    base = OrtRunner(exports("bert").path)
    np.testing.assert_array_equal(runner.run(inputs)["logits"], base.run(inputs)["logits"])


@pytest.mark.slow
def test_without_an_adapter_it_has_the_head_that_it_was_exported_with(tmp_path: Path) -> None:
    model = adapted(1)
    swappable = export_onnx(model, tokens(), tmp_path / "swap", adapter="swap", verify=False)
    with melora_fx.disabled(model):
        base = export_onnx(model, tokens(), tmp_path / "base", adapter="keep", verify=False)
    actual, expected = (OrtRunner(report.path).run(tokens(3, 7))["logits"] for report in (swappable, base))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("suffix", ["", ".onnx_adapter"], ids=["folder", "file"])
@pytest.mark.parametrize(("seed", "rank"), [(1, 1), (2, 2), (3, 9)])
def test_any_adapter_of_any_rank(runner: OrtRunner, folder: Path, seed: int, rank: int, suffix: str) -> None:
    inputs = tokens(2, 6)
    expected = TorchRunner(adapted(seed, rank)).run(inputs)["logits"]
    actual = runner.run(inputs, adapter=folder / f"adapter{seed}{suffix}")["logits"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(actual - runner.run(inputs)["logits"]).max() > 0.1


def test_an_adapter_of_some_sites_leaves_the_others_at_the_base(runner: OrtRunner, folder: Path) -> None:
    inputs = tokens(2, 6)
    expected = TorchRunner(adapted(4, targets=["query"])).run(inputs)["logits"]
    np.testing.assert_allclose(
        runner.run(inputs, adapter=folder / "adapter4")["logits"], expected, rtol=1e-5, atol=1e-5
    )


def test_many_runs_from_four_threads_each_get_their_adapter(runner: OrtRunner, folder: Path) -> None:
    inputs = tokens(1, 4)
    names = [folder / f"adapter{seed}{suffix}" for seed in (1, 2, 3) for suffix in ("", ".onnx_adapter")]
    expected = {name: runner.run(inputs, adapter=name)["logits"] for name in names}
    wrong: list[Path] = []

    def work(start: int) -> None:
        for step in range(250):
            name = names[(start + step) % len(names)]
            if not np.array_equal(runner.run(inputs, adapter=name)["logits"], expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_graphs_inputs_are_documented(swappable: str) -> None:
    graph = onnx.load(swappable, load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    query = "bert.encoder.layer.0.attention.self.query"
    assert shapes[f"{query}.lora_a"] == [3, 8, "rank_0"]
    assert shapes[f"{query}.lora_b"] == [3, "rank_0", 8]
    initializers = {item.name: list(item.dims) for item in graph.initializer}
    assert initializers[f"{query}.lora_a"] == [3, 8, 0]


@pytest.mark.slow
def test_dense_inputs_take_any_adapter(exports: Exports, tmp_path: Path) -> None:
    dense = export_onnx(rewritten_tower(), {"x": randn(2, 24)}, tmp_path / "graph", adapter="swap", form="dense")
    assert set(dense.forms) == {"dense"}
    runner, x = OrtRunner(dense.path), {"x": randn(4, 24)}
    base = runner.run(x)["output"]
    np.testing.assert_array_equal(base, OrtRunner(exports("tower").path).run(x)["output"])
    config = MELoRAConfig(rank=(5, 1, 2), num_blocks=3, alpha=(3.0, 0.5, 1.0))
    model = rewritten_tower(config=config)
    melora_fx.save_adapter(model, tmp_path / "adapter")
    write_ort_adapter(tmp_path / "adapter", dense.path, tmp_path / "file.onnx_adapter")
    expected = TorchRunner(model).run(x)["output"]
    for adapter in (tmp_path / "adapter", tmp_path / "file.onnx_adapter"):
        np.testing.assert_allclose(runner.run(x, adapter=adapter)["output"], expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - base).max() > 0.1
    graph = onnx.load(dense.path, load_external_data=False).graph
    defaults = {item.name: list(item.dims) for item in graph.initializer if item.name.startswith("gate.lora")}
    outputs, inputs = tower().gate.weight.shape
    assert defaults == {"gate.lora_a": [inputs, 0], "gate.lora_b": [0, outputs]}


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "form"), [(1, "dense"), (32, "block")])
def test_swappable_updates_of_a_decoder_are_in_the_faster_form(rank: int, form: str, tmp_path: Path) -> None:
    model = fill(melora_fx.rewrite(llama(), ["q_proj", "v_proj"], MELoRAConfig(rank, 2)))
    report = export_onnx(model, example(), tmp_path, adapter="swap", target="ort-cpu", verify=False)
    assert set(report.forms) == {form}


@pytest.fixture(scope="module")
def tower_swap(exports: Exports) -> str:
    return exports("adapted tower", adapter="swap").path


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory: pytest.TempPathFactory, tower_swap: str) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    melora_fx.save_adapter(rewritten_tower(), folder / "adapter")
    write_ort_adapter(folder / "adapter", tower_swap, folder / "adapter.onnx_adapter")
    return folder


@pytest.mark.slow
def test_an_adapter_of_another_graph_is_refused(runner: OrtRunner, tower_folder: Path) -> None:
    with pytest.raises(MELoRAError, match=r"has sites that .* lacks: up, gate"):
        runner.run(tokens(), adapter=tower_folder / "adapter")
    with pytest.raises(MELoRAError, match="is for another graph"):
        runner.run(tokens(), adapter=tower_folder / "adapter.onnx_adapter")


def test_an_adapter_of_another_base_is_refused(tower_swap: str, tmp_path: Path) -> None:
    other = rewritten_tower()
    with torch.no_grad():
        other.gate.weight.mul_(1.5)
    melora_fx.save_adapter(other, tmp_path / "other")
    with pytest.raises(MELoRAError, match=r"`gate`: \d+ of 64 sampled values differ"):
        OrtRunner(tower_swap).run({"x": randn(2, 24)}, adapter=tmp_path / "other")


def test_other_blocks_are_refused(tower_swap: str, tmp_path: Path) -> None:
    other = fill(melora_fx.rewrite(tower(), "up", MELoRAConfig(rank=2, num_blocks=2)))
    melora_fx.save_adapter(other, tmp_path)
    with pytest.raises(MELoRAError, match="`up`: num_blocks 2 and split None, the graph's are 3 and None"):
        OrtRunner(tower_swap).run({"x": randn(2, 24)}, adapter=tmp_path)


def test_a_graph_without_swappable_adapters_is_refused(tower_folder: Path, exports: Exports, tmp_path: Path) -> None:
    keep = exports("adapted tower", adapter="keep").path
    with pytest.raises(MELoRAError, match='export it with `adapter="swap"`'):
        OrtRunner(keep).run({"x": randn(2, 24)}, adapter=tower_folder / "adapter")
    with pytest.raises(MELoRAError, match="no swappable adapters"):
        write_ort_adapter(tower_folder / "adapter", keep, tmp_path / "a.onnx_adapter")
    assert not list(tmp_path.iterdir())


def test_files_that_are_read_are_kept(tower_folder: Path, tower_swap: str, tmp_path: Path) -> None:
    adapter, graph = tmp_path / "adapter", tmp_path / "graph" / Path(tower_swap).name
    shutil.copytree(tower_folder / "adapter", adapter)
    shutil.copytree(Path(tower_swap).parent, graph.parent)
    files = [*adapter.iterdir(), *graph.parent.iterdir()]
    before = [file.read_bytes() for file in files]
    for file in files:
        with pytest.raises(MELoRAError, match="name another place"):
            write_ort_adapter(adapter, graph, file)
    assert [file.read_bytes() for file in files] == before


def test_a_broken_adapter_file_is_refused(tower_swap: str, tmp_path: Path) -> None:
    (tmp_path / "a.onnx_adapter").write_bytes(b"nonsense")
    with pytest.raises(MELoRAError, match=r"not an \.onnx_adapter file"):
        OrtRunner(tower_swap).run({"x": randn(2, 24)}, adapter=tmp_path / "a.onnx_adapter")


@pytest.mark.slow
def test_an_untrained_model_is_swappable_too(tmp_path: Path) -> None:
    """Its tensors are equal zeros, which exporters store once."""
    base = rewritten_classifier(fill_seed=None)
    export_onnx(base, tokens(), tmp_path, adapter="swap")
    trained = rewritten_classifier(fill_seed=5)
    with torch.no_grad():
        trained.classifier.bias.fill_(0.5)
    melora_fx.save_adapter(trained, tmp_path / "adapter")
    runner = OrtRunner(tmp_path / "model.onnx")
    for adapter, model in ((None, base), (tmp_path / "adapter", trained)):
        actual = runner.run(tokens(), adapter=adapter)["logits"]
        np.testing.assert_allclose(actual, output_of(model, tokens()), rtol=1e-4, atol=1e-5)


def rewritten_classifier(fill_seed: int | None) -> Any:
    model = melora_fx.rewrite(bert_classifier(num_layers=1), "query", CONFIG, keep_trainable="classifier")
    return model if fill_seed is None else fill(model, fill_seed)


@pytest.mark.slow
def test_parts_of_packed_projections_cannot_be_inputs(tmp_path: Path) -> None:
    model = fill(melora_fx.rewrite(tower(), "conv", MELoRAConfig(rank=2, num_blocks=3, split=2)))
    with pytest.raises(MELoRAError, match=r"`conv`.*pieces"):
        export_onnx(model, {"x": randn(2, 24)}, tmp_path, adapter="swap")
    assert not list(tmp_path.iterdir())


def test_swap_needs_sites(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match="needs a rewritten model"):
        export_onnx(tower(), {"x": randn(2, 24)}, tmp_path, adapter="swap")


@pytest.mark.slow
def test_a_model_that_holds_a_smaller_adapter_is_exported(tmp_path: Path) -> None:
    """With fewer sites and smaller ranks than it was rewritten for: all sites are inputs."""
    x = {"x": randn(3, 24)}
    large = rewritten_tower()
    small = fill(melora_fx.rewrite(tower(), ["up", "conv"], MELoRAConfig(1, 3, alpha=2.0)), seed=7)
    melora_fx.save_adapter(small, tmp_path / "small")
    melora_fx.save_adapter(large, tmp_path / "large")
    model = melora_fx.load_adapter(rewritten_tower(), tmp_path / "small")
    kept = read_facts(export_onnx(model, x, tmp_path / "keep", adapter="keep").path)
    assert list(kept.configs) == ["up", "conv"]
    assert kept.adapter_sha256 == read_adapter(tmp_path / "small").sha256
    path = export_onnx(model, x, tmp_path / "swap", adapter="swap").path
    assert list(read_facts(path).configs) == list(melora_fx.sites(model))
    for name, expected in (("small", small), ("large", large)):
        (actual,) = OrtRunner(path).run({"x": x["x"].numpy()}, adapter=tmp_path / name).values()
        np.testing.assert_allclose(actual, output_of(expected, x["x"]), rtol=1e-5, atol=1e-5)
    melora_fx.save_adapter(model, tmp_path / "again")
    assert read_adapter(tmp_path / "again").sha256 == kept.adapter_sha256
