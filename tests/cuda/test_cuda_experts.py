"""Experts on the device: each row times its expert's W + Δ, and its gradients, in both forms and all dtypes."""

import pytest
import torch
from support.cuda import (
    DEVICE,
    DTYPES,
    ON_CUDA,
    assert_all_near,
    assert_same,
    assert_sums_near,
    by_dtype,
    on_cpu,
    to_device,
)
from support.expert_stacks import (
    CONFIG,
    CONFIGS,
    FORMS,
    IN,
    OUT,
    ROUTES,
    TARGETS,
    Experts,
    expected,
    factor_gradients,
    inputs,
    mixtral,
    the_site,
)
from support.models import dense_update, fill, output_of, randn, tokens
from torch import Tensor, nn

import melora_fx
from melora_fx.patterns.grouped_blocks import grouped_blocks

pytestmark = ON_CUDA


def given_to(device: str, dtype: torch.dtype, route: str = "mixed") -> dict[str, Tensor]:
    return to_device(inputs(route, dtype), device)


def rewritten(form: str, config: melora_fx.MELoRAConfig, dtype: torch.dtype, **options: bool) -> nn.Module:
    model = Experts(form, dtype=dtype, **options).eval().to(DEVICE)
    return fill(melora_fx.rewrite(model, "stack", config, example_inputs=given_to(DEVICE, dtype)))


def to_cpu(model: nn.Module) -> nn.Module:
    """Moves the site's tensors to the CPU, for the oracle; the model is not run again."""
    return model.to("cpu")


@by_dtype()
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", FORMS)
def test_each_row_is_multiplied_by_its_own_expert(form, route, dtype):
    model = rewritten(form, CONFIG, dtype)
    output = output_of(model, given_to(DEVICE, dtype, route))
    assert output.device.type == DEVICE
    assert_sums_near(output, expected(to_cpu(model), inputs(route, dtype)).detach(), 2)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_ranks_blocks_and_splits(form, config):
    model = rewritten(form, config, torch.float32)
    output = output_of(model, given_to(DEVICE, torch.float32))
    assert_sums_near(output, expected(to_cpu(model), inputs()).detach())


@pytest.mark.parametrize("form", FORMS)
def test_stack_that_is_stored_transposed(form):
    model = rewritten(form, CONFIG, torch.float32, transposed=True)
    output = output_of(model, given_to(DEVICE, torch.float32))
    assert_sums_near(output, expected(to_cpu(model), inputs()).detach())


@by_dtype()
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_dense_update(form, dtype):
    model = rewritten(form, CONFIG, dtype)
    given = given_to(DEVICE, dtype)
    given["x"].requires_grad_()
    upstream = randn(len(given["ids"]), OUT, seed=8, dtype=dtype)
    site = the_site(model)
    output = model(**given)
    found = torch.autograd.grad(output, [given["x"], site.lora_a, site.lora_b], upstream.to(DEVICE))
    site = the_site(to_cpu(model))
    stack = site.weight.detach().double()
    parts = zip(site.lora_a.detach().chunk(len(stack)), site.lora_b.detach().chunk(len(stack)), strict=True)
    adapted = stack + torch.stack([dense_update(site.config, a, b) for a, b in parts])
    x, ids = on_cpu(given["x"]).double(), on_cpu(given["ids"])
    of_x = torch.stack([up.double() @ adapted[i] for up, i in zip(upstream, ids.tolist(), strict=True)])
    of_stack = torch.zeros_like(stack)
    for row, up, i in zip(x, upstream.double(), ids.tolist(), strict=True):
        of_stack[i] += up[:, None] * row
    wanted = [of_x, *factor_gradients(site, of_stack)]
    assert_all_near([each.to(dtype) for each in found], wanted, 2)


COUNTS = {"mixed": [3, 0, 4], "all_of_one": [0, 7, 0], "rows_behind": [2, 1, 1]}


@by_dtype(DTYPES)
@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_blocks(counts, num_blocks, dtype):
    rows = 7
    x = randn(rows, IN, seed=1, dtype=dtype)
    blocks = randn(3 * num_blocks, OUT // num_blocks, IN // num_blocks, seed=2, dtype=dtype)
    upstream = randn(rows, OUT, seed=3, dtype=dtype)
    offs = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    leaves = [x.to(DEVICE).requires_grad_(), blocks.to(DEVICE).requires_grad_()]
    output = grouped_blocks(*leaves, offs.to(DEVICE))
    found = [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(DEVICE))]
    wide = [x.double().requires_grad_(), blocks.double().requires_grad_()]
    dense = [torch.block_diag(*each) for each in wide[1].chunk(3)]
    products = [
        part @ matrix.t()
        for part, matrix in zip(wide[0].split([*counts, rows - sum(counts)]), dense + dense[:1], strict=True)
    ]
    products[-1] = products[-1] * 0
    whole = torch.cat(products)
    wanted = [whole.detach(), *torch.autograd.grad(whole, wide, upstream.double())]
    assert_all_near(found, wanted, 2)


def step_of(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """Returns the logits, and the gradients of every adapter."""
    logits = model(**given)[0]
    logits.float().square().mean().backward()
    return [logits.detach(), *(parameter.grad for parameter in melora_fx.adapter_parameters(model).values())]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("captured", [False, True], ids=["in_place", "whole"])
def test_mixtral_is_that_of_the_cpu(captured, form):
    if form == "grouped_mm" and not captured:
        pytest.skip("refused: in place this form has no graph")
    found = []
    for device in ("cpu", DEVICE):
        given = to_device({"input_ids": tokens(3, 7)["input_ids"]}, device)
        options = {"example_inputs": given} if captured else {}
        targets = [*TARGETS, "q_proj", "gate"]
        model = melora_fx.rewrite(mixtral(form).to(device), targets, CONFIG, **options)
        found.append(step_of(fill(model), given))
    reference, actual = found
    assert_all_near(actual, [each.double() for each in reference], 20)  # a layer of attention and two of experts


@pytest.mark.parametrize("form", FORMS)
def test_mixtral_disabled_and_folded(form):
    given = to_device({"input_ids": tokens(3, 7)["input_ids"]})
    base = mixtral(form).to(DEVICE)
    model = fill(melora_fx.rewrite(base, TARGETS, CONFIG, example_inputs=given))
    adapted = output_of(model, given)
    with melora_fx.disabled(model):
        plain = output_of(model, given)
    assert not torch.allclose(plain, adapted)
    with melora_fx.folded(model):
        assert_sums_near(output_of(model, given), adapted.double(), 20)
    assert_same(output_of(model, given), adapted)
    with melora_fx.disabled(model):
        assert_same(output_of(model, given), plain)
