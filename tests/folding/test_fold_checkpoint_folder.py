"""Folds on disk keep everything else in the base's folder unchanged."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fold_folders import (
    CONFIG,
    INDEX,
    OTHERS,
    SINGLE,
    Folders,
    add_files,
    assert_only_these_differ,
    bits,
    content_of,
    edit_json,
    edit_tensors,
    metadata_of,
    names,
    stored,
)
from support.models import (
    bert,
    bert_classifier,
    randn,
)
from transformers import (
    BertForSequenceClassification,
)

SAME_WEIGHTS = {
    "pytorch_model.bin": b"w",
    "pytorch_model.bin.index.json": b"{}",
    "model.safetensors.index.json": b"{}",
    "other.safetensors": b"w",
    "tf_model.h5": b"w",
    "flax_model.msgpack": b"w",
    "rust_model.ot": b"w",
    "model.onnx": b"w",
    "model.onnx_data": b"w",
    "model-q4.gguf": b"w",
    "onnx/model.onnx": b"w",
    "onnx/config.json": b"{}",
    "openvino/openvino_model.xml": b"w",
    "original/consolidated.00.pth": b"w",
}


def test_other_files_come_along_and_other_forms_of_the_weights_do_not(folders: Folders) -> None:
    folders.prepare(bert_classifier(), "query")
    add_files(folders.base, OTHERS | SAME_WEIGHTS)
    report = folders.fold()
    ours = {name: data for name, (data, _, _) in content_of(folders.out).items()}
    assert ours.keys() == OTHERS.keys() | {SINGLE, CONFIG}
    assert {name: ours[name] for name in OTHERS} == OTHERS
    assert ours[CONFIG] == (folders.base / CONFIG).read_bytes()
    (note,) = report.notes
    assert note.startswith("not copied, because they contain the base's weights: ")
    assert set(note.split(": ")[1].split(", ")) == {name.split("/")[0] for name in SAME_WEIGHTS}
    assert f"note: {note}" in str(report)


def test_hidden_files_stay_behind_and_are_named(folders: Folders) -> None:
    folders.prepare(bert_classifier(), "query")
    add_files(folders.base, {".gitattributes": b"*", ".cache/huggingface/x.lock": b"", ".git/objects/ab": b"w"})
    report = folders.fold()
    assert names(folders.out) == {SINGLE, CONFIG}
    text = "\n".join(report.notes)
    assert all(name in text for name in (".gitattributes", ".cache", ".git"))


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_symbolic_links_as_in_the_cache_of_the_hub_become_files(sharded: bool, folders: Folders) -> None:
    folders.prepare(bert_classifier(), "query", sharded=sharded)
    add_files(folders.base, OTHERS)
    expected, _ = folders.in_memory(BertForSequenceClassification)
    blobs = folders.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folders.base.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    before = content_of(blobs)
    folders.fold()
    assert content_of(blobs) == before
    assert not any(path.is_symlink() for path in folders.out.rglob("*"))
    assert {name: (folders.out / name).read_bytes() for name in OTHERS} == OTHERS
    assert bits(BertForSequenceClassification.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())


def test_permissions_are_ordinary(folders: Folders) -> None:
    """Whatever the base's are, and although only the owner can read the staging directory."""
    folders.prepare(bert_classifier(), "query", sharded=True)
    add_files(folders.base, OTHERS)
    for path in folders.base.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o400)
    mask = os.umask(0o022)
    try:
        folders.fold()
    finally:
        os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folders.out.rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folders.out, folders.out / "1_Pooling")} == {0o755}


@pytest.mark.parametrize("head", [False, True], ids=["no_head", "new_head"])
def test_index_names_every_tensor_and_the_sizes(head: bool, folders: Folders) -> None:
    options = {"trained": BertForSequenceClassification, "keep": "classifier", "num_labels": 5} if head else {}
    folders.prepare(bert(), "query", sharded=True, **options)
    edit_json(folders.base / INDEX, lambda index: index["metadata"].update(mine="kept"))
    report = folders.fold()
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (folders.base, folders.out))
    held = stored(folders.out)
    assert after["weight_map"] == {key: value[0] for key, value in held.items()}
    assert list(after["weight_map"]) == sorted(held)
    new = {"classifier.weight": 5 * 24, "classifier.bias": 5} if head else {}
    assert after["weight_map"] == before["weight_map"] | dict.fromkeys(new, max(before["weight_map"].values()))
    assert after["metadata"] == {
        "total_parameters": before["metadata"]["total_parameters"] + sum(new.values()),
        "total_size": before["metadata"]["total_size"] + 4 * sum(new.values()),
        "mine": "kept",
        "melora_adapter_sha256": report.adapter_sha256,
    }
    assert after["metadata"]["total_size"] == sum(len(value[3]) for value in held.values())


def test_index_without_metadata(folders: Folders) -> None:
    folders.prepare(bert(), "query", sharded=True)
    edit_json(folders.base / INDEX, lambda index: index.pop("metadata"))
    folders.fold()
    index = json.loads((folders.out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(len(value[3]) for value in stored(folders.out).values())


def test_metadata_of_the_files_is_kept(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    save_file(load_file(folders.base / SINGLE), folders.base / SINGLE, {"format": "mine", "made_by": "me"})
    folders.fold()
    metadata = metadata_of(folders.out / SINGLE)
    assert metadata.pop("melora")
    assert metadata == {"format": "mine", "made_by": "me"}


def test_tensors_of_other_dtypes_beside_the_weights_stay(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    extra = {
        "a.scale": randn(3).to(torch.float8_e4m3fn),
        "b": torch.tensor(7),
        "c": torch.empty(0, 2),
        "d": torch.tensor(True),
    }
    edit_tensors(folders.base / SINGLE, lambda tensors: tensors.update(extra))
    folders.fold()
    assert_only_these_differ(folders, {f"encoder.layer.{i}.attention.self.query.weight" for i in range(2)})
