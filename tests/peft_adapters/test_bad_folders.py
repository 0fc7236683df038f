"""PEFT folders that are damaged, forged or of another kind: one clear error each, and nothing is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.models import bert_classifier, fill, randn
from support.mutations import mutated_json, mutated_tensors

import melora_fx
from exporters import read_peft_adapter, write_peft_adapter
from melora_fx import MELoRAConfig, MELoRAError

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
FUZZING = settings(deadline=None, suppress_health_check=[*HealthCheck], derandomize=True, database=None)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with a trained head."""
    folder = tmp_path_factory.mktemp("good")
    targets = {"query": MELoRAConfig(rank=2, num_blocks=1, alpha=2.0)}
    model = fill(melora_fx.rewrite(bert_classifier(), targets, keep_trainable="classifier"))
    melora_fx.save_adapter(model, folder / "ours")
    write_peft_adapter(folder / "ours", folder / "peft")
    return folder / "peft"


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "peft")


def assert_refused(folder: Path, text: str) -> None:
    before = {path.name for path in folder.parent.iterdir()}
    with pytest.raises(MELoRAError, match=text):
        read_peft_adapter(folder, folder.parent / "ours")
    assert {path.name for path in folder.parent.iterdir()} == before


def _config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return edit


def _put(factor: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    key = f"{QUERY}.lora_{factor}.weight"
    return _tensors(lambda tensors: tensors.update({key: value(tensors[key])}))


def _write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def _cut(name: str, length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def _linked(name: str, target: str) -> Callable[[Path], object]:
    def link(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"moved {name}")
        (folder / name).symlink_to(target)

    return link


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), f"no {CONFIG}"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), f"no {TENSORS}"),
    "configuration cut short": (_cut(CONFIG, 40), f"{CONFIG}` cannot be read"),
    "configuration of a list": (_write(CONFIG, b"[]"), "must contain a JSON object"),
    "configuration that is not text": (_write(CONFIG, b"\xff\xfe\x00"), "cannot be read"),
    "configuration nested too deeply": (_write(CONFIG, b"[" * 100_000), "nested too deeply"),
    "tensors cut short": (_cut(TENSORS, 900), "truncated or corrupt"),
    "empty tensors": (_write(TENSORS, b""), "truncated or corrupt"),
    "NaN": (_put("A", lambda t: t.fill_(torch.nan)), r"holds NaN or infinity in '.*lora_A\.weight'"),
    "infinity": (_put("B", lambda t: t.fill_(torch.inf)), r"holds NaN or infinity in '.*lora_B\.weight'"),
    "integers": (_put("A", lambda t: t.int()), "torch.int32 of shape"),
    "complex numbers": (_put("A", lambda t: t.to(torch.complex64)), "not a tensor of numbers"),
    "one dimension": (_put("A", lambda t: t.flatten()), r"of shape \(48,\)"),
    "four dimensions": (_put("A", lambda t: t[..., None, None].clone()), r"of shape \(2, 24, 1, 1\)"),
    "no values": (_put("A", lambda t: t[:0].clone()), r"of shape \(0, 24\)"),
    "another rank": (_put("A", lambda t: torch.cat([t, t])), "have different ranks"),
    "a rank that the configuration belies": (_config(r=3), "it has rank 2, but its configuration says 3"),
    "lora_A alone": (_tensors(lambda t: t.pop(f"{QUERY}.lora_B.weight")), "not both factors"),
    "keys of nothing": (
        _tensors(lambda t: t.update({"base_model.model.x": torch.ones(1)})),
        "holds `x`, which belongs to no",
    ),
    "a magnitude": (
        _tensors(lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.ones(1)})),
        "or of DoRA",
    ),
    "only a head": (
        _tensors(lambda t: [t.pop(key) for key in [*t] if "lora" in key]),
        "adapts no module",
    ),
    "alpha of zero": (_config(lora_alpha=0), "`lora_alpha`"),
    "alpha of text": (_config(lora_alpha="16"), "`lora_alpha`"),
    "alpha of 400 digits": (_config(lora_alpha=10**400), "alpha"),
    "rank of a bool": (_config(r=True), "`r`"),
    "rank of zero": (_config(r=0), "`r`"),
    "a pattern that is none": (_config(rank_pattern={"(": 2}), "adapter_config.json"),
    "patterns of a list": (_config(alpha_pattern=[1]), "`alpha_pattern` must be a JSON object"),
    "names of a number": (_config(modules_to_save=3), "`modules_to_save` must be a list of names"),
    "a dropout of 2": (_config(lora_dropout=2), "`lora_dropout`"),
    "no kind": (_config(peft_type=None), "`peft_type` is None"),
    "stacks that are not there": (_config(target_parameters=["query.weight", "query.bias"]), "several stacks"),
    "link to another folder": (_linked(TENSORS, f"../moved {TENSORS}"), "is a link out of its folder"),
    "link to itself": (_linked(CONFIG, CONFIG), "cannot be read|link out of its folder"),
    "link to nothing": (_linked(TENSORS, "nothing"), f"no {TENSORS}"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_is_refused(case: str, folder: Path) -> None:
    change, text = BAD[case]
    change(folder)
    assert_refused(folder, text)


class _Dangerous:
    def __reduce__(self) -> Any:
        return os.system, ("touch was_run",)


def test_pickles_hold_tensors_or_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors: dict[str, Any] = load_file(folder / TENSORS)
    (folder / TENSORS).unlink()
    torch.save(tensors | {"more": _Dangerous()}, folder / PICKLE)
    assert_refused(folder, "contains more than tensors, and its code is not run")
    assert not (tmp_path / "was_run").exists()
    torch.save([1], folder / PICKLE)
    assert_refused(folder, "does not contain tensors by name")
    torch.save(tensors | {f"{QUERY}.lora_A.weight": 3}, folder / PICKLE)
    assert_refused(folder, "is not a tensor of numbers")
    (folder / PICKLE).write_bytes(b"PK\3\4")
    assert_refused(folder, "truncated or corrupt")
    torch.save(tensors, folder / PICKLE)
    read_peft_adapter(folder, tmp_path / "ours")


def test_a_snapshot_of_a_hugging_face_cache_is_read(good: Path, tmp_path: Path) -> None:
    """Its files are links to a folder with the files of all snapshots."""
    snapshot, blobs = (
        tmp_path / "models--me--adapter" / "snapshots" / "a1b2",
        tmp_path / "models--me--adapter" / "blobs",
    )
    snapshot.mkdir(parents=True)
    shutil.copytree(good, blobs)
    for file in (CONFIG, TENSORS):
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    read_peft_adapter(snapshot, tmp_path / "ours")


def test_the_folder_that_is_read_is_not_written(folder: Path) -> None:
    for out in (folder, folder / "in it"):
        with pytest.raises(MELoRAError, match="is the folder that is read, or in it"):
            read_peft_adapter(folder, out)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]


