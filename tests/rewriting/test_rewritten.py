"""A rewritten module is still the user's module: identity, class, hooks, state_dict, copies, pickles, `.to`."""

import copy
import pickle

import pytest
import torch
from support.cases import BERT_CONFIG
from support.models import (
    IN,
    TOWER_CONFIG,
    Tower,
    adapted_weight,
    assert_equal,
    assert_near,
    bert,
    bert_classifier,
    by_torch_save,
    dense_copy,
    fill,
    gpt2,
    output_of,
    randn,
    rewritten_tower,
    tokens,
    tower,
)
from torch import fx, nn
from transformers import AutoModel, BertModel
from transformers.pytorch_utils import Conv1D

import melora_fx
from melora_fx import MELoRAConfig


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


COPIES = {"deepcopy": copy.deepcopy, "pickle": by_pickle, "torch_save": by_torch_save}


def test_state_dict_is_the_base_and_the_adapter(case):
    base = case.plain.state_dict()
    state = case.model.state_dict()
    expected = set(base)
    for name, site in melora_fx.sites(case.model).items():
        stem = name.rpartition(".")[0] + "." if site.record.parameter_name != "weight" else f"{name}."
        prefix = f"{site.record.parameter_name}_" if site.record.parameter_name != "weight" else ""
        expected |= {f"{stem}{prefix}lora_a", f"{stem}{prefix}lora_b"}
    assert set(state) == expected
    assert_equal({name: state[name] for name in base}, dict(base))


def test_base_state_dict_loads_into_a_rewritten_model():
    model = rewritten_tower(0)
    other = tower(seed=9)
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert unexpected == []
    assert all("lora_" in name for name in missing)
    assert_near(output_of(model, randn(2, IN)), output_of(dense_copy(model, other), randn(2, IN).double()))


def test_state_dict_round_trip(case):
    target = fill(copy.deepcopy(case.model), seed=5)
    target.load_state_dict(case.model.state_dict())
    assert_equal(output_of(target, case.inputs), output_of(case.model, case.inputs))


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copy_keeps_sites_outputs_and_modes(case, make_copy):
    expected = output_of(case.model, case.inputs)
    copied = make_copy(case.model)
    assert copied is not case.model
    assert_equal(output_of(copied, case.inputs), expected)
    assert list(copied.state_dict()) == list(case.model.state_dict())
    ours = melora_fx.sites(case.model)
    theirs = melora_fx.sites(copied)
    assert list(ours) == list(theirs)
    for name, site in ours.items():
        assert theirs[name].config == site.config
        assert theirs[name].pattern == site.pattern
        assert theirs[name].code == site.code
        assert theirs[name].lora_a is not site.lora_a
        assert_equal(theirs[name].scaling, site.scaling)
    with melora_fx.disabled(copied):
        assert_equal(output_of(copied, case.inputs), output_of(case.plain, case.inputs))
    with melora_fx.folded(copied):
        assert_near_float(output_of(copied, case.inputs), expected)
    assert_equal(output_of(copied.train().eval(), case.inputs), expected)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copy_is_independent_and_folds(case, make_copy):
    expected = output_of(case.model, case.inputs)
    with torch.no_grad():
        state = {name: value.clone() for name, value in case.model.state_dict().items()}
    copied = melora_fx.fold(make_copy(case.model))
    assert_near_float(output_of(copied, case.inputs), expected)
    assert set(copied.state_dict()) == set(case.plain.state_dict())
    assert melora_fx.sites(copied) == {}
    assert melora_fx.sites(case.model)
    assert_equal(dict(case.model.state_dict()), state)
    assert_equal(output_of(case.model, case.inputs), expected)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copy_of_a_copy(tower_case, make_copy):
    expected = output_of(tower_case.model, tower_case.inputs)
    copied = make_copy(make_copy(tower_case.model))
    assert_equal(output_of(copied, tower_case.inputs), expected)
    assert_near_float(output_of(melora_fx.fold(copied), tower_case.inputs), expected)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copy_made_inside_disabled_has_its_adapter(tower_case, make_copy):
    expected = output_of(tower_case.model, tower_case.inputs)
    with melora_fx.disabled(tower_case.model):
        copied = make_copy(tower_case.model)
    assert_equal(output_of(tower_case.model, tower_case.inputs), expected)
    assert_equal(output_of(copied, tower_case.inputs), expected)
    fill(tower_case.model, seed=7)
    assert_equal(output_of(copied, tower_case.inputs), expected)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, for every exported GraphModule
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_folded_model_can_be_copied(case, make_copy):
    if case.captured and make_copy is not copy.deepcopy:
        pytest.skip("torch pickles no GraphModule of an export, with or without melora")
    folded = melora_fx.fold(case.model)
    expected = output_of(folded, case.inputs)
    assert_equal(output_of(make_copy(folded), case.inputs), expected)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copy_keeps_hooks_dropout_and_kept_modules(make_copy):
    config = MELoRAConfig(rank=2, num_blocks=3, dropout=0.5)
    model = fill(melora_fx.rewrite(tower(), "up", config, keep_trainable="head"))
    model.up.register_forward_hook(double_output)
    copied = make_copy(model)
    x = randn(2, IN)
    assert_equal(output_of(copied, x), output_of(model, x))
    assert_equal(copied.up(x), copied.up(x))
    copied.train()
    assert not torch.equal(copied.up(x), copied.up(x))
    trainable = {name for name, parameter in copied.named_parameters() if parameter.requires_grad}
    assert trainable == {"up.lora_a", "up.lora_b", "head.weight", "head.bias"}
    melora_fx.fold(copied)
    assert all(parameter.requires_grad for parameter in copied.parameters())


