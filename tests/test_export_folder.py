"""Other content in the folder of an export: other models' files, other graphs, and other running exports."""

import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.exports import Exports
from support.models import bert_classifier, fill, tokens
from support.onnx_files import WEIGHT, data_of, publish_small, save_small, value_in, write_graph
from transformers import BertConfig, BertForSequenceClassification, BertModel

import melora_fx
from exporters import export_onnx, fold_onnx
from exporters.export_files import publish, refuse_other_model
from exporters.graph import build as build_module
from melora_fx import MELoRAError

CONFIG = bert_classifier(num_layers=1).config
OTHER = BertConfig(vocab_size=17, hidden_size=24)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is translated")

    monkeypatch.setattr(build_module, "build_graph", fails)


def assert_refused(folder: Path, text: str, name: str = "") -> None:
    before = contents(folder)
    with pytest.raises(MELoRAError, match=text):
        export_onnx(bert_classifier(num_layers=1), tokens(), folder / name, verify=False)
    assert contents(folder) == before


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("weights", [(), ("model.safetensors",), ("pytorch_model-00001-of-2.bin",)], ids=len)
def test_another_models_folder_is_refused(weights: tuple[str, ...], tmp_path: Path) -> None:
    OTHER.save_pretrained(tmp_path)
    for file in weights:
        (tmp_path / file).touch()
    assert_refused(tmp_path, r"config\.json` already exists and belongs to another model: name another folder")
    assert_refused(tmp_path, r"config\.json` already exists and belongs to another model", "deep.onnx")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("content", ["{}", "[1]", "no json", '{"model_type": "bert", "hidden_size": "?"}', "\xff"])
def test_a_configuration_that_cannot_be_read_is_anothers(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    assert_refused(tmp_path, r"config\.json` already exists and belongs to another model")


@pytest.mark.usefixtures("no_work")
def test_weights_without_a_configuration_are_refused(tmp_path: Path) -> None:
    """Such as a Trainer's checkpoint of an adapter; an adapter's own folder may get its graph."""
    (tmp_path / "model.safetensors").touch()
    assert_refused(tmp_path, r"model\.safetensors` already exists and contains another model's weights: name")
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter.safetensors")
    with pytest.raises(AssertionError, match="the model is translated"):
        export_onnx(bert_classifier(num_layers=1), tokens(), tmp_path, verify=False)


@pytest.mark.usefixtures("no_work")
def test_another_tools_graph_is_refused(tmp_path: Path) -> None:
    write_graph(tmp_path, data=WEIGHT)
    assert_refused(tmp_path, r"model\.onnx` is a graph that `export_onnx` did not write: remove it, or name another")


@pytest.mark.usefixtures("no_work")
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """So is the model's own folder with another head; with the same head it is accepted."""
    model = bert_classifier(num_layers=1)
    model.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "vocab.txt").write_text("a")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "own")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "vocab.txt").write_text("b")
    with pytest.raises(MELoRAError, match=r"vocab\.txt` already exists and belongs to another model"):
        export_onnx(loaded, tokens(), tmp_path / "out", verify=False)
    with pytest.raises(AssertionError, match="the model is translated"):
        export_onnx(loaded, tokens(), tmp_path / "own", verify=False)
    loaded.config.num_labels = 7
    with pytest.raises(MELoRAError, match=r"config\.json` already exists and belongs to another model"):
        export_onnx(loaded, tokens(), tmp_path / "own", verify=False)


