"""Folds on the device: W + Δ is rounded once, no bit outside the blocks changes, and weights are restored exactly."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.cuda import (
    DEVICE,
    IS_DRY_RUN,
    ON_CUDA,
    assert_same,
    assert_sums_near,
    by_dtype,
    by_lowering_and_dtype,
    on_cpu,
)
from support.expert_stacks import CONFIG as OF_EXPERTS
from support.expert_stacks import Experts, inputs, the_site
from support.lowered import CONFIG, lowered
from support.models import (
    TOWER_CONFIG,
    TOWER_SITES,
    assert_unchanged,
    fill,
    output_of,
    randn,
    site_update,
    tower,
)
from torch import Tensor, nn

import melora_fx
from melora_fx import AdapterSite, MELoRAConfig

pytestmark = ON_CUDA


def on_device(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tower().to(DEVICE, dtype)


def rewritten(dtype: torch.dtype = torch.float32) -> nn.Module:
    return fill(melora_fx.rewrite(on_device(dtype), "all-linear", TOWER_CONFIG))


def x_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(4, 30, 24, dtype=dtype).to(DEVICE)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a tower's sites as they are stored, by site."""
    paths = {name: name if name == "own.projection" else f"{name}.weight" for name in TOWER_SITES}
    return {name: on_cpu(model.get_parameter(path)).clone() for name, path in paths.items()}


def update_of(site: AdapterSite) -> tuple[Tensor, Tensor]:
    """Returns Δ in float64 on the CPU in the weight's layout, and |s B| |A|, which bounds the error of its product."""
    a, b = site.lora_a.detach(), site.lora_b.detach()
    updates = []
    for lora_a, lora_b in ((a, b), (a.abs(), b.abs())):
        update = on_cpu(site_update(_with(site, lora_a, lora_b)))
        updates.append(update.mT if site.weight_is_transposed else update)
    return updates[0], updates[1]


def _with(site: AdapterSite, lora_a: Tensor, lora_b: Tensor) -> Any:
    """Returns the site with other factors."""
    changed = copy.copy(site)
    object.__setattr__(changed, "lora_a", lora_a)
    object.__setattr__(changed, "lora_b", lora_b)
    return changed


def assert_rounded_once(weight: Tensor, before: Tensor, update: Tensor, reach: Tensor) -> None:
    """Checks `weight` against `before` + `update`: within half a step of its dtype and Δ's error in float32.

    Values without an update must have the bits of `before`.
    """
    exact = before.double() + update
    half_step = torch.finfo(weight.dtype).eps / 2
    bound = half_step * exact.abs() * 1.01 + 8 * torch.finfo(torch.float32).eps * (reach + before.abs()) + 1e-7
    assert ((weight.double() - exact).abs() <= bound).all()
    assert_same(weight[update == 0], before[update == 0])


@by_lowering_and_dtype()
def test_disabled_is_the_base_bit_for_bit_whatever_the_adapter_holds(lowering, dtype):
    model = lowered(lambda: on_device(dtype), lowering)
    expected = output_of(on_device(dtype), x_of(dtype))
    for value in (1.0, math.nan):
        for parameter in melora_fx.adapter_parameters(model).values():
            parameter.data.fill_(value)
        with melora_fx.disabled(model):
            assert_same(output_of(model, x_of(dtype)), expected)
    assert output_of(model, x_of(dtype)).isnan().all()


@by_dtype()
def test_folded_gives_every_bit_back(dtype):
    model = rewritten(dtype)
    before = copy.deepcopy(dict(model.state_dict()))
    adapted = output_of(model, x_of(dtype))
    with melora_fx.folded(model):
        assert_sums_near(output_of(model, x_of(dtype)), adapted.double(), 10)
        assert not torch.equal(model.up.weight, before["up.weight"])
    assert_same(dict(model.state_dict()), before)
    assert_same(output_of(model, x_of(dtype)), adapted)


@by_dtype()
def test_fold_rounds_each_sum_once_and_touches_the_blocks_alone(dtype):
    model = rewritten(dtype)
    before = stored(model)
    updates = {name: update_of(site) for name, site in melora_fx.sites(model).items()}
    after = stored(melora_fx.fold(model))
    assert updates.keys() == after.keys()
    for name, (update, reach) in updates.items():
        assert_rounded_once(after[name], before[name], update, reach)


