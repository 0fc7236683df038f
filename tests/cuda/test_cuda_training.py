"""Training on the device: whole models against the same on the CPU, optimizers, scalers and streams."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cuda import (
    DEVICE,
    ON_CUDA,
    assert_all_near,
    assert_same,
    assert_sums_near,
    by_lowering,
    cuda_alone,
    to_device,
)
from support.lowered import DROPOUT, MANY, lowered, seeded, step
from support.models import IN, fill, randn, tokens, tower
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import melora_fx
from melora_fx import MELoRAConfig

pytestmark = ON_CUDA

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
}
CONFIG = MELoRAConfig(rank=4, num_blocks=4)
OF_TOWER = MELoRAConfig(rank=2, num_blocks=3)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
    return BertForSequenceClassification(config)


def causal_lm() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False))


def batch(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    given = tokens(4, 12)
    labels = torch.tensor([0, 1, 2, 1]) if build is classifier else given["input_ids"]
    return {**given, "labels": labels}


def trained(build: Callable[[], nn.Module], lowering: str, device: str) -> tuple[nn.Module, list[float]]:
    """Returns the model after three steps, and their losses; A and B start with the same values on each device."""
    kept = ["classifier"] if build is classifier else []
    config = MELoRAConfig(rank=4, num_blocks=4, lowering=lowering)
    model = melora_fx.rewrite(build(), "all-linear", config, keep_trainable=kept).to(device).train()
    fill(model)
    given = to_device(batch(build), device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model.eval(), losses


MODELS = pytest.mark.parametrize("build", [classifier, causal_lm], ids=["bert", "llama"])


@MODELS
@by_lowering("plain")
def test_losses_are_those_of_the_cpu_and_the_fold_computes_the_same(lowering, build):
    _, expected = trained(build, lowering, "cpu")
    model, losses = trained(build, lowering, DEVICE)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected, rel=1e-3)
    given = {name: value for name, value in to_device(batch(build)).items() if name != "labels"}
    with torch.no_grad():
        adapted = model(**given).logits
        melora_fx.fold(model)
        assert_sums_near(model(**given).logits, adapted.double(), 10)
    assert melora_fx.sites(model) == {}


@MODELS
def test_a_whole_capture_trains_as_the_model_in_place(build):
    given = to_device(batch(build))
    found = []
    for example in ({}, {"example_inputs": given}):
        model = fill(melora_fx.rewrite(build().to(DEVICE).eval(), "all-linear", CONFIG, **example))
        model(**given).loss.backward()
        found.append({name: p.grad.double() for name, p in melora_fx.adapter_parameters(model).items()})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[1][name], expected, rtol=0, atol=1e-3 * scale + 1e-9)


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    found = []
    for seed in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x_of(seed)), randn(*MANY, 6, seed=50).to(DEVICE))
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def x_of(seed: int = 1) -> Tensor:
    return randn(*MANY, IN, seed=seed).to(DEVICE)


def on_device() -> nn.Module:
    return tower().to(DEVICE)


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return list(melora_fx.adapter_parameters(model).values())


@by_lowering()
def test_fused_and_foreach_optimizers_take_the_adapter(lowering):
    found = []
    for options in ({}, {"fused": True}, {"foreach": True}):
        model = lowered(on_device, lowering)
        found.append(losses(model, torch.optim.AdamW(parameters(model), lr=1e-3, **options)))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


@by_lowering()
def test_scaled_float16_steps_change_the_adapter_and_stay_finite(lowering):
    model = lowered(on_device, lowering)
    before = [parameter.detach().clone() for parameter in parameters(model)]
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    for seed in range(2):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = F.mse_loss(model(x_of(seed)).float(), randn(*MANY, 6, seed=50).to(DEVICE))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1024.0  # no step was skipped
    for parameter, old in zip(parameters(model), before, strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, old)


@cuda_alone
@by_lowering()
def test_another_stream_computes_the_same(lowering):
    model = lowered(on_device, lowering)
    x = x_of()
    expected = step(model, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert_all_near(found, [each.double() for each in expected])


@cuda_alone
def test_dropout_on_another_stream_follows_the_seed():
    model = lowered(on_device, config=DROPOUT).train()
    expected = seeded(step, model, x_of())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = seeded(step, model, x_of())
    torch.cuda.synchronize()
    assert_all_near(found, [each.double() for each in expected])


@cuda_alone
@by_lowering()
def test_no_step_waits_for_the_device(lowering):
    """With and without dropout, whose seed is drawn on the CPU."""
    for config in (OF_TOWER, MELoRAConfig(rank=2, num_blocks=3, dropout=0.5)):
        if config.dropout and lowering == "weight":
            continue
        model = lowered(on_device, lowering, config).train()
        x = x_of()
        step(model, x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(model, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_seed_alone_decides_on_every_device():
    """Torch seeds the generators of CPU and device together, so that one call repeats a run."""
    model = lowered(on_device, config=DROPOUT).train()
    assert_same(seeded(losses_of_dropout, model), seeded(losses_of_dropout, model))


def losses_of_dropout(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [model(x_of(seed)) for seed in range(2)]