def test_an_earlier_adapter_stays_where_the_new_one_is_bad(folder: Path, tmp_path: Path) -> None:
    read_peft_adapter(folder, tmp_path / "ours")
    before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    _put("A", lambda t: t.fill_(torch.nan))(folder)
    assert_refused(folder, "NaN")
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before


def test_another_base_is_refused_when_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    """The folder does not describe the base's values: names and shapes must suffice."""
    _put("A", lambda t: randn(2, 36))(folder)
    read_peft_adapter(folder, tmp_path / "ours")
    with pytest.raises(MELoRAError, match="does not fit"):
        melora_fx.load_adapter(bert_classifier(), tmp_path / "ours")


@pytest.mark.slow
@FUZZING
@given(data=st.data())
def test_whatever_is_wrong_is_read_or_refused(data: st.DataObject, good: Path, tmp_path_factory: Any) -> None:
    folder = shutil.copytree(good, tmp_path_factory.mktemp("fuzz") / "peft")
    if data.draw(st.booleans()):
        config = data.draw(mutated_json(json.loads((folder / CONFIG).read_text())))
        (folder / CONFIG).write_text(json.dumps(config))
    if data.draw(st.booleans()):
        tensors = data.draw(mutated_tensors(load_file(folder / TENSORS)))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    if data.draw(st.booleans()):
        file = folder / data.draw(st.sampled_from([CONFIG, TENSORS]))
        content = bytearray(file.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
    try:
        read_peft_adapter(folder, folder.parent / "ours")
    except MELoRAError:
        assert not (folder.parent / "ours").exists()
    else:
        melora_fx.saving.adapter_file.read_adapter(folder.parent / "ours")
