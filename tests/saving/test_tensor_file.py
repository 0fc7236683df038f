"""Files of tensors: the same bytes each time, and what safetensors itself would write."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from support.models import assert_equal, bert_classifier, fill, randn

import melora_fx
from melora_fx import MELoRAConfig
from melora_fx.saving.tensor_file import write_tensors


def mixed_tensors() -> dict[str, torch.Tensor]:
    """Returns tensors of several widths, the narrow and odd ones first, and one that is not contiguous."""
    return {
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "halves": randn(3, dtype=torch.bfloat16),
        "transposed": randn(3, 5).mT,
        "matrix": randn(3, 5),
        "nothing": torch.zeros(0, 3),
        "number": torch.tensor(7),
    }


def test_one_adapter_gives_one_file(tmp_path: Path) -> None:
    """Eight files leave a random order of two keys one chance in 128."""
    config = MELoRAConfig(rank=2, num_blocks=3)
    model = fill(melora_fx.rewrite(bert_classifier(), "query", config, keep_trainable="classifier"))
    folders = [tmp_path / str(number) for number in range(8)]
    for folder in folders:
        melora_fx.save_adapter(model, folder)
    for name in ("adapter.safetensors", "adapter_config.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


def test_order_in_which_the_content_is_given_does_not_matter(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    metadata = {"format": "pt", "melora": "{}", "more": ""}
    write_tensors(tmp_path / "forwards", tensors, metadata)
    write_tensors(tmp_path / "backwards", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "forwards").read_bytes() == (tmp_path / "backwards").read_bytes()


def test_file_is_what_safetensors_reads_back(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    metadata = {"melora": '{"ü": "\\n"}', "format": "pt"}
    write_tensors(tmp_path / "file", tensors, metadata)
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == set(tensors)
        assert_equal({name: file.get_tensor(name) for name in tensors}, tensors)


def test_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    """With one entry of metadata, so that safetensors' order is not random."""
    tensors = mixed_tensors()
    write_tensors(tmp_path / "file", tensors, {"format": "pt"})
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "file").read_bytes() == save(contiguous, {"format": "pt"})
