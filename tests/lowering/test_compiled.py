"""Lowered models under `torch.compile`: operators, recompilations, memory and dropout."""

import warnings
from dataclasses import replace

import pytest
import torch
from support.lowered import (
    CONFIG,
    DROPOUT,
    FEW,
    MANY,
    Operators,
    assert_close,
    compiled,
    linear,
    lowered,
    seeded,
    step,
)
from support.models import (
    IN,
    OUT,
    assert_equal,
    assert_near,
    bert,
    dense_copy,
    fill,
    kept_for_backward,
    output_of,
    randn,
    tokens,
    tower,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import melora_fx

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.default_cases("tower-in_place-auto")
@pytest.mark.parametrize("lowering", ["auto", "plain"])
def test_compiled_graph_has_one_operator_for_each_site(tower_case, lowering):
    options = {"example_inputs": (tower_case.inputs,)} if tower_case.captured else {}
    backend = Operators()
    x = randn(*MANY, IN)
    model = lowered(tower, lowering, **options)
    run = torch.compile(model, backend=backend, fullgraph=True)
    assert_close(step(model, x, run), step(lowered(tower, "plain"), x))
    assert len(backend.graphs) == 1
    assert backend.count("melora.adapted_linear") == (5 if lowering == "auto" else 0)
    assert (backend.count("bmm") == 0) is (lowering == "auto")


@pytest.mark.parametrize(("config", "name"), [(CONFIG, "adapted_linear_v3"), (DROPOUT, "adapted_linear_dropout_v2")])
def test_dropout_has_an_operator_of_its_own(config, name):
    backend = Operators()
    model = lowered(tower, config=config).train()
    torch.compile(model, backend=backend, fullgraph=True)(randn(*MANY, IN))
    assert backend.count(f"melora.{name}.default") == 5


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, lowering="activation")], ids=["weight", "activation"])
def test_compiled_by_inductor(config):
    model = lowered(tower, config.lowering, config)
    x = randn(*MANY, IN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # inductor imports a deprecated part of torch
        run = torch.compile(model, fullgraph=True)
        found = step(model, x, run)
    assert_close(found, step(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize(
    ("dynamic", "shapes"),
    [
        pytest.param(None, [MANY] * 3, id="one_shape"),
        pytest.param(None, [MANY, (3, 7), (2, 40), FEW], id="shapes", marks=pytest.mark.slow),
        pytest.param(True, [MANY, (3, 7), (2, 40), FEW], id="dynamic", marks=pytest.mark.slow),
    ],
)
def test_steps_compile_as_often_as_the_plain_nodes(config, dynamic, shapes):
    counts = []
    for lowering in ("auto", "plain"):
        torch._dynamo.reset()
        model = lowered(tower, lowering, config).train()
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
        optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values())
        for seed, shape in enumerate(shapes):
            run(randn(*shape, IN, seed=seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == (1 if len(set(shapes)) == 1 else 2)  # the shapes recompile once anyway


@pytest.mark.slow
def test_nothing_breaks_the_graph_of_a_hugging_face_model():
    model = fill(melora_fx.rewrite(bert(), "all-linear", CONFIG))
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        fill(model, seed)
        assert_close(run(**tokens())[0], model(**tokens())[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("lowering", ["auto", "plain"])
@pytest.mark.slow
def test_more_shapes_are_compiled_than_one_code_may_have_versions(lowering):
    """Dynamo compiles at most 8 versions of a code object; then it runs eagerly, or raises an error if it may not."""
    counter = CompileCounterWithBackend("aot_eager")
    x = randn(*FEW, IN)
    for index in range(torch._dynamo.config.recompile_limit + 1):
        layers = nn.Sequential(nn.Linear(IN, OUT + 3 * index))
        model = fill(melora_fx.rewrite(layers, "all-linear", replace(CONFIG, lowering=lowering)))
        assert_close(torch.compile(model[0], backend=counter, fullgraph=True)(x), model(x))
    assert counter.frame_count == torch._dynamo.config.recompile_limit + 1


@pytest.mark.parametrize("lowering", ["auto", "plain"])
def test_layers_compiled_one_by_one_share_their_code(lowering):
    counter = CompileCounterWithBackend("aot_eager")
    x = randn(*FEW, IN)
    layers = nn.Sequential(*[nn.Linear(IN, IN) for _ in range(torch._dynamo.config.recompile_limit + 2)])
    model = fill(melora_fx.rewrite(layers, "all-linear", replace(CONFIG, lowering=lowering)))
    with torch.no_grad():
        expected = model(x)
        for layer in model:
            layer.compile(backend=counter, fullgraph=True)
        assert_close(model(x), expected)
    assert counter.frame_count == 1


def test_a_graph_changed_by_hand_changes_its_own_module_alone():
    model = fill(melora_fx.rewrite(nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN)), "all-linear", CONFIG))
    x = randn(*FEW, IN)
    expected = model[1](x)
    assert type(model[0]) is type(model[1])
    (output,) = model[0].graph.find_nodes(op="output")
    with model[0].graph.inserting_before(output):
        output.args = (model[0].graph.call_function(torch.neg, (output.args[0],)),)
    before = model[0](x)
    model[0].recompile()
    assert_equal(model[0](x), -before)
    assert_equal(model[1](x), expected)


@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["weight", "dropout"])
def test_compiled_forward_keeps_the_input_alone(config):
    model = linear(config).train()
    x = randn(*MANY, IN).requires_grad_()
    run = compiled(model)
    run(x)
    with kept_for_backward([*model.parameters(), *model.buffers()]) as kept:
        output = run(x)
    assert kept.pop(x.untyped_storage().data_ptr()) == x.untyped_storage().nbytes()
    assert sum(kept.values()) == (8 if config.dropout else 0)
    output.sum().backward()
    assert bool(model.inner.lora_b.grad.any())


def test_compiled_dropout_is_seeded_and_the_backward_uses_the_forwards_mask():
    model = linear(DROPOUT).train()
    x = randn(*MANY, IN)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = run(x).detach()
    second = run(x).detach()
    assert not torch.equal(first, second)
    assert_close(seeded(step, model, x, run), seeded(step, model, x, run))
    base = F.linear(x, model.inner.weight, model.inner.bias)
    inputs = x.clone().requires_grad_()
    output = run(inputs)
    (of_x,) = torch.autograd.grad((output - base).sum(), inputs)
    # the adapter is linear in its input: x · (gradient of x, minus the base's) is the sum of its output
    adapter = float(((of_x - model.inner.weight.sum(0)) * x).sum())
    assert adapter == pytest.approx(float((output - base).sum().detach()), rel=1e-3)


@pytest.mark.default_cases("*-eager-*", "no_dropout-compiled-inference_mode", "dropout-compiled-no_grad")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_without_gradients(config, compiled, mode):
    model = lowered(tower, config=config)
    x = randn(*MANY, IN)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with mode():
        output = run(x)
        assert_near(output, output_of(dense_copy(model, tower()), x.double()))
        assert not output.requires_grad
    assert run(x).requires_grad