def double_output(module, args, output):
    return 2 * output


def test_deepcopy_keeps_ties_and_shared_modules():
    model = nn.ModuleDict({"a": nn.Linear(IN, IN)})
    model["b"] = model["a"]
    model["c"] = nn.Linear(IN, IN)
    model["c"].weight = model["a"].weight
    melora_fx.rewrite(model, "all-linear", TOWER_CONFIG)
    copied = copy.deepcopy(model)
    assert copied["a"] is copied["b"]
    assert copied["c"].weight is copied["a"].weight
    assert copied["a"].lora_a is not model["a"].lora_a


def test_deepcopy_of_one_site_alone():
    model = rewritten_tower()
    x = randn(2, IN)
    copied = copy.deepcopy(model.up)
    assert_equal(copied(x), model.up(x))
    fill(copied, seed=6)
    assert not torch.equal(copied(x), model.up(x))


def test_isinstance_is_kept_and_the_class_comes_back():
    model = rewritten_tower()
    assert isinstance(model.up, nn.Linear)
    assert isinstance(model.conv, Conv1D)
    assert isinstance(model.up, fx.GraphModule)
    assert (model.up.in_features, model.up.out_features, model.conv.nf) == (24, 36, 24)
    assert "Linear" in repr(model.up)
    attributes = {name: set(vars(module)) for name, module in tower().named_modules()}
    melora_fx.fold(model)
    assert type(model.up) is nn.Linear
    assert type(model.conv) is Conv1D
    assert type(model) is Tower
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert repr(model) == repr(tower())


def test_hooks_on_a_site_still_run_before_and_after_the_rewrite_and_the_fold():
    model = tower()
    x = randn(2, IN)
    calls = []
    model.up.register_forward_pre_hook(lambda module, args: calls.append("before_pre"))
    model.up.register_forward_hook(lambda module, args, output: calls.append("before"))
    melora_fx.rewrite(model, "up", TOWER_CONFIG)
    model.up.register_forward_hook(lambda module, args, output: calls.append("after"))
    expected = ["before_pre", "before", "after"]
    model(x)
    assert calls == expected
    calls.clear()
    with melora_fx.disabled(model):
        model(x)
    assert calls == expected
    calls.clear()
    melora_fx.fold(model)
    model(x)
    assert calls == expected


