"""`unload` restores the model from before `rewrite`, whatever the adapters contain; nothing is merged."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import Case
from support.models import (
    IN,
    OUT,
    TOWER_CONFIG,
    Tied,
    assert_equal,
    assert_unchanged,
    bert_classifier,
    by_torch_save,
    fill,
    gpt2,
    output_of,
    randn,
    rewritten_tower,
    tokens,
    tower,
)
from support.packed import Packed
from torch import fx, nn
from torch.nn.utils import parametrize

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X = randn(3, IN)


def hooked() -> nn.Module:
    """Returns a model that is partly frozen, with a hook and a -0, which an addition of zero would turn into 0."""
    model = tower()
    model.gate.requires_grad_(False)
    model.up.register_forward_hook(lambda module, args, output: output * 2)
    model.up.weight.data[0, 0] = -0.0
    return model


def packed() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, IN), Packed(IN, OUT))


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "tower": (hooked, "all-linear"),
    "bert": (bert_classifier, ["query", "value", "dense"]),
    "tied gpt2": (gpt2, ["c_attn", "lm_head"]),
    "two linears of one weight": (Tied, ["a", "b"]),
    "packed": (packed, ["0", "1"]),
    "bfloat16": (lambda: tower().bfloat16(), "all-linear"),
}


@pytest.mark.parametrize(("build", "targets"), MODELS.values(), ids=MODELS)
def test_the_same_model_comes_back(build: Any, targets: Any) -> None:
    model = build()
    with assert_unchanged(model):
        random_state = torch.get_rng_state()
        melora_fx.rewrite(model, targets, TOWER_CONFIG)
        for parameter in melora_fx.adapter_parameters(model).values():
            parameter.data.fill_(float("nan"))
        assert melora_fx.unload(model) is model
        torch.set_rng_state(random_state)
    assert not melora_fx.sites(model)


def test_in_both_captures_nothing_is_left(tower_case: Case) -> None:
    unloaded = melora_fx.unload(tower_case.model)
    plain = tower_case.build()
    assert not melora_fx.sites(unloaded)
    assert_equal(dict(unloaded.state_dict()), dict(plain.state_dict()))
    assert_equal(output_of(unloaded, tower_case.inputs), output_of(plain, tower_case.inputs))


@pytest.mark.slow
def test_of_a_whole_capture_the_plain_graph_is_left() -> None:
    model = tower()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    captured = fill(melora_fx.rewrite(model, "all-linear", TOWER_CONFIG, example_inputs=(X,)))
    expected = output_of(model, X)
    with assert_unchanged(copy.deepcopy(model)):
        unloaded = melora_fx.unload(captured)
    assert isinstance(unloaded, fx.GraphModule)
    assert "lora" not in unloaded.code
    assert_equal(dict(unloaded.state_dict()), state)
    assert_equal(output_of(unloaded, X), expected)
    assert_equal(output_of(unloaded, randn(7, IN)), output_of(model, randn(7, IN)))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("make_copy", [copy.deepcopy, by_torch_save], ids=["deepcopy", "torch.save"])
def test_copies_are_unloaded_too(make_copy: Any) -> None:
    model = melora_fx.unload(make_copy(rewritten_tower()))
    assert type(model.up) is nn.Linear
    assert_equal(dict(model.state_dict()), dict(tower().state_dict()))
    assert_equal(output_of(model, X), output_of(tower(), X))


def test_what_was_kept_trainable_stays_as_it_was_trained() -> None:
    model = fill(melora_fx.rewrite(tower(), "up", TOWER_CONFIG, keep_trainable=["head", "up.bias"]))
    for parameter in (model.head.weight, model.up.bias):
        parameter.data.add_(1)
    melora_fx.unload(model)
    expected = tower()
    for parameter in (expected.head.weight, expected.up.bias):
        parameter.data.add_(1)
    assert_equal(dict(model.state_dict()), dict(expected.state_dict()))


def test_another_adapter_fits_afterwards(tmp_path: Any) -> None:
    model = rewritten_tower()
    melora_fx.save_adapter(model, tmp_path)
    expected = output_of(model, X)
    melora_fx.rewrite(melora_fx.unload(model), "gate", MELoRAConfig(rank=1, num_blocks=2))
    melora_fx.load_adapter(melora_fx.unload(model), tmp_path)
    assert_equal(output_of(model, X), expected)


@pytest.mark.slow
def test_a_compiled_model_computes_the_base() -> None:
    model = rewritten_tower()
    compiled = torch.compile(model, backend="eager")
    adapted = compiled(X)
    assert melora_fx.unload(compiled) is compiled
    assert_equal(compiled(X), tower()(X))
    assert not torch.equal(compiled(X), adapted)


def test_inside_disabled() -> None:
    model = rewritten_tower()
    with melora_fx.disabled(model):
        melora_fx.unload(model)
    assert type(model.up) is nn.Linear
    assert_equal(output_of(model, X), output_of(tower(), X))


@pytest.mark.slow
def test_save_pretrained_writes_the_base(tmp_path: Any) -> None:
    model = fill(melora_fx.rewrite(bert_classifier(), ["query"], TOWER_CONFIG))
    melora_fx.unload(model).save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_equal(output_of(loaded.eval(), tokens()), output_of(bert_classifier(), tokens()))


def test_refusals_change_nothing() -> None:
    plain = tower()
    with assert_unchanged(plain), pytest.raises(MELoRAError, match="`unload` needs a rewritten model, but this Tower"):
        melora_fx.unload(plain)
    model = rewritten_tower()
    with melora_fx.folded(model), pytest.raises(MELoRAError, match="`unload` inside `folded`"):
        melora_fx.unload(model)
    forward = model.up.forward
    model.up.forward = lambda x: forward(x)
    with assert_unchanged(model), pytest.raises(MELoRAError, match="cannot unload `up`: its `forward` was replaced"):
        melora_fx.unload(model)
    del model.up.forward
    parametrize.register_parametrization(model.gate, "weight", nn.Tanh())
    with assert_unchanged(model), pytest.raises(MELoRAError, match=r"(?s)cannot unload:.`gate`: .*parametrized after"):
        melora_fx.unload(model)
    parametrize.remove_parametrizations(model.gate, "weight", leave_parametrized=False)
    assert_equal(dict(melora_fx.unload(model).state_dict()), dict(tower().state_dict()))


def test_modules_that_are_lost_are_named() -> None:
    model = rewritten_tower()
    model.gate = nn.Linear(IN, OUT, bias=False)
    with pytest.warns(UserWarning, match="`gate`: adapted by `rewrite`, and replaced"):
        melora_fx.unload(model)
