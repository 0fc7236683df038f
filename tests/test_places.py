"""Places that the system refuses, for reading and writing: one of our errors, which names them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from support.adapter_consumers import INPUTS, Bases
from support.exports import Exports
from support.models import adapted_kept_tower, bert_classifier, kept_tower

import melora_fx
from exporters import (
    OrtRunner,
    add_adapters,
    average_adapters,
    check_tensorrt,
    compress_adapter,
    export_onnx,
    fold_onnx,
    read_peft_adapter,
    scale_adapter,
    write_gguf_adapter,
    write_mlx_adapter,
    write_ort_adapter,
    write_peft_adapter,
    write_triton_repository,
)
from exporters.measuring.bench import BenchOptions, run_bench
from melora_fx import MELoRAError
from melora_fx.load_model import load_model

READ: dict[str, Callable[[Path, Bases, Path], object]] = {
    "load_adapter": lambda place, bases, adapter: melora_fx.load_adapter(kept_tower(), place),
    "fold_checkpoint base": lambda place, bases, adapter: melora_fx.fold_checkpoint(place, adapter, adapter / "out"),
    "fold_checkpoint adapter": lambda place, bases, adapter: melora_fx.fold_checkpoint(
        bases.checkpoint, place, adapter / "out"
    ),
    "fold_onnx graph": lambda place, bases, adapter: fold_onnx(place, adapter, adapter / "out"),
    "OrtRunner": lambda place, bases, adapter: OrtRunner(place),
    "OrtRunner adapter": lambda place, bases, adapter: OrtRunner(bases.swap).run(INPUTS, adapter=place),
    "write_ort_adapter graph": lambda place, bases, adapter: write_ort_adapter(adapter, place, adapter / "out"),
    "write_gguf_adapter adapter": lambda place, bases, adapter: write_gguf_adapter(
        place, bases.checkpoint, adapter / "out"
    ),
    "write_gguf_adapter base": lambda place, bases, adapter: write_gguf_adapter(adapter, place, adapter / "out"),
    "write_mlx_adapter": lambda place, bases, adapter: write_mlx_adapter(place, adapter / "out"),
    "write_peft_adapter": lambda place, bases, adapter: write_peft_adapter(place, adapter / "out"),
    "read_peft_adapter": lambda place, bases, adapter: read_peft_adapter(place, adapter / "out"),
    "scale_adapter": lambda place, bases, adapter: scale_adapter(place, 1, adapter / "out"),
    "add_adapters": lambda place, bases, adapter: add_adapters({place: 1.0}, adapter / "out"),
    "average_adapters": lambda place, bases, adapter: average_adapters([place], adapter / "out"),
    "compress_adapter": lambda place, bases, adapter: compress_adapter(place, adapter / "out", rank=1),
    "check_tensorrt": lambda place, bases, adapter: check_tensorrt(place, shapes={}),
    "bench": lambda place, bases, adapter: run_bench(BenchOptions(graphs=(place,))),
    "load_model": lambda place, bases, adapter: load_model(place),
}
WRITTEN: dict[str, Callable[[Path, Bases, Path], object]] = {
    "save_adapter": lambda place, bases, adapter: melora_fx.save_adapter(adapted_kept_tower(), place),
    "fold_checkpoint": lambda place, bases, adapter: melora_fx.fold_checkpoint(bases.checkpoint, adapter, place),
    "fold_onnx": lambda place, bases, adapter: fold_onnx(bases.base, adapter, place),
    "fold_onnx file": lambda place, bases, adapter: fold_onnx(bases.base, adapter, f"{place}.onnx"),
    "export_onnx": lambda place, bases, adapter: export_onnx(kept_tower(), INPUTS, place, verify=False),
    "write_ort_adapter": lambda place, bases, adapter: write_ort_adapter(adapter, bases.swap, place),
    "scale_adapter": lambda place, bases, adapter: scale_adapter(adapter, 1, place),
    "add_adapters": lambda place, bases, adapter: add_adapters({adapter: 1.0}, place),
    "average_adapters": lambda place, bases, adapter: average_adapters([adapter], place),
    "compress_adapter": lambda place, bases, adapter: compress_adapter(adapter, place, rank=1),
    "write_peft_adapter": lambda place, bases, adapter: write_peft_adapter(adapter, place),
    "read_peft_adapter": lambda place, bases, adapter: read_peft_adapter(adapter.with_name("peft"), place),
    "write_triton_repository": lambda place, bases, adapter: write_triton_repository(
        bases.base, place, shapes={"batch": (1, 2, 3)}, provider="cpu", name="tower"
    ),
}
PLACES = {"long_name": "x" * 300, "long_path": "x/" * 3000, "nul": "a\0b"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, exports: Exports) -> Bases:
    return Bases.write(tmp_path_factory.mktemp("bases"), exports)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Our adapter folder; PEFT's form of it is next to it, in `peft`."""
    melora_fx.save_adapter(adapted_kept_tower(), tmp_path / "adapter")
    write_peft_adapter(tmp_path / "adapter", tmp_path / "peft")
    return tmp_path / "adapter"


@pytest.mark.default_cases("*-long_path")
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_read(read: Callable[..., object], place: str, bases: Bases, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(MELoRAError):
        read(tmp_path / place, bases, adapter)


@pytest.mark.default_cases("*-long_path", "*-below_a_file")
@pytest.mark.parametrize("place", [*PLACES.values(), "file/below"], ids=[*PLACES, "below_a_file"])
@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
def test_written(write: Callable[..., object], place: str, bases: Bases, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = {*tmp_path.iterdir()}
    with pytest.raises(MELoRAError):
        write(tmp_path / place, bases, adapter)
    assert {*tmp_path.iterdir()} == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a file system that nobody can write to")
@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
def test_written_where_nobody_may(write: Callable[..., object], bases: Bases, adapter: Path) -> None:
    with pytest.raises(MELoRAError, match="cannot be written"):
        write(Path("/proc/melora_fx/out"), bases, adapter)


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "fold_onnx file"])
def test_no_place(name: str, bases: Bases, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty string would be the working directory."""
    (adapter.parent / "empty").mkdir()
    monkeypatch.chdir(adapter.parent / "empty")
    with pytest.raises(ValueError, match="the place to write is ''"):
        WRITTEN[name]("", bases, adapter)
    assert not [*Path.cwd().iterdir()]


def test_weights_that_are_no_pickle_of_tensors(tmp_path: Path) -> None:
    bert_classifier(num_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(MELoRAError, match="the weights cannot be read"):
        load_model(tmp_path)


def test_safetensors_beside(tmp_path: Path) -> None:
    save_file(kept_tower().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(MELoRAError, match=r"has no config\.json"):
        load_model(tmp_path)
