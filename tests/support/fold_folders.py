"""Folders for folds on disk (a base, an adapter and the result), which are written, read, edited and compared."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter import hash_file
from support.models import (
    fill,
    randn,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
BLOCKS = MELoRAConfig(rank=(2, 1, 2), num_blocks=3, alpha=(3.0, 1.0, 2.0))


@dataclass(frozen=True)
class Folders:
    """The folders of a test; `parent` contains nothing else."""

    parent: Path

    @property
    def base(self) -> Path:
        return self.parent / "base"

    @property
    def adapter(self) -> Path:
        return self.parent / "adapter"

    @property
    def out(self) -> Path:
        return self.parent / "out"

    def prepare(
        self,
        model: Any,
        targets: Any,
        config: MELoRAConfig = BLOCKS,
        *,
        sharded: bool = False,
        keep: str | Sequence[str] = (),
        trained: Any = None,
        seed: int = 0,
        **options: Any,
    ) -> Any:
        """Writes `model` as the base, and an adapter trained in class `trained`, or its own; returns that model."""
        model.save_pretrained(self.base, max_shard_size="20KB" if sharded else "5GB")
        rewritten = (trained or type(model)).from_pretrained(self.base, **options).eval()
        rewritten = fill(melora_fx.rewrite(rewritten, targets, config, keep_trainable=keep), seed)
        for name, value in kept_values(rewritten).items():
            value.copy_(randn(*value.shape, seed=len(name)))
        melora_fx.save_adapter(rewritten, self.adapter)
        return rewritten

    def in_memory(self, model_class: Any, **options: Any) -> tuple[Any, melora_fx.FoldReport]:
        """Returns the model folded in memory, and the report of `check_fold` on it."""
        model = melora_fx.load_adapter(model_class.from_pretrained(self.base, **options).eval(), self.adapter)
        report = melora_fx.check_fold(model)
        return melora_fx.fold(model), report

    def fold(self, out: Path | None = None) -> melora_fx.FoldReport:
        """Folds, and checks that no byte of the base changes and that only the output folder is created."""
        before = content_of(self.base)
        others = names(self.parent)
        report = melora_fx.fold_checkpoint(self.base, self.adapter, out or self.out)
        assert content_of(self.base) == before
        assert names(self.parent) == others | {(out or self.out).name}
        return report

    @contextmanager
    def refused(self, text: str) -> Iterator[None]:
        """Checks that the block raises this error and writes nothing."""
        before = content_of(self.parent)
        others = names(self.parent)
        with pytest.raises(MELoRAError, match=text):
            yield
        assert names(self.parent) == others
        assert content_of(self.parent) == before

    def assert_refused(self, text: str, out: str | Path | None = None) -> None:
        with self.refused(text):
            melora_fx.fold_checkpoint(self.base, self.adapter, self.out if out is None else out)


def kept_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the tensors that are trained in addition to the adapters."""
    own = {id(parameter) for parameter in melora_fx.adapter_parameters(model).values()}
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and id(p) not in own}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def content_of(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Returns bytes, mode and modification time of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.lstat().st_mode, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def bits(state: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Returns tensors in a form that is equal only for the same bits."""
    return {
        name: (value.dtype, value.shape, value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in state.items()
    }


def stored(folder: Path) -> dict[str, tuple[str, str, list[int], bytes]]:
    """Reads the safetensors files of a folder by hand: returns key → (file, dtype, shape, bytes)."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for key, entry in header.items():
            first, end = entry["data_offsets"]
            assert key not in found, "each tensor once"
            found[key] = (path.name, entry["dtype"], entry["shape"], data[start + first : start + end])
    return found


def assert_only_these_differ(folders: Folders, keys: set[str], added: Sequence[str] = ()) -> None:
    """Checks that only the tensors `keys` differ from the base, and that each tensor is in the same file as before."""
    before = stored(folders.base)
    after = stored(folders.out)
    assert set(after) == {*before, *added}
    assert {key for key in before if after[key] != before[key]} == keys
    assert {key: value[0] for key, value in before.items()} == {key: after[key][0] for key in before}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites a safetensors file with changed tensors."""
    tensors = load_file(path)
    metadata = metadata_of(path)
    change(tensors)
    header = json.loads(metadata.get("melora", "{}"))
    if "sha256" in header:
        metadata["melora"] = json.dumps(header | {"sha256": hash_file(header, tensors)})
    save_file(tensors, path, metadata)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def llama() -> LlamaForCausalLM:
    """Returns a Llama with four query heads and two key-value heads: k and v are (12, 24)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=51,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


OTHERS = {
    "tokenizer.json": b'{"version": "1.0"}',
    "vocab.txt": b"[PAD]\n\xff\x00",
    "generation_config.json": b"{}",
    "README.md": b"# A model",
    "LICENSE": b"",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "2_Dense/model.safetensors": b"not the model's weights",
    "2_Dense/deep/er/pytorch_model.bin": b"nor these",
}


def add_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