def test_hook_sees_the_adapted_output_and_may_replace_it():
    model = rewritten_tower()
    x = randn(2, IN)
    seen = []
    model.up.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    site = melora_fx.sites(model)["up"]
    assert_near(seen[0], x.double() @ adapted_weight(site).T + model.up.bias.detach().double())


def test_backward_hook_on_a_site_runs():
    model = rewritten_tower()
    seen = []
    model.up.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0].shape))
    model(randn(2, IN).requires_grad_()).sum().backward()
    assert seen == [(2, 36)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_moving_to_another_dtype_moves_the_adapter_and_still_folds(tower_case, dtype):
    model = tower_case.model.to(dtype)
    x = tower_case.inputs.to(dtype)
    output = output_of(model, x)
    assert output.dtype == dtype
    expected = output_of(dense_copy(model, tower_case.plain), tower_case.inputs.double())
    difference = (output.double() - expected).abs().max()
    assert float(difference) < (1e-6 if dtype == torch.float64 else 0.3 * float(expected.abs().max()))
    folded = melora_fx.fold(model)
    assert all(parameter.dtype == dtype for parameter in folded.parameters())
    assert float((output_of(folded, x).double() - expected).abs().max()) < (
        1e-6 if dtype == torch.float64 else 0.3 * float(expected.abs().max())
    )


def test_a_narrow_base_may_be_widened_after_the_rewrite():
    model = fill(melora_fx.rewrite(tower().to(torch.bfloat16), "all-linear", TOWER_CONFIG)).float()
    plain = tower().to(torch.bfloat16).float()
    x = randn(2, IN)
    assert_near(output_of(model, x), output_of(dense_copy(model, plain), x.double()))


def test_values_written_through_data_are_used():
    model = rewritten_tower()
    x = randn(2, IN)
    site = melora_fx.sites(model)["up"]
    site.lora_b.data.mul_(2)
    model.up.weight.data.add_(1)
    assert_near(model.up(x), x.double() @ adapted_weight(site).T + model.up.bias.detach().double())


def test_hugging_face_model_keeps_its_methods(tmp_path):
    model = melora_fx.rewrite(bert(), "query", BERT_CONFIG)
    assert isinstance(model, BertModel)
    assert model.config.hidden_size == IN
    assert model.get_input_embeddings() is model.embeddings.word_embeddings
    assert model.num_parameters(only_trainable=True) == sum(
        p.numel() for p in melora_fx.adapter_parameters(model).values()
    )


def test_save_pretrained_of_an_unfolded_model_warns(tmp_path):
    """Its file contains the adapter's keys, which `from_pretrained` drops and only reports."""
    model = fill(melora_fx.rewrite(bert(), "query", BERT_CONFIG))
    with pytest.warns(UserWarning, match=r"(?s)`?save_adapter`?.*`?fold`?"):
        model.save_pretrained(tmp_path)


def test_folded_model_round_trips_through_save_pretrained(tmp_path):
    model = melora_fx.fold(fill(melora_fx.rewrite(bert(), ["query", "dense"], BERT_CONFIG)))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert_equal(output_of(loaded, tokens()), output_of(model, tokens()))


def test_tied_model_that_is_rewritten_elsewhere_stays_tied():
    model = melora_fx.rewrite(gpt2(), "c_attn", TOWER_CONFIG)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert copy.deepcopy(model).lm_head.weight.shape == (51, IN)
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight is copied.transformer.wte.weight
    folded = melora_fx.fold(model)
    assert folded.lm_head.weight is folded.transformer.wte.weight
    assert folded.config.tie_word_embeddings is True


def test_labels_give_a_loss_that_trains():
    model = fill(melora_fx.rewrite(bert_classifier(), "query", BERT_CONFIG, keep_trainable="classifier"))
    loss = model(**tokens(), labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert bool(model.classifier.weight.grad.any())


def assert_near_float(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares two float32 computations of the same values through several layers."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
