"""The adapter's dropout on the device: which values it drops, and that forward and backward drop the same.

The mask is read off a layer whose base is zero and whose factors are identities: its output shows what was kept.
"""

import math

import pytest
import torch
from support.cuda import (
    DEVICE,
    HALF,
    ON_CUDA,
    assert_all_near,
    assert_same,
    by_dtype,
    by_lowering,
    inputs,
    layer,
    oracle,
    run,
)
from support.lowered import seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import melora_fx
from melora_fx import MELoRAConfig

pytestmark = ON_CUDA

WIDTH = 24
RATE = 0.5
BLOCKS = 3
CONFIG = MELoRAConfig(rank=WIDTH // BLOCKS, num_blocks=BLOCKS, alpha=2.0, dropout=RATE)
LEADING = (4, 30)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dropped_layer(lowering: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return layer(lambda: nn.Linear(WIDTH, WIDTH), CONFIG, lowering, dtype).train()


def mask_of(lowering: str, leading: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns 1 for each value of an input (…, 24) that a layer keeps, else 0: the first mask after `seeded`'s seed."""
    model = dropped_layer(lowering, dtype)
    with torch.no_grad():
        for parameter in (model.inner.weight, model.inner.bias):
            parameter.zero_()
        for factor in (model.inner.lora_a, model.inner.lora_b):
            factor.copy_(torch.eye(WIDTH // BLOCKS).expand(BLOCKS, -1, -1))
    with torch.no_grad():
        output = seeded(model, torch.ones(*leading, WIDTH, dtype=dtype, device=DEVICE))
    return (output != 0).double()


@by_dtype(TYPES)
@by_lowering("weight")
def test_share_of_every_column_that_is_kept(lowering, dtype):
    mask = mask_of(lowering, (20_001,), dtype)
    sigma = math.sqrt(RATE * (1 - RATE) / len(mask))
    assert float((mask.mean(0) - (1 - RATE)).abs().max()) < 5 * sigma
    assert abs(float(mask.mean()) - (1 - RATE)) < 5 * sigma / math.sqrt(WIDTH)


@by_lowering("weight")
def test_columns_and_tokens_are_independent(lowering):
    mask = mask_of(lowering, (20_000,)) * 2 - 1
    sigma = 1 / math.sqrt(len(mask))
    correlation = mask.T @ mask / len(mask) - torch.eye(WIDTH, dtype=mask.dtype, device=mask.device)
    assert float(correlation.abs().max()) < 5 * sigma
    assert float((mask[1:].T @ mask[:-1] / len(mask)).abs().max()) < 5 * sigma


@by_lowering("weight")
def test_the_seed_decides(lowering):
    model = dropped_layer(lowering)
    x, _ = inputs(LEADING, WIDTH, WIDTH, torch.float32)
    first = seeded(model, x)
    assert not torch.equal(first, model(x))
    assert_same(seeded(model, x), first)


@by_dtype(TYPES | HALF)
@by_lowering("weight")
def test_gradients_are_those_of_an_explicit_mask(lowering, dtype):
    mask = mask_of(lowering, LEADING, dtype)
    model = dropped_layer(lowering, dtype)
    x, upstream = inputs(LEADING, WIDTH, WIDTH, dtype)
    found = seeded(run, model, x, upstream)
    expected = oracle(model, x, upstream, mask, RATE)
    assert_all_near([tensor.to(dtype) for tensor in found], expected, 2)


@by_lowering("weight")
def test_evaluation_drops_nothing(lowering):
    model = dropped_layer(lowering).eval()
    given = inputs(LEADING, WIDTH, WIDTH, torch.float32)
    assert_all_near(run(model, *given), oracle(model, *given))


@by_lowering("weight")
@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_checkpointing_drops_the_same_again(reentrant, lowering):
    model = dropped_layer(lowering)
    given = inputs(LEADING, WIDTH, WIDTH, torch.float32)
    found = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        x = given[0].clone().requires_grad_()
        seeded(forward, x).backward(given[1])
        found.append([x.grad, *(parameter.grad for parameter in melora_fx.adapter_parameters(model).values())])
    assert_same(*found)


@by_lowering("weight")
def test_what_waits_on_the_cpu_for_the_backward(lowering):
    model = dropped_layer(lowering)
    given = inputs(LEADING, WIDTH, WIDTH, torch.float32)
    expected = seeded(run, model, *given)
    with torch.autograd.graph.save_on_cpu():
        assert_same(seeded(run, model, *given), expected)


@by_dtype(HALF)
@by_lowering("weight")
def test_under_autocast(lowering, dtype):
    context = torch.autocast(DEVICE, dtype)
    with context:
        mask = mask_of(lowering, LEADING)
    model = dropped_layer(lowering)
    x, upstream = inputs(LEADING, WIDTH, WIDTH, torch.float32)
    found = seeded(run, model, x, upstream, context(model))
    assert found[0].dtype == dtype
    assert_all_near([tensor.to(dtype) for tensor in found], oracle(model, x, upstream, mask, RATE), 2)
