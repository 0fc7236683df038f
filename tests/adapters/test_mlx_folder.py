"""MLX adapter folders that are damaged, or contain something other than LoRA: one clear error each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.adapters.mlx_adapter import CONFIG_FILE, TENSORS_FILE, read_mlx_folder
from melora_fx import MELoRAError


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / CONFIG_FILE).read_text())
        change(content)
        (folder / CONFIG_FILE).write_text(json.dumps(content))

    return damage


def _parameters(**values: Any) -> Callable[[Path], object]:
    return _config(lambda content: content["lora_parameters"].update(values))


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS_FILE)
        change(tensors)
        save_file(tensors, folder / TENSORS_FILE)

    return damage


def _cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


DOWN = "model.layers.0.mlp.down_proj"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / CONFIG_FILE).unlink(), f"it has no {CONFIG_FILE}"),
    "no tensors": (lambda folder: (folder / TENSORS_FILE).unlink(), f"it has no {TENSORS_FILE}"),
    "configuration cut": (_cut(CONFIG_FILE), f"{CONFIG_FILE}` is not JSON"),
    "tensors cut": (_cut(TENSORS_FILE), f"{TENSORS_FILE}` cannot be read, it is truncated or corrupt"),
    "a list": (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "not mlx_lm's configuration of a LoRA"),
    "brackets": (lambda folder: (folder / CONFIG_FILE).write_text("[" * 10**5), "is not JSON"),
    "DoRA": (_config(lambda content: content.update(fine_tune_type="dora")), "is DoRA.*`mlx_lm.fuse`"),
    "full": (_config(lambda content: content.update(fine_tune_type="full")), "is full fine-tuning.*`mlx_lm.fuse`"),
    "another kind": (_config(lambda content: content.update(fine_tune_type=["x"])), "must have `fine_tune_type`"),
    "no parameters": (_config(lambda content: content.pop("lora_parameters")), "must have .*`lora_parameters`"),
    "alpha": (_config(lambda content: content["lora_parameters"].pop("scale")), "a finite `scale`"),
    "scale NaN": (_parameters(scale=float("nan")), "NaN is not a JSON number"),
    "scale of 400 digits": (_parameters(scale=10**400), "a finite `scale`"),
    "scale true": (_parameters(scale=True), "a finite `scale`"),
    "rank zero": (_parameters(rank=0), "a `rank` of at least 1"),
    "rank of text": (_parameters(rank="4"), "a `rank` of at least 1"),
    "another rank": (_parameters(rank=5), f"`{DOWN}`: lora_a is .*does not fit the rank 5"),
    "nothing": (_tensors(lambda tensors: tensors.clear()), "it is empty"),
    "one is missing": (_tensors(lambda tensors: tensors.pop(f"{DOWN}.lora_b")), f"`{DOWN}.lora_b` is missing"),
    "magnitudes": (_tensors(lambda tensors: tensors.update({f"{DOWN}.m": torch.ones(32)})), f"`{DOWN}` is DoRA"),
    "a weight": (
        _tensors(lambda tensors: tensors.update({f"{DOWN}.weight": torch.ones(2)})),
        f"`{DOWN}.weight` is not part of a LoRA",
    ),
    "an embedding": (
        _tensors(lambda tensors: [tensors.update({f"model.embed_tokens.lora_{x}": torch.ones(4, 4)}) for x in "ab"]),
        "`model.embed_tokens` is an embedding",
    ),
    "transposed": (
        _tensors(lambda tensors: tensors.update({f"{DOWN}.lora_a": tensors[f"{DOWN}.lora_a"].T.contiguous()})),
        f"`{DOWN}`: lora_a is \\(4, 48\\)",
    ),
    "stacks of 3 and 2 experts": (
        _tensors(lambda t: t.update({f"{DOWN}.lora_a": torch.ones(3, 4, 48), f"{DOWN}.lora_b": torch.ones(2, 32, 4)})),
        f"`{DOWN}`: lora_a is \\(3, 4, 48\\)",
    ),
    "a number": (
        _tensors(lambda tensors: tensors.update({f"{DOWN}.lora_b": torch.tensor(1.0)})),
        f"`{DOWN}`: .* lora_b \\(\\)",
    ),
    "no numbers": (
        _tensors(lambda tensors: tensors.update({f"{DOWN}.lora_b": torch.ones(4, 0)})),
        f"`{DOWN}` holds .*, or nothing",
    ),
    "integers": (
        _tensors(lambda tensors: tensors.update({f"{DOWN}.lora_b": torch.ones(4, 32, dtype=torch.int32)})),
        f"`{DOWN}` holds torch.float32 and torch.int32",
    ),
    "NaN": (_tensors(lambda tensors: tensors[f"{DOWN}.lora_b"].fill_(torch.nan)), f"`{DOWN}` holds NaN"),
}


@pytest.mark.parametrize(("damage", "text"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_folders_are_refused(damage: Callable[[Path], object], text: str, tmp_path: Path) -> None:
    folder = tmp_path / "mlx"
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(
        json.dumps({"num_layers": 1, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}})
    )
    save_file({f"{DOWN}.lora_a": torch.ones(48, 4), f"{DOWN}.lora_b": torch.ones(4, 32)}, folder / TENSORS_FILE)
    assert read_mlx_folder(folder)[DOWN].scale == 20
    damage(folder)
    with pytest.raises(MELoRAError, match=text) as caught:
        read_mlx_folder(folder)
    assert str(folder) in str(caught.value)
