"""Adapter files that are damaged, forged or of another model: every function that reads one refuses it with one clear
error, before anything is written.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.adapter_consumers import CONSUMERS, INPUTS, Bases, description, set_description
from support.adapter_files import TENSORS, edit_header, edit_tensors, header_of, write_file
from support.exports import Exports
from support.models import adapted_kept_tower
from support.mutations import mutated_json, mutated_tensors

import melora_fx
from exporters import OrtRunner
from melora_fx import MELoRAError
from melora_fx.saving.adapter_file import read_adapter

each_consumer = pytest.mark.parametrize("consumer", CONSUMERS.values(), ids=CONSUMERS)
Consumer = Callable[[Bases, Path, Path], None]
FUZZING = settings(deadline=None, suppress_health_check=[*HealthCheck], derandomize=True, database=None)
WARNINGS = ("ignore:.*lose more than", "ignore:invalid value", "ignore:overflow")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, exports: Exports) -> Bases:
    return Bases.write(tmp_path_factory.mktemp("bases"), exports)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    melora_fx.save_adapter(adapted_kept_tower(5), tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_refused(consumer: Consumer, bases: Bases, adapter: Path, out: Path, text: str = ".") -> None:
    out.mkdir()
    with pytest.raises(MELoRAError, match=text):
        consumer(bases, adapter, out)
    assert not any(out.iterdir())


@pytest.mark.default_cases("load_adapter, rewritten", "fold_*", "OrtRunner", "write_ort_adapter")
@each_consumer
def test_a_good_one_is_read(consumer: Consumer, bases: Bases, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    consumer(bases, adapter, tmp_path / "out")


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(header: dict[str, Any]) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version of text": (_set("format_version", value="2"), "has format_version '2'"),
    "version of the future": (_set("format_version", value=3), "has format_version 3"),
    "version zero": (_set("format_version", value=0), "has format_version 0"),
    "version true": (_set("format_version", value=True), "has format_version True"),
    "no sites": (_set("sites", value={}), "has tensors of no site|it has no sites"),
    "unknown entry": (_set("more", value=1), r"has unknown \['more'\]"),
    "alpha beyond float32": (_set("sites", "up", "config", "alpha", value=1e300), "site `up`: `alpha`.*must be finite"),
    "alpha of 400 digits": (_set("sites", "up", "config", "alpha", value=10**400), "site `up`: `alpha`"),
    "alpha that vanishes": (_set("sites", "up", "config", "alpha", value=1e-300), "site `up`: `alpha`"),
    "forged rank": (_set("sites", "up", "config", "rank", value=1), "`up`: lora_a is .*does not fit"),
    "more blocks than memory": (
        _set("sites", "up", "config", "num_blocks", value=10**18),
        "`num_blocks` must be at most",
    ),
    "more parts than memory": (_set("sites", "up", "config", "split", value=10**18), "`split` must be at most"),
    "a field left out": (lambda header: header["sites"]["up"]["config"].pop("alpha"), r"`config` lacks \['alpha'\]"),
    "fingerprint of one value": (_set("sites", "up", "base", "values", value=[1.0]), "must be 64 finite numbers"),
    "fingerprint beyond float64": (_set("sites", "up", "base", "values", value=[10**400] * 64), "64 finite numbers"),
    "fingerprint taken away": (lambda header: header["sites"]["up"]["base"].pop("values"), "either `values` or"),
    "no fingerprint at all": (lambda header: header["sites"]["up"].pop("base"), "either `values` or"),
    "base of no dtype": (_set("sites", "up", "base", "dtype", value="nn"), "must be a dtype of torch"),
    "base of negative size": (_set("sites", "up", "base", "shape", value=[-36, -24]), "must be an integer from 1"),
    "transposed by text": (_set("sites", "up", "is_transposed", value="no"), "must be true or false"),
    "kept twice": (_set("kept", value=["norm", "norm"]), "has a name twice"),
    "kept without tensors": (_set("kept", value=["norm", "head"]), "lacks all tensors of .*'head'"),
    "tensors not kept": (_set("kept", value=[]), "or parameter kept trainable: 'norm.bias', 'norm.weight'"),
    "a billion labels": (_set("model", "num_labels", value=10**9), "`model.num_labels` must be an integer"),
    "labels of another number": (_set("model", "labels", value=["a"]), "names 1 labels"),
    "a hash of other content": (_set("model", "class", value="Another"), "has changed since"),
}


@pytest.mark.default_cases("*load_adapter-*", "*OrtRunner-forged rank", "*fold_onnx-fingerprint taken away")
@pytest.mark.parametrize("case", HEADERS)
@each_consumer
def test_header(consumer: Consumer, case: str, bases: Bases, adapter: Path, tmp_path: Path) -> None:
    change, text = HEADERS[case]
    edit_header(adapter, change, sign=case != "a hash of other content")
    assert_refused(consumer, bases, adapter, tmp_path / "out", text)


Tensors = dict[str, torch.Tensor]
TENSOR_CASES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a weight of the base": (
        lambda t: t.update({"head.weight": torch.zeros(6, 24)}),
        "kept trainable: .*'head.weight'",
    ),
    "half of a head": (lambda t: t.pop("norm.bias"), "norm.bias"),
    "another tensor of a head": (lambda t: t.update({"norm.more": torch.zeros(36)}), "norm.more"),
    "integers": (lambda t: t.update({"up.lora_a": t["up.lora_a"].long()}), "`up`: lora_a holds torch.int64"),
    "bools": (lambda t: t.update({"up.lora_b": t["up.lora_b"].bool()}), "`up`: lora_b holds torch.bool"),
    "integers in a head": (lambda t: t.update({"norm.bias": t["norm.bias"].long()}), "norm.bias"),
    "float8": (lambda t: t.update({"up.lora_a": t["up.lora_a"].to(torch.float8_e5m2)}), "lora_a holds torch.float8"),
    "float8 in a head": (
        lambda t: t.update({"norm.bias": t["norm.bias"].to(torch.float8_e4m3fn)}),
        "holds torch.float8",
    ),
    "complex numbers": (lambda t: t.update({"up.lora_a": t["up.lora_a"].to(torch.complex64)}), "holds torch.complex64"),
    "NaN": (lambda t: t["gate.lora_b"].view(-1)[:1].fill_(float("nan")), "NaN or infinity in 'gate.lora_b'"),
    "infinity in a head": (lambda t: t["norm.bias"][:1].fill_(float("inf")), "NaN or infinity in 'norm.bias'"),
    "values beyond a rank": (lambda t: t["up.lora_a"][0, 1].fill_(1.0), "`up`: it holds values beyond the ranks"),
    "no values": (lambda t: t.update({"up.lora_a": t["up.lora_a"][:0]}), r"`up`: lora_a is \(0, 2, 8\)"),
}


@pytest.mark.default_cases("*load_adapter-*", "*fold_checkpoint-half of a head", "*OrtRunner-half of a head")
@pytest.mark.parametrize("case", TENSOR_CASES)
@each_consumer
def test_tensors(consumer: Consumer, case: str, bases: Bases, adapter: Path, tmp_path: Path) -> None:
    change, text = TENSOR_CASES[case]
    edit_tensors(adapter, change)
    assert_refused(consumer, bases, adapter, tmp_path / "out", text)


def test_every_flipped_bit_is_noticed(adapter: Path) -> None:
    """Except bits that nothing reads, as in safetensors' own `format`, and other spellings of a number."""
    whole = read_adapter(adapter)
    data = (adapter / TENSORS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    generator = np.random.default_rng(0)
    for position in (*generator.integers(start, len(data), 100), *generator.integers(0, start, 100)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(generator.integers(8))
        (adapter / TENSORS).write_bytes(damaged)
        if position >= start:
            with pytest.raises(MELoRAError):
                read_adapter(adapter)
        else:
            with suppress(MELoRAError):
                read = read_adapter(adapter)
                assert (read.header, read.sha256) == (whole.header, whole.sha256)


def test_changed_tensors_are_named_as_such(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: tensors["up.lora_b"].mul_(1.5), sign=False)
    with pytest.raises(MELoRAError, match=r"adapter\.safetensors` has changed since it was written"):
        read_adapter(adapter)


def test_files_of_format_1_have_no_hash(adapter: Path) -> None:
    header = header_of(adapter) | {"format_version": 1}
    del header["sha256"], header["sites"]["up"]["base"], header["sites"]["up"]["config"]["init"]
    write_file(adapter, header, load_file(adapter / TENSORS))
    assert read_adapter(adapter).fingerprints.keys() == {"gate", "conv"}


def test_what_is_read_stays_when_the_file_is_cut_or_changed_in_place(bases: Bases, adapter: Path) -> None:
    runner = OrtRunner(bases.swap)
    before = runner.run(INPUTS, adapter=adapter)
    read = read_adapter(adapter)
    copies = {name: tensor.clone() for name, tensor in read.tensors.items()}
    with (adapter / TENSORS).open("r+b") as file:
        file.seek(-64, 2)
        file.write(b"\xff" * 64)
        file.truncate(100)
    assert all(torch.equal(read.tensors[name], copies[name]) for name in copies)
    melora_fx.save_adapter(adapted_kept_tower(6), adapter)
    after = runner.run(INPUTS, adapter=adapter)
    assert all(not np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b"], ids=["long_name", "long_path", "nul"])
@each_consumer
def test_places_that_the_system_refuses(consumer: Consumer, name: str, bases: Bases, tmp_path: Path) -> None:
    assert_refused(consumer, bases, tmp_path / name, tmp_path / "out")


def test_nesting_is_bounded(adapter: Path) -> None:
    nested = "[" * 10**5 + "]" * 10**5
    text = json.dumps(header_of(adapter)).replace('"versions": {', f'"versions": {{"x": {nested}, ', 1)
    save_file(load_file(adapter / TENSORS), adapter / TENSORS, {"format": "pt", "melora": text})
    with pytest.raises(MELoRAError, match="nested too deeply"):
        read_adapter(adapter)


def run(names: Iterable[str], bases: Bases, adapter: Path, out: Path) -> None:
    """Checks that each consumer accepts the adapter, or raises MELoRAError and has written nothing."""
    for name in names:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        try:
            CONSUMERS[name](bases, adapter, out)
        except MELoRAError:
            assert not any(out.iterdir()), name


fuzzed = pytest.mark.parametrize("examples", [5, pytest.param(120, marks=pytest.mark.slow)])


@fuzzed
@pytest.mark.filterwarnings(*WARNINGS)
def test_fuzzed_headers(examples: int, bases: Bases, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / TENSORS)

    @settings(FUZZING, max_examples=examples)
    @given(mutated_json(header_of(adapter)), st.booleans())
    def check(header: Any, sign: bool) -> None:
        write_file(adapter, header, tensors, sign=sign)
        run(CONSUMERS, bases, adapter, tmp_path / "out")

    check()


@fuzzed
@pytest.mark.filterwarnings(*WARNINGS)
def test_fuzzed_tensors(examples: int, bases: Bases, adapter: Path, tmp_path: Path) -> None:
    header = header_of(adapter)

    @settings(FUZZING, max_examples=examples)
    @given(mutated_tensors(load_file(adapter / TENSORS)))
    def check(tensors: Tensors) -> None:
        write_file(adapter, header, tensors)
        run(CONSUMERS, bases, adapter, tmp_path / "out")

    check()


@fuzzed
@pytest.mark.filterwarnings(*WARNINGS)
def test_fuzzed_bytes(examples: int, bases: Bases, adapter: Path, tmp_path: Path) -> None:
    data = (adapter / TENSORS).read_bytes()

    @settings(FUZZING, max_examples=examples)
    @given(st.integers(0, len(data) - 1), st.binary(max_size=12), st.integers(0, 12))
    def check(position: int, new: bytes, removed: int) -> None:
        (adapter / TENSORS).write_bytes(data[:position] + new + data[position + removed :])
        run(CONSUMERS, bases, adapter, tmp_path / "out")

    check()


@fuzzed
@pytest.mark.filterwarnings(*WARNINGS)
def test_fuzzed_descriptions_of_graphs(examples: int, bases: Bases, adapter: Path, tmp_path: Path) -> None:
    copied = bases.copied(tmp_path / "bases")

    @settings(FUZZING, max_examples=examples)
    @given(mutated_json(json.loads(description(bases.base))), mutated_json(json.loads(description(bases.swap))))
    def check(base: Any, swap: Any) -> None:
        set_description(copied.base, json.dumps(base))
        set_description(copied.swap, json.dumps(swap))
        run(["fold_onnx", "OrtRunner", "write_ort_adapter"], copied, adapter, tmp_path / "out")

    check()