def staged(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    return folder


def test_settings_are_compared_and_not_how_they_are_written(tmp_path: Path) -> None:
    """Explicit defaults, the version and the dtype are not differences."""
    new = staged(tmp_path / "new", CONFIG)
    out = tmp_path / "out"
    out.mkdir()
    written = CONFIG.to_dict() | {"transformers_version": "4.0", "torch_dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(written, indent=8))
    (out / "model.safetensors").touch()
    refuse_other_model(new, out / "model.onnx")
    with pytest.raises(MELoRAError, match="another model"):
        refuse_other_model(staged(new, OTHER), out / "model.onnx")


def test_graphs_of_one_model_share_a_folder_and_of_two_do_not(tmp_path: Path) -> None:
    out = staged(tmp_path / "out", CONFIG)
    publish_small(out / "model.onnx", 1.0)
    refuse_other_model(staged(tmp_path / "same", CONFIG), out / "second.onnx")
    other = staged(tmp_path / "other", OTHER)
    refuse_other_model(other, out / "model.onnx")  # again to the same place
    shutil.copy(out / "model.onnx", out / "second.onnx")
    with pytest.raises(MELoRAError, match=r"config\.json` belongs to another model, and describes `second\.onnx` too"):
        refuse_other_model(other, out / "model.onnx")
    with pytest.raises(MELoRAError, match=r"config\.json` belongs to another model, and describes `model\.onnx` too"):
        refuse_other_model(other, out / "third.onnx")


@pytest.mark.slow
def test_a_fold_is_refused_there_too(exports: Exports, tmp_path: Path) -> None:
    base = Path(exports("bert", target="portable").path)
    melora_fx.save_adapter(fill(melora_fx.rewrite(bert_classifier(num_layers=1), "query")), tmp_path / "adapter")
    out = staged(tmp_path / "out", OTHER)
    before = contents(out)
    with pytest.raises(MELoRAError, match=r"config\.json` already exists and belongs to another model"):
        fold_onnx(base, tmp_path / "adapter", out)
    assert contents(out) == before


def test_other_weights_have_another_name(tmp_path: Path) -> None:
    """Wherever they differ. The last ones have the bytes of the first, and so the same name, in any graph."""
    size = 3 * (1 << 18) + 5
    rows = np.zeros((3, size), np.float32)
    rows[1, 123_457] = rows[2, -1] = 1.0
    for number, values in enumerate([*rows, np.zeros((1, size))]):
        for turn in range(2):
            save_small(tmp_path / f"{number}-{turn}" / "model.onnx", values)
    found = [data_of(folder / "model.onnx").name for folder in sorted(tmp_path.iterdir())]
    assert found[::2] == found[1::2]
    assert len(set(found)) == 3
    assert found[0] == found[-1]


def test_old_weights_go_and_those_that_others_refer_to_stay(tmp_path: Path) -> None:
    """Graphs that the user has renamed or put aside, and weights with similar names that are not ours."""
    path = tmp_path / "model.onnx"
    for value, name in ((1.0, "renamed.onnx"), (2.0, "model.onnx.bak")):
        publish_small(path, value).rename(tmp_path / name)
    kept = names(tmp_path) | {"model.onnx.mine.data", "model.onnx.data", "other.onnx.000000000000.data"}
    for name in kept - names(tmp_path):
        (tmp_path / name).touch()
    (tmp_path / "model.onnx.000000000000.data").touch()  # from a killed run
    publish_small(path, 3.0)
    publish_small(path, 4.0)
    (newest,) = names(tmp_path) - kept - {"model.onnx"}
    assert newest.endswith(".data")
    assert [value_in(tmp_path / name) for name in ("renamed.onnx", "model.onnx.bak", "model.onnx")] == [1.0, 2.0, 4.0]


def test_weights_of_earlier_versions_go_with_their_graph(tmp_path: Path) -> None:
    path = publish_small(tmp_path / "model.onnx", 1.0)
    graph = onnx.load(path)
    data_of(path).unlink()
    onnx.save(graph, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert value_in(path) == 1.0
    publish_small(path, 2.0)
    assert names(tmp_path) == {"model.onnx", data_of(path).name}


def test_a_report_on_the_replaced_graph_goes(tmp_path: Path) -> None:
    path = publish_small(tmp_path / "model.onnx", 1.0, **{"model.export": "{}"})
    assert (tmp_path / "model.export.json").exists()
    publish_small(path, 2.0)
    assert not (tmp_path / "model.export.json").exists()


def test_files_that_a_caller_names_stay(tmp_path: Path) -> None:
    """The base of a fold may be a link to the weights of the graph that it replaces."""
    path = publish_small(tmp_path / "out" / "model.onnx", 1.0)
    before = data_of(path)
    link = tmp_path / "link"
    link.symlink_to(before)
    staging = tmp_path / "staging"
    save_small(staging / "model.onnx", [2.0] * 100)
    publish(staging, path, keep=[link])
    assert before.exists()
    assert value_in(path) == 2.0


def test_a_graph_behind_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    original = publish_small(tmp_path / "original" / "model.onnx", 1.0)
    before = contents(original.parent)
    out = tmp_path / "out"
    out.mkdir()
    for file in (original, data_of(original)):
        (out / file.name).symlink_to(file)
    path = publish_small(out / "model.onnx", 2.0)
    assert not path.is_symlink()
    assert names(out) == {"model.onnx", data_of(path).name}
    assert contents(original.parent) == before


def test_a_graph_and_its_weights_can_be_moved_together(tmp_path: Path) -> None:
    path = publish_small(tmp_path / "model.onnx", 1.0)
    (tmp_path / "elsewhere").mkdir()
    data_of(path).rename(tmp_path / "elsewhere" / data_of(path).name)
    path.rename(tmp_path / "elsewhere" / "other.onnx")
    assert value_in(tmp_path / "elsewhere" / "other.onnx") == 1.0


def test_a_graph_without_large_weights_has_no_data_file(tmp_path: Path) -> None:
    save_small(tmp_path / "model.onnx", [1.0] * 3)
    assert names(tmp_path) == {"model.onnx"}
    assert value_in(tmp_path / "model.onnx") == 1.0


def test_exports_to_one_place_at_once_leave_one_of_them_whole(tmp_path: Path) -> None:
    """Each publication removes the other's weights, but never before its own graph is there."""
    path = tmp_path / "out" / "model.onnx"
    wrong = []

    def publish_often(number: int) -> None:
        try:
            for turn in range(20):
                publish_small(path, float((number + turn) % 2))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=publish_often, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert value_in(path) in (0.0, 1.0)
    assert names(path.parent) == {"model.onnx", data_of(path).name}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    path = publish_small(tmp_path / "model.onnx", 1.0)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(MELoRAError, match=f"^`{re.escape(str(tmp_path))}` cannot be written: Permission denied"):
            publish_small(path, 2.0)
    finally:
        tmp_path.chmod(0o700)
    assert value_in(path) == 1.0


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MELoRAError, match=r"model\.safetensors` is a file: name a \.onnx file or a folder"):
        export_onnx(bert_classifier(num_layers=1), tokens(), tmp_path / "model.safetensors", verify=False)


@pytest.mark.slow
def test_the_configuration_names_the_class_that_was_exported(tmp_path: Path) -> None:
    BertModel(CONFIG).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    export_onnx(model, tokens(), tmp_path / "graph", verify=False)
    assert json.loads((tmp_path / "graph" / "config.json").read_text())["architectures"] == [type(model).__name__]
    assert model.config.architectures == ["BertModel"]
