"""`compress_adapter`: against the singular values of the dense blocks in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_adapters import IN, OUT, made_adapter, updates_of
from support.models import bert_classifier, fill, output_of, randn, site_update, tokens

import melora_fx
from exporters import CompressReport, average_adapters, compress_adapter, scale_adapter
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter_file import read_adapter

CASES: dict[str, tuple[MELoRAConfig, dict[str, Any]]] = {
    "plain": (MELoRAConfig(rank=5, num_blocks=3, alpha=4.0), {}),
    "one block": (MELoRAConfig(rank=6, num_blocks=1), {}),
    "ranks": (MELoRAConfig(rank=(1, 6, 3), num_blocks=3, alpha=(4.0, 1.5, 7.0)), {}),
    "rslora": (MELoRAConfig(rank=(4, 2, 7), num_blocks=3, alpha=3.0, use_rslora=True), {}),
    "split": (MELoRAConfig(rank=4, num_blocks=3, split=2), {}),
    "uneven split": (MELoRAConfig(rank=(6, 2, 4), num_blocks=3, split=(6, 30)), {}),
    "experts": (MELoRAConfig(rank=(4, 2, 6), num_blocks=3), {"num_experts": 4}),
    "experts with parts": (MELoRAConfig(rank=4, num_blocks=2, split=2), {"num_experts": 3}),
    "bfloat16": (MELoRAConfig(rank=(4, 2, 5), num_blocks=3), {"dtype": torch.bfloat16}),
    "float64": (MELoRAConfig(rank=4, num_blocks=3), {"dtype": torch.float64}),
}
RANK = 2


def dense_blocks(config: MELoRAConfig, update: torch.Tensor) -> list[torch.Tensor]:
    """Returns the blocks (O_p/N, I/N) of an update (E·O, I), part by part."""
    blocks = []
    for matrix in update.split(OUT):
        for part in matrix.split(config.parts(OUT)):
            rows, columns = part.size(0) // config.num_blocks, IN // config.num_blocks
            blocks += [
                part[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] for i in range(config.num_blocks)
            ]
    return blocks


@pytest.mark.parametrize("case", CASES)
def test_each_block_is_the_nearest_of_its_rank(case: str, tmp_path: Path) -> None:
    config, options = CASES[case]
    folder = made_adapter(tmp_path / "a", {"up": config}, **options)
    report = compress_adapter(folder, tmp_path / "out", rank=RANK)
    (before,), (after,) = updates_of(folder).values(), updates_of(tmp_path / "out").values()
    lost = 0.0
    for block, small in zip(dense_blocks(config, before), dense_blocks(config, after), strict=True):
        u, values, vh = torch.linalg.svd(block, full_matrices=False)
        best = u[:, :RANK] * values[:RANK] @ vh[:RANK]
        torch.testing.assert_close(small, best, rtol=0, atol=3e-7 * float(values[0]))
        lost += float(values[RANK:].square().sum())
    norm = float(torch.linalg.matrix_norm(before))
    (site,) = report.sites
    assert site.relative_error == pytest.approx(lost**0.5 / norm, rel=1e-9)
    assert site.relative_error == pytest.approx(float(torch.linalg.matrix_norm(before - after)) / norm, rel=1e-5)
    assert (site.ranks_before, site.ranks_after) == (config.ranks, tuple(min(rank, RANK) for rank in config.ranks))
    assert read_adapter(tmp_path / "out").configs["up"].ranks == site.ranks_after


def test_new_blocks_are_balanced_and_others_keep_their_values(tmp_path: Path) -> None:
    config = CASES["ranks"][0]
    folder = made_adapter(tmp_path / "a", {"up": config, "small": MELoRAConfig(rank=2, num_blocks=3)})
    compress_adapter(folder, tmp_path / "out", rank=RANK)
    before, after = read_adapter(folder), read_adapter(tmp_path / "out")
    assert after.configs["small"] == before.configs["small"]
    assert all(torch.equal(after.tensors[name], before.tensors[name]) for name in ("small.lora_a", "small.lora_b"))
    own, new = before.tensors_of("up"), after.tensors_of("up")
    assert new.config.scalings == (4.0, 1.0, 1.0)
    assert torch.equal(new.lora_a[0, :1], own.lora_a[0, :1])
    assert torch.equal(new.lora_b[0, :, :1], own.lora_b[0, :, :1])
    norms = torch.linalg.vector_norm(new.lora_a[1:], dim=2), torch.linalg.vector_norm(new.lora_b[1:], dim=1)
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)


def test_nothing_is_lost_above_the_true_rank(tmp_path: Path) -> None:
    """The mean of an adapter and itself has twice the ranks but the same update; other ranks are above their sizes."""
    config = MELoRAConfig(rank=(1, 3, 2), num_blocks=3, alpha=3.0)
    folder = made_adapter(tmp_path / "a", {"up": config})
    average_adapters([folder, folder], tmp_path / "mean")
    report = compress_adapter(tmp_path / "mean", tmp_path / "out", rank=3)
    assert report.sites[0].ranks_after == (2, 3, 3)
    assert report.largest_error < 1e-7
    torch.testing.assert_close(updates_of(tmp_path / "out")["up"], updates_of(folder)["up"], rtol=0, atol=1e-6)
    wide = made_adapter(tmp_path / "wide", {"up": MELoRAConfig(rank=20, num_blocks=3, split=(6, 30))})
    report = compress_adapter(wide, tmp_path / "out", rank=15)
    assert (report.sites[0].ranks_after, report.largest_error) == ((8, 8, 8), 0.0)
    torch.testing.assert_close(updates_of(tmp_path / "out")["up"], updates_of(wide)["up"], rtol=0, atol=1e-5)


def test_a_zero_update_has_no_error(tmp_path: Path) -> None:
    folder = made_adapter(tmp_path / "a", {"up": MELoRAConfig(rank=4, num_blocks=3)})
    scale_adapter(folder, 0, tmp_path / "zero")
    assert compress_adapter(tmp_path / "zero", tmp_path / "out", rank=1).largest_error == 0
    assert not updates_of(tmp_path / "out")["up"].any()


def test_the_report_is_a_table(tmp_path: Path) -> None:
    configs = {"up": MELoRAConfig(rank=(1, 3, 4), num_blocks=3), "gate": MELoRAConfig(rank=1, num_blocks=3)}
    report = compress_adapter(made_adapter(tmp_path / "a", configs), tmp_path / "out", rank=2)
    assert isinstance(report, CompressReport)
    lines = str(report).splitlines()
    assert lines[0].split() == ["site", "blocks", "rank", "now", "‖Δ", "−", "Δ'‖", "/", "‖Δ‖"]
    assert lines[1].split()[:4] == ["up", "3", "1–4", "1–2"]
    assert lines[2].split() == ["gate", "3", "1", "1", "0"]
    assert report.largest_error == report.sites[0].relative_error > 0
    assert lines[-1].startswith(f"{tmp_path / 'out'}: the largest relative error is 0.")


def test_a_trained_head_and_the_facts_of_the_model_stay(tmp_path: Path) -> None:
    facts = {"class": "Tower", "num_labels": 2, "labels": ["x", "y"]}
    folder = made_adapter(
        tmp_path / "a", {"up": MELoRAConfig(rank=4, num_blocks=3)}, kept={"head": randn(3, 4)}, model=facts
    )
    compress_adapter(folder, tmp_path / "out", rank=1)
    before, after = read_adapter(folder), read_adapter(tmp_path / "out")
    assert (after.kept, after.model, after.fingerprints) == (before.kept, before.model, before.fingerprints)
    assert torch.equal(after.tensors["head"], before.tensors["head"])


@pytest.mark.slow
def test_it_loads_trains_and_folds_like_any_adapter(tmp_path: Path) -> None:
    config = MELoRAConfig(rank=4, num_blocks=3)
    melora_fx.save_adapter(fill(melora_fx.rewrite(bert_classifier(num_layers=1), ["query"], config)), tmp_path / "a")
    compress_adapter(tmp_path / "a", tmp_path / "out", rank=2)
    model = melora_fx.load_adapter(bert_classifier(num_layers=1), tmp_path / "out")
    expected = updates_of(tmp_path / "out")
    for name, site in melora_fx.sites(model).items():
        torch.testing.assert_close(site_update(site).detach(), expected[name], rtol=0, atol=0)
    outputs = output_of(model, tokens())
    model(**tokens()).logits.sum().backward()
    assert all(parameter.grad.any() for parameter in melora_fx.adapter_parameters(model).values())
    torch.testing.assert_close(output_of(melora_fx.fold(model), tokens()), outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "error", "text"),
    [
        (0, ValueError, r"`rank` \(=0\) must be at least 1"),
        (True, TypeError, "`rank` must be an int, got True"),
        (2.0, TypeError, "`rank` must be an int, got 2.0"),
        ((1, 2), TypeError, r"`rank` must be an int, got \(1, 2\)"),
    ],
    ids=["zero", "bool", "float", "tuple"],
)
def test_bad_ranks_are_refused(rank: Any, error: type[Exception], text: str, tmp_path: Path) -> None:
    folder = made_adapter(tmp_path / "a", {"up": MELoRAConfig(rank=4, num_blocks=3)})
    with pytest.raises(error, match=text):
        compress_adapter(folder, tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def test_the_input_is_never_written(tmp_path: Path) -> None:
    folder = made_adapter(tmp_path / "a", {"up": MELoRAConfig(rank=4, num_blocks=3)})
    before = (folder / "adapter.safetensors").read_bytes()
    with pytest.raises(MELoRAError, match="is the folder that is read"):
        compress_adapter(folder, folder, rank=1)
    assert (folder / "adapter.safetensors").read_bytes() == before
