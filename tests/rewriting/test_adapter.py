"""Reading and switching adapters: `sites`, `adapter_parameters`, `disabled`, eagerly and compiled."""

import contextlib
import threading

import pytest
import torch
from support.models import (
    IN,
    OUT,
    TOWER_CONFIG,
    TOWER_SITES,
    adapted_weight,
    assert_equal,
    assert_near,
    assert_unchanged,
    bert,
    fill,
    output_of,
    randn,
    rewritten_tower,
    tokens,
    tower,
)
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class StopError(Exception):
    """Raised by the tests themselves."""


def test_sites_describe_what_was_rewritten():
    config = MELoRAConfig(rank=(1, 4, 2), num_blocks=3, alpha=(1.0, 2.0, 3.0), split=(24, 12))
    model = melora_fx.rewrite(tower(), {"up": config, "conv": TOWER_CONFIG, "own.projection": TOWER_CONFIG})
    found = melora_fx.sites(model)
    assert list(found) == ["up", "own.projection", "conv"]
    up, own, conv = found.values()
    assert (up.config, up.pattern, up.lowering) == (config, "Linear", "weight")
    assert (up.in_features, up.out_features, up.weight_is_transposed) == (IN, OUT, False)
    assert up.lora_a.shape == (3, 2 * 4, IN // 3)
    assert up.lora_b.shape == (3, OUT // 3, 4)
    assert_equal(up.scaling, torch.tensor([1.0, 0.5, 1.5]).view(3, 1, 1))
    assert up.weight is model.up.weight
    assert up.lora_a is model.up.lora_a
    assert up.owner is model.up
    assert up.num_bytes == 4 * (up.lora_a.numel() + up.lora_b.numel() + 3)
    assert (conv.in_features, conv.out_features, conv.weight_is_transposed) == (OUT, IN, True)
    assert conv.lora_a.shape == (3, 2, OUT // 3)
    assert own.weight is model.own.projection
    assert own.lora_a is model.own.projection_lora_a


def test_plain_model_has_no_sites():
    assert melora_fx.sites(tower()) == {}
    assert melora_fx.adapter_parameters(tower()) == {}


@pytest.mark.default_cases("tower-*", "bert-in_place", "gpt2-in_place")
def test_adapter_parameters_are_the_models_own(case):
    parameters = melora_fx.adapter_parameters(case.model)
    names = [f"{name}.{kind}" for name in melora_fx.sites(case.model) for kind in ("lora_a", "lora_b")]
    assert list(parameters) == names
    own = {id(parameter) for parameter in case.model.parameters()}
    assert all(id(parameter) in own for parameter in parameters.values())
    assert len({id(parameter) for parameter in parameters.values()}) == len(names)


def test_sites_of_a_compiled_wrapper_are_those_inside():
    model = rewritten_tower()
    compiled = torch.compile(model, backend="eager")
    assert list(melora_fx.sites(compiled)) == list(TOWER_SITES)
    assert melora_fx.adapter_parameters(compiled)["up.lora_a"] is model.up.lora_a


def test_sites_of_a_model_inside_another():
    outer = torch.nn.ModuleDict({"encoder": rewritten_tower()})
    assert list(melora_fx.sites(outer)) == [f"encoder.{name}" for name in TOWER_SITES]


def test_disabled_is_the_base_bit_for_bit_and_the_adapter_comes_back(case):
    expected = output_of(case.plain, case.inputs)
    adapted = output_of(case.model, case.inputs)
    assert not torch.equal(expected, adapted)
    with melora_fx.disabled(case.model):
        assert_equal(output_of(case.model, case.inputs), expected)
    assert_equal(output_of(case.model, case.inputs), adapted)


def test_disabled_in_train_mode_gives_the_bases_dropout(case):
    case.model.train(), case.plain.train()
    with melora_fx.disabled(case.model):
        torch.manual_seed(3)
        output = output_of(case.model, case.inputs)
    torch.manual_seed(3)
    expected = output_of(case.plain, case.inputs)
    if case.name == "gpt2-whole":  # with dropout, attention's kernel depends on an explicit mask or `is_causal`
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    else:
        assert_equal(output, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_disabled_whatever_the_adapter_holds(tower_case, value):
    with torch.no_grad():
        for parameter in melora_fx.adapter_parameters(tower_case.model).values():
            parameter.fill_(value)
    assert not output_of(tower_case.model, tower_case.inputs).isfinite().all()
    with melora_fx.disabled(tower_case.model):
        assert_equal(output_of(tower_case.model, tower_case.inputs), output_of(tower_case.plain, tower_case.inputs))


def test_disabled_can_be_nested(tower_case):
    model = tower_case.model
    x = tower_case.inputs
    expected = output_of(tower_case.plain, x)
    adapted = output_of(model, x)
    with melora_fx.disabled(model):
        with melora_fx.disabled(model):
            assert_equal(output_of(model, x), expected)
        assert_equal(output_of(model, x), expected)
    assert_equal(output_of(model, x), adapted)


def test_disabled_ends_with_an_exception(tower_case):
    model = tower_case.model
    x = tower_case.inputs
    adapted = output_of(model, x)
    with pytest.raises(StopError), melora_fx.disabled(model), melora_fx.disabled(model):
        raise StopError
    assert_equal(output_of(model, x), adapted)


def test_disabled_changes_nothing_for_good(tower_case):
    with assert_unchanged(tower_case.model), melora_fx.disabled(tower_case.model):
        output_of(tower_case.model, tower_case.inputs)


def test_disabled_one_part_of_a_model():
    model = torch.nn.Sequential(rewritten_tower(), torch.nn.Linear(6, IN), rewritten_tower(1))
    x = randn(2, IN)
    middle = model[1](tower()(x))
    with melora_fx.disabled(model[0]):
        assert_equal(output_of(model, x), output_of(model[2], middle.detach()))


def test_disabled_between_forward_and_backward_harms_nothing(tower_case):
    model = tower_case.model
    x = tower_case.inputs
    model(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in melora_fx.adapter_parameters(model).items()}
    model.zero_grad()
    loss = model(x).sum()
    with melora_fx.disabled(model):
        output_of(model, x)
        loss.backward()
    assert_equal({name: p.grad for name, p in melora_fx.adapter_parameters(model).items()}, expected)


def test_changing_the_adapter_between_forward_and_backward_raises(tower_case):
    loss = tower_case.model(tower_case.inputs).sum()
    fill(tower_case.model, seed=8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_disabled_follows_the_present_base_weights(tower_case):
    model = tower_case.model
    x = tower_case.inputs
    with torch.no_grad():
        for network in (model, tower_case.plain):
            network.get_submodule("up").weight.mul_(0.5)
    with melora_fx.disabled(model):
        assert_equal(output_of(model, x), output_of(tower_case.plain, x))


def test_disabled_after_training_steps_and_after_mode_changes(tower_case):
    model = tower_case.model
    x = tower_case.inputs
    for seed in range(3):
        fill(model.train(), seed)
        with melora_fx.disabled(model.eval()):
            assert_equal(output_of(model, x), output_of(tower_case.plain, x))


def test_disabled_of_a_plain_model_is_refused():
    text = "`disabled` needs a rewritten model, but this Tower has no adapter sites"
    with pytest.raises(MELoRAError, match=text), melora_fx.disabled(tower()):
        pytest.fail("the block must not run")


def test_disabled_two_models_of_one_class_apart():
    first = rewritten_tower(0)
    second = rewritten_tower(1)
    x = randn(2, IN)
    adapted = output_of(second, x)
    with melora_fx.disabled(first):
        assert_equal(output_of(second, x), adapted)
        assert_equal(output_of(first, x), output_of(tower(0), x))


def test_disabled_in_two_threads_one_after_the_other():
    model = rewritten_tower()
    x = randn(2, IN)
    results = []

    def run():
        with melora_fx.disabled(model):
            results.append(output_of(model, x))

    for _ in range(2):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert_equal(results[0], output_of(tower(), x))
    assert_equal(results[1], results[0])


@pytest.mark.default_cases("tower-in_place-*")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_is_right_and_disabled_costs_one_compile(tower_case, backend):
    model = tower_case.model
    plain = tower_case.plain
    x = tower_case.inputs
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    adapted = output_of(model, x)
    base = output_of(plain, x)
    assert_equal(output_of(compiled, x), adapted)
    assert counter.frame_count == 1
    for _ in range(3):
        with melora_fx.disabled(compiled):
            assert_equal(output_of(compiled, x), base)
        assert_equal(output_of(compiled, x), adapted)
        with melora_fx.disabled(model), melora_fx.disabled(compiled):
            assert_equal(output_of(compiled, x), base)
    assert counter.frame_count == 2


def test_disabled_first_and_then_compiled(tower_case):
    model = tower_case.model
    x = tower_case.inputs
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        with melora_fx.disabled(model):
            assert_equal(output_of(compiled, x), output_of(tower_case.plain, x))
        assert_equal(output_of(compiled, x), output_of(model, x))
    assert counter.frame_count == 2


def test_compiled_with_nan_in_the_adapter(tower_case):
    compiled = torch.compile(tower_case.model, backend="eager", fullgraph=True)
    output_of(compiled, tower_case.inputs)
    with torch.no_grad():
        for parameter in melora_fx.adapter_parameters(compiled).values():
            parameter.fill_(float("nan"))
    with melora_fx.disabled(compiled):
        assert_equal(output_of(compiled, tower_case.inputs), output_of(tower_case.plain, tower_case.inputs))


def test_training_steps_do_not_recompile(tower_case):
    model = tower_case.model.train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(compiled).values(), lr=1e-2)
    outputs = []
    for _ in range(4):
        output = compiled(tower_case.inputs)
        outputs.append(output.detach())
        output.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[-1])
    with torch.no_grad():
        expected = model(tower_case.inputs)
    assert_equal(compiled(tower_case.inputs).detach(), expected)


def test_compiled_gradients_are_the_eager_ones(tower_case):
    model = tower_case.model
    x = tower_case.inputs
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in melora_fx.adapter_parameters(model).items()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    actual = {name: p.grad for name, p in melora_fx.adapter_parameters(model).items()}
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_compiled_dropout_of_the_adapter_follows_the_mode():
    model = fill(melora_fx.rewrite(tower(), "up", MELoRAConfig(rank=2, num_blocks=3, dropout=0.5)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = randn(3, IN)
    assert_equal(output_of(compiled, x), output_of(compiled, x))
    model.train()
    assert not torch.equal(output_of(compiled, x), output_of(compiled, x))
    model.eval()
    assert_equal(output_of(compiled, x), output_of(model, x))


@pytest.mark.default_cases("in_place")
@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
@pytest.mark.slow
def test_compiled_hugging_face_model_has_no_break_and_no_recompile(whole):
    plain = bert()
    options = {"example_inputs": tokens()} if whole else {}
    model = fill(melora_fx.rewrite(bert(), ["query", "dense"], TOWER_CONFIG, **options))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        fill(model, seed)
        assert_equal(output_of(compiled, tokens()), output_of(model, tokens()))
    assert counter.frame_count == 1
    for _ in range(2):
        with melora_fx.disabled(compiled):
            assert_equal(output_of(compiled, tokens()), output_of(plain, tokens()))
        output_of(compiled, tokens())
    assert counter.frame_count == 2


def test_site_computes_its_weight_under_every_grad_mode():
    model = rewritten_tower()
    x = randn(2, IN)
    site = melora_fx.sites(model)["up"]
    expected = x.double() @ adapted_weight(site).T + model.up.bias.detach().double()
    for mode in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        with mode():
            assert_near(model.up(x), expected)