@contextmanager
def tf32_allowed() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


LARGE = MELoRAConfig(rank=8, num_blocks=8)


def large(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 2816)).to(DEVICE, dtype)
    return fill(melora_fx.rewrite(model, "all-linear", LARGE))


@by_dtype()
def test_fold_does_not_depend_on_tf32(dtype):
    expected = melora_fx.fold(large(dtype))[0].weight
    model = large(dtype)
    with tf32_allowed():
        folded = melora_fx.fold(model)[0].weight
    assert_same(folded, expected)


@by_dtype()
def test_fold_of_a_large_layer(dtype):
    model = large(dtype)
    before = on_cpu(model[0].weight).clone()
    update, reach = update_of(melora_fx.sites(model)["0"])
    assert_rounded_once(on_cpu(melora_fx.fold(model)[0].weight), before, update, reach)


@by_dtype()
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
def test_fold_of_a_stack_of_experts(transposed, dtype):
    given = {name: value.to(DEVICE) for name, value in inputs(dtype=dtype).items()}
    plain = Experts("batched_mm", dtype=dtype, transposed=transposed).eval().to(DEVICE)
    model = fill(melora_fx.rewrite(plain, "stack", OF_EXPERTS, example_inputs=given))
    before = on_cpu(the_site(model).weight).clone()
    update, reach = update_of(the_site(model))
    adapted = output_of(model, given)
    melora_fx.fold(model)
    (weight,) = model.parameters()
    assert_rounded_once(on_cpu(weight), before, update, reach)
    assert_sums_near(output_of(model, given), adapted.double(), 4)


@by_dtype()
def test_folded_model_computes_what_the_adapted_one_did(dtype):
    model = rewritten(dtype)
    adapted = output_of(model, x_of(dtype))
    assert_sums_near(output_of(melora_fx.fold(model), x_of(dtype)), adapted.double(), 10)


def test_fold_is_in_place_and_leaves_no_trace():
    plain = on_device()
    types = {name: type(module) for name, module in plain.named_modules()}
    places = {name: parameter.data_ptr() for name, parameter in plain.named_parameters()}
    model = melora_fx.fold(fill(melora_fx.rewrite(plain, "all-linear", TOWER_CONFIG)))
    assert model is plain
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    assert all(parameter.requires_grad for parameter in model.parameters())


@by_dtype()
def test_check_fold_measures_what_it_does_on_the_cpu(dtype):
    model = rewritten(dtype)
    with assert_unchanged(model):
        report = melora_fx.check_fold(model)
    reference = {site.name: site for site in melora_fx.check_fold(copy.deepcopy(model).cpu()).sites}
    share = 0.3 if dtype == torch.float32 else 0.02  # in float32 another last bit of Δ is rounded differently
    for site in report.sites:
        expected = reference[site.name]
        assert site.rounding_share == pytest.approx(expected.rounding_share, rel=share)
        assert site.max_abs_change == pytest.approx(expected.max_abs_change, rel=0.02)
        assert (site.ranks, site.dtype) == (expected.ranks, expected.dtype)


def test_a_sum_beyond_float16_is_refused_and_nothing_is_changed():
    model = rewritten(torch.float16)
    melora_fx.sites(model)["up"].lora_b.data.fill_(1e6)
    text = "`up`: the sum of weight and update is beyond the range of float16"
    with assert_unchanged(model), pytest.raises(melora_fx.MELoRAError, match=text):
        melora_fx.fold(model)


@pytest.mark.skipif(IS_DRY_RUN, reason="compares the device with the CPU")
@by_dtype()
def test_a_fold_on_the_cpu_is_the_same_up_to_the_last_bit_of_the_update(dtype):
    model = rewritten(dtype)
    reference = stored(melora_fx.fold(copy.deepcopy(model).cpu()))
    folded = stored(melora_fx.fold(model))
    for name, weight in folded.items():
        step = torch.finfo(dtype).eps * reference[name].double().abs()
        assert ((weight.double() - reference[name].double()).abs() <= step + 1e-6).all()


def test_untrained_fold_changes_no_bit():
    model = melora_fx.rewrite(on_device(), "all-linear", CONFIG)
    assert_same(dict(melora_fx.fold(model).state_dict()), dict(on_device().state_dict()))
