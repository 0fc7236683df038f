"""The share of an update that a fold rounds away: against float64, its table, its warning, and the ranks in use."""

import copy
import warnings

import pytest
import torch
from support.models import (
    TOWER_CONFIG,
    TOWER_SITES,
    adapted_weight,
    assert_unchanged,
    fill,
    randn,
    rewritten_tower,
    site_update,
    tower,
)

import melora_fx
from melora_fx import FoldReport, MELoRAConfig, MELoRAError, SiteFold
from melora_fx.folding.report import LARGE_SHARE


def narrow_tower(dtype: torch.dtype, scale: float = 1.0, config: MELoRAConfig = TOWER_CONFIG) -> torch.nn.Module:
    model = fill(melora_fx.rewrite(tower().to(dtype), "all-linear", config))
    with torch.no_grad():
        for site in melora_fx.sites(model).values():
            site.lora_b.mul_(scale)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("captured", [False, True], ids=["in_place", "whole"])
def test_shares_and_changes_are_those_of_the_fold(dtype: torch.dtype, captured: bool) -> None:
    options = {"example_inputs": (randn(2, 24, dtype=dtype),)} if captured else {}
    model = fill(melora_fx.rewrite(tower().to(dtype), "all-linear", TOWER_CONFIG, **options))
    with assert_unchanged(model):
        report = melora_fx.check_fold(model)
    measured = {site.name: site for site in report.sites}
    assert set(measured) == set(TOWER_SITES)
    exact = {name: adapted_weight(site) for name, site in melora_fx.sites(model).items()}
    norms = {name: site_update(site).detach().norm() for name, site in melora_fx.sites(model).items()}
    before = {name: site.weight.detach().double() for name, site in melora_fx.sites(model).items()}
    weights = {name: site.weight for name, site in melora_fx.sites(model).items()}
    melora_fx.fold(model)
    for name, site in measured.items():
        folded = weights[name].detach().double()
        assert site.max_abs_change == pytest.approx(float((folded - before[name]).abs().max()), rel=1e-6)
        folded = folded.t() if name == "conv" else folded
        share = float((folded - exact[name]).norm() / norms[name])
        if dtype == torch.float32:  # the update itself is rounded as much as the sum, which is not measured
            assert share / 4 < site.rounding_share < 1.5 * share
        else:
            assert site.rounding_share == pytest.approx(share, rel=1e-3)
        assert site.dtype == str(dtype).removeprefix("torch.")
    assert [site.rounding_share for site in report.sites] == sorted(
        (site.rounding_share for site in report.sites), reverse=True
    )


def test_an_update_that_bfloat16_mostly_rounds_away_warns_and_names_the_remedy() -> None:
    model = narrow_tower(torch.bfloat16, scale=1e-3)
    with pytest.warns(UserWarning, match=r"5 of 5 sites lose more than 25% .*bfloat16, worst `.*keep the adapter"):
        report = melora_fx.check_fold(model)
    assert report.sites[0].rounding_share > LARGE_SHARE
    assert "fold(copy.deepcopy(model).float())" in str(report)
    assert melora_fx.check_fold(copy.deepcopy(model).float()).sites[0].rounding_share < 1e-2  # the remedy


def test_nothing_is_lost_by_an_update_of_zeros() -> None:
    report = melora_fx.check_fold(melora_fx.rewrite(tower(), "all-linear", TOWER_CONFIG))
    assert {(site.rounding_share, site.max_abs_change, sum(site.ranks)) for site in report.sites} == {(0.0, 0.0, 0)}


def test_rank_is_that_of_each_block() -> None:
    config = MELoRAConfig(rank=(1, 4, 2), num_blocks=3)
    model = fill(melora_fx.rewrite(tower(), "up", config))
    (site,) = melora_fx.sites(model).values()
    with torch.no_grad():
        site.lora_b[1, :, 2] = 3 * site.lora_b[1, :, 0]  # the same direction twice
        site.lora_a[2, 1] *= 1e-12  # practically zero
    (found,) = melora_fx.check_fold(model).sites
    expected = [torch.linalg.matrix_rank((b @ a).double(), rtol=1e-5) for b, a in zip(site.lora_b, site.lora_a)]  # noqa: B905
    assert found.ranks == tuple(expected) == (1, 3, 1)
    assert found.total_rank == 7


def test_rank_of_packed_parts_and_of_factors_wider_than_their_blocks() -> None:
    model = fill(melora_fx.rewrite(tower(), "up", MELoRAConfig(rank=2, num_blocks=2, split=(20, 16))))
    assert melora_fx.check_fold(model).sites[0].ranks == (2, 2, 2, 2)
    model = fill(melora_fx.rewrite(tower(), "up", MELoRAConfig(rank=8, num_blocks=12)))
    (found,) = melora_fx.check_fold(model).sites
    assert found.ranks == (2,) * 12  # a block is 3 × 2
    assert found.total_rank == 96


def test_the_table_shows_the_worst_first_and_not_more_than_a_screen() -> None:
    sites = tuple(SiteFold(f"layer.{i}", "bfloat16", 0.2 - i / 1000, 1e-3, (8, 7), 16) for i in range(30))
    lines = str(FoldReport(sites, "0" * 64, ("something",))).splitlines()
    assert lines[1].split() == ["layer.0", "bfloat16", "20.00%", "1.0e-03", "15", "of", "16"]
    assert lines[21] == "… and 10 sites with less, 18.00% at most"
    assert lines[-1] == "note: something"


def test_refusals_are_those_of_a_fold() -> None:
    with pytest.raises(MELoRAError, match="`check_fold` needs a rewritten model"):
        melora_fx.check_fold(tower())
    model = rewritten_tower()
    with melora_fx.folded(model), pytest.raises(MELoRAError, match="`check_fold` inside `folded`"):
        melora_fx.check_fold(model)
    with torch.no_grad():
        melora_fx.adapter_parameters(model)["up.lora_a"][0, 0, 0] = float("nan")
    with pytest.raises(MELoRAError, match="`up`: its adapter holds NaN or infinity"):
        melora_fx.check_fold(model)


def test_the_report_names_the_adapter(tmp_path) -> None:
    model = rewritten_tower()
    melora_fx.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert melora_fx.check_fold(model).adapter_sha256 == melora_fx.saving.adapter_file.read_adapter(tmp_path).sha256
