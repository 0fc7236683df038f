"""Every lowering on the device, in every dtype: output and gradients against the dense update in float64 on the CPU."""

import functools
from collections.abc import Callable

import pytest
import torch
from support.cuda import (
    DEVICE,
    HALF,
    IS_DRY_RUN,
    ON_CUDA,
    assert_all_near,
    assert_same,
    assert_sums_near,
    by_dtype,
    by_lowering,
    by_lowering_and_dtype,
    inputs,
    layer,
    oracle,
    run,
    to_device,
)
from support.lowered import lowered, step
from support.models import IN, OUT, Holder, assert_equal, randn, tower
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import melora_fx
from melora_fx import MELoRAConfig

pytestmark = ON_CUDA

CONFIG = MELoRAConfig(rank=(1, 4, 2), num_blocks=3, alpha=(1.0, 0.5, 4.0))
LAYERS: dict[str, tuple[Callable[[], nn.Module], MELoRAConfig]] = {
    "ranks": (lambda: nn.Linear(IN, OUT), CONFIG),
    "no_bias": (lambda: nn.Linear(IN, OUT, bias=False), MELoRAConfig(rank=1, num_blocks=2, alpha=1.0)),
    "one_block": (lambda: nn.Linear(IN, OUT), MELoRAConfig(rank=3, num_blocks=1, alpha=2.0)),
    "high_rank": (lambda: nn.Linear(IN, OUT), MELoRAConfig(rank=40, num_blocks=3, alpha=20.0)),
    "split": (lambda: nn.Linear(IN, OUT), MELoRAConfig(rank=(1, 5), num_blocks=2, alpha=2.0, split=(12, 24))),
    "conv1d": (lambda: Conv1D(OUT, IN), CONFIG),
}
LEADING = {"vector": (), "batch": (2, 5), "many": (4, 30)}
LARGE = (64 if IS_DRY_RUN else 3000, 1024, 2816)  # T, I, O; a CPU takes half a minute for 3,000 in float16


def test_tf32_is_off_unless_the_user_allows_it():
    assert not torch.backends.cuda.matmul.allow_tf32


@by_lowering()
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_the_dense_update(name, leading, lowering):
    check_against_oracle(name, leading, lowering, torch.float32)


@by_dtype(HALF)
@by_lowering("weight")
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("name", ["ranks", "split"])
def test_the_same_in_16_bits(name, leading, lowering, dtype):
    check_against_oracle(name, leading, lowering, dtype)


def check_against_oracle(name: str, leading: tuple[int, ...], lowering: str, dtype: torch.dtype) -> None:
    build, config = LAYERS[name]
    model = layer(build, config, lowering, dtype)
    x, upstream = inputs(leading, IN, OUT, dtype)
    found = run(model, x, upstream)
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32, torch.float32]
    assert {tensor.device.type for tensor in found} == {DEVICE}
    expected = oracle(model, x, upstream)
    assert_all_near([tensor.to(dtype) for tensor in found], expected, 1 if dtype == torch.float32 else 2)


@by_lowering_and_dtype()
def test_untrained_output_is_the_bases_bit_for_bit(lowering, dtype):
    model = layer(lambda: nn.Linear(IN, OUT), CONFIG, lowering, dtype)
    model.inner.lora_b.data.zero_()
    for leading in LEADING.values():
        x, _ = inputs(leading, IN, OUT, dtype)
        assert_equal(model(x).detach(), F.linear(x, model.inner.weight, model.inner.bias).detach())


@by_dtype(HALF)
@by_lowering()
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_float32(leading, lowering, dtype):
    model = layer(lambda: nn.Linear(IN, OUT), CONFIG, lowering)
    x, upstream = inputs(leading, IN, OUT, torch.float32)
    found = run(model, x, upstream, torch.autocast(DEVICE, dtype)(model))
    assert [tensor.dtype for tensor in found] == [dtype, *[torch.float32] * 3]
    expected = oracle(model, x, upstream)
    assert_all_near([tensor.to(dtype) for tensor in found], expected, 2)


@by_lowering("plain")
@pytest.mark.parametrize("leading", [(2, 5), (4, 30)], ids=["few", "many"])
def test_a_step_is_that_of_the_plain_nodes(leading, lowering):
    x = randn(*leading, IN).to(DEVICE)
    found, expected = [step(lowered(lambda: tower().to(DEVICE), name), x) for name in (lowering, "plain")]
    assert_all_near(found, expected, 10)  # five layers


@by_lowering()
def test_input_that_is_not_contiguous(lowering):
    model = layer(lambda: nn.Linear(IN, OUT), CONFIG, lowering)
    x, upstream = inputs((5, 2), IN, OUT, torch.float32)
    x, upstream = x.transpose(0, 1), upstream.transpose(0, 1)
    assert_all_near(run(model, x, upstream), oracle(model, x, upstream))


@by_lowering()
def test_no_tokens(lowering):
    model = layer(lambda: nn.Linear(IN, OUT), CONFIG, lowering)
    output, *gradients = run(model, *inputs((2, 0), IN, OUT, torch.float32))
    assert output.shape == (2, 0, OUT)
    assert not any(bool(gradient.any()) for gradient in gradients)


@by_lowering()
@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant, lowering):
    model = layer(lambda: nn.Linear(IN, OUT), CONFIG, lowering)
    given = inputs((4, 30), IN, OUT, torch.float32)

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)

    (site,) = melora_fx.sites(model).values()
    found = []
    for forward in (recomputed, model):
        model.zero_grad()
        x = given[0].clone().requires_grad_()
        forward(x).backward(given[1])
        found.append([x.grad, site.lora_a.grad, site.lora_b.grad])
    assert_same(*found)


def representable(*shape: int, seed: int) -> Tensor:
    """Returns normal values that float16 and bfloat16 represent too: one oracle serves all dtypes."""
    values = randn(*shape, seed=seed).bfloat16().float()
    return values.masked_fill(values.abs() < 2**-10, 0)


@functools.cache
def large() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Returns x, the gradient of the output, the weight, and the oracle's output and gradients, all on the CPU."""
    tokens, in_features, out_features = LARGE
    x = representable(tokens, in_features, seed=1)
    upstream = representable(tokens, out_features, seed=9)
    weight = representable(out_features, in_features, seed=23) / 32
    return x, upstream, weight, oracle(large_layer(weight, "plain", torch.float32), x, upstream)


def large_layer(weight: Tensor, lowering: str, dtype: torch.dtype) -> nn.Module:
    linear = nn.Linear(weight.size(1), weight.size(0), bias=False)
    linear.weight.data.copy_(weight)
    config = MELoRAConfig(rank=8, num_blocks=8, lowering=lowering)
    model = melora_fx.rewrite(Holder(linear).to(DEVICE, dtype), "inner", config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in melora_fx.adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


@by_lowering_and_dtype()
def test_many_tokens_of_a_large_layer(lowering, dtype):
    x, upstream, weight, expected = large()
    found = run(large_layer(weight, lowering, dtype), *to_device([x.to(dtype), upstream.to(dtype)]))
    assert_all_near([tensor.to(dtype) for tensor in found], expected, 1 if dtype == torch.float32 else 2)


@by_lowering()
def test_allowed_tf32_keeps_its_own_tolerance(lowering):
    x, upstream, weight, expected = large()
    model = large_layer(weight, lowering, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        found = run(model, *to_device([x, upstream]))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    for actual, wanted in zip(found, expected, strict=True):
        assert_sums_near(actual, wanted, 400)  # 2^-11 instead of 2^-24; float32 uses a tenth of its bound
