"""Bases that change their type after the rewrite."""

from dataclasses import replace

import pytest
import torch
from support.coarse import Coarse, rounded
from support.lowered import (
    CONFIG,
    FEW,
    MANY,
    assert_close,
    linear,
    num_calls,
    step,
)
from support.models import (
    IN,
    OUT,
    Holder,
    adapted_weight,
    assert_near,
    fill,
    output_of,
    randn,
    site_update,
)
from torch import nn
from torch.nn import functional as F

import melora_fx


@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda m: m.to(torch.bfloat16), id="to_bfloat16"),
        pytest.param(lambda m: m.half(), id="half"),
        pytest.param(lambda m: m.double(), id="double"),
    ],
)
def test_conversion_after_the_rewrite(convert, leading, calls):
    model = linear()
    x = randn(*leading, IN)
    plain = convert(linear(replace(CONFIG, lowering="plain")))
    convert(model)
    site = melora_fx.sites(model)["inner"]
    assert site.lowering == "weight"
    x = x.to(site.weight.dtype)
    assert num_calls(calls, model, x) == 1
    expected = F.linear(x.double(), adapted_weight(site), site.owner.bias.double())
    assert_near(output_of(model, x), expected)
    for actual, other in zip(step(model, x), step(plain, x), strict=True):
        assert actual.dtype == other.dtype
        torch.testing.assert_close(actual, other, rtol=0, atol=2e-2 * float(other.abs().max()))


@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
def test_base_alone_in_bfloat16_after_the_rewrite(leading):
    model = linear()
    site = melora_fx.sites(model)["inner"]
    site.weight.data = site.weight.data.bfloat16()
    site.owner.bias.data = site.owner.bias.data.bfloat16()
    x = randn(*leading, IN, dtype=torch.bfloat16)
    assert_near(output_of(model, x), F.linear(x.double(), adapted_weight(site), site.owner.bias.double()))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
def test_weight_that_only_linear_can_read(leading, when):
    torch.manual_seed(4)
    model = Holder(nn.Linear(IN, OUT))
    x = randn(*leading, IN).requires_grad_()
    coarse = nn.Parameter(model.inner.weight.detach().as_subclass(Coarse), requires_grad=False)
    readable = rounded(model.inner.weight.detach()).double()
    if when == "before":
        model.inner.weight = coarse
    fill(melora_fx.rewrite(model, "inner", CONFIG))
    model.inner.weight = coarse
    site = melora_fx.sites(model)["inner"]
    assert site.lowering == ("activation" if when == "before" else "weight")
    adapted = readable + site_update(site).detach()
    output = model(x)
    assert_near(output, F.linear(x.detach().double(), adapted, model.inner.bias.detach().double()))
    output.sum().backward()
    assert_close(x.grad.double(), adapted.sum(0).expand(*leading, IN))
