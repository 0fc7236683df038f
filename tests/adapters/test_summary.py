"""`melora-fx adapter inspect`: what an adapter contains, and whether it is intact and belongs to its base."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.adapter_files import edit_tensors
from support.command_line import run
from support.models import adapted_kept_tower, dense_update, kept_tower, tower

import melora_fx
from exporters.adapters.summary import summarise_adapter
from melora_fx import MELoRAError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    melora_fx.save_adapter(adapted_kept_tower(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_numbers_are_those_of_the_updates(folder: Path) -> None:
    model = adapted_kept_tower()
    summary = summarise_adapter(folder)
    assert [site.name for site in summary.sites] == ["up", "gate", "conv"]
    for site in summary.sites:
        found = melora_fx.sites(model)[site.name]
        update = dense_update(found.config, found.lora_a.detach(), found.lora_b.detach())
        np.testing.assert_allclose(site.update_norm, float(torch.linalg.matrix_norm(update)), rtol=1e-5)
        assert site.used_rank == int(torch.linalg.matrix_rank(update)) == site.total_rank == 5
    assert summary.kept == {"norm": 72}
    assert summary.num_parameters == 3 * 5 * (24 + 36) // 3
    assert (summary.format_version, summary.model["class"]) == (2, "Tower")
    assert summary.sha256 is not None
    assert "up    24   36  3 × 1–2        5      float32     5 of 5" in str(summary)


def test_a_damaged_one_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["up.lora_b"].mul_(2), sign=False)
    with pytest.raises(MELoRAError, match="has changed since it was written"):
        summarise_adapter(folder)


def test_the_command_shows_it_and_checks_the_base(folder: Path, tmp_path: Path) -> None:
    save_file(kept_tower().state_dict(), tmp_path / "model.safetensors")
    result = run("adapter", "inspect", folder, "--base", tmp_path)
    assert result.returncode == 0
    assert "checked" in result.stdout
    assert f"the adapter belongs to the base in {tmp_path}" in result.stdout
    as_json = json.loads(run("adapter", "inspect", folder, "--json").stdout)
    assert as_json["sites"][0]["name"] == "up"
    save_file(tower(seed=5).state_dict(), tmp_path / "model.safetensors")
    result = run("adapter", "inspect", folder, "--base", tmp_path)
    assert result.returncode == 1
    assert "was trained on another base model" in result.stderr
