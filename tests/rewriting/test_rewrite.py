"""The rewrite against the oracle: outputs, gradients, structure, frozen parameters, refusals that change nothing."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import (
    IN,
    OUT,
    TOLERANCE,
    TOWER_CONFIG,
    TOWER_SITES,
    Functional,
    Holder,
    adapted_weight,
    assert_equal,
    assert_near,
    assert_unchanged,
    bert,
    bert_classifier,
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
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError

CONFIGS = {
    "n1_r1": MELoRAConfig(rank=1, num_blocks=1, alpha=1.0),
    "n1_r5": MELoRAConfig(rank=5, num_blocks=1, alpha=7.0),
    "n2_r1": MELoRAConfig(rank=1, num_blocks=2, alpha=3.0),
    "n2_r3_rslora": MELoRAConfig(rank=3, num_blocks=2, alpha=3.0, use_rslora=True),
    "n3_r2": MELoRAConfig(rank=2, num_blocks=3, alpha=5.0),
    "n3_ranks": MELoRAConfig(rank=(1, 4, 2), num_blocks=3, alpha=5.0),
    "n3_alphas": MELoRAConfig(rank=2, num_blocks=3, alpha=(1.0, 0.5, 4.0)),
    "n3_ranks_alphas_rslora": MELoRAConfig(rank=(3, 1, 2), num_blocks=3, alpha=(1.0, 0.5, 4.0), use_rslora=True),
    "n12_r1": MELoRAConfig(rank=1, num_blocks=12, alpha=2.0),
    "split_3": MELoRAConfig(rank=2, num_blocks=3, alpha=5.0, split=3),
    "split_1": MELoRAConfig(rank=2, num_blocks=3, alpha=5.0, split=1),
    "split_sizes": MELoRAConfig(rank=2, num_blocks=3, alpha=5.0, split=(24, 3, 9)),
    "split_ranks_rslora": MELoRAConfig(rank=(1, 3), num_blocks=2, alpha=(2.0, 5.0), split=(20, 16), use_rslora=True),
}
LEADING = {"vector": (), "matrix": (3,), "batch": (2, 5), "empty": (0,)}


def linear(config: MELoRAConfig, *, bias: bool = True, dtype: torch.dtype = torch.float32, kind: str = "linear"):
    """Returns a model with one site, the site, and its weight (O, I) and bias in float64."""
    torch.manual_seed(4)
    inner = {
        "linear": lambda: nn.Linear(IN, OUT, bias=bias),
        "conv1d": lambda: Conv1D(OUT, IN),
        "functional": Functional,
    }[kind]()
    for parameter in inner.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = Holder(inner).to(dtype)
    melora_fx.rewrite(model, "re:inner.*", config)
    (site,) = melora_fx.sites(model).values()
    weight = site.weight.detach().double()
    bias_value = getattr(inner, "bias", None)
    return (
        model,
        site,
        (weight.t() if site.weight_is_transposed else weight),
        (None if bias_value is None else bias_value.detach().double()),
    )


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_output_is_that_of_the_dense_update(config, bias, leading):
    model, site, weight, bias_value = linear(config, bias=bias)
    fill(model)
    x = randn(*leading, IN)
    expected = F.linear(x.double(), weight + site_update(site), bias_value)
    assert_near(output_of(model, x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "functional"])
@pytest.mark.parametrize("config", [CONFIGS["n3_ranks"], CONFIGS["split_sizes"]], ids=["n3_ranks", "split_sizes"])
def test_output_in_each_dtype(config, kind, dtype):
    model, site, weight, bias = linear(config, dtype=dtype, kind=kind)
    x = randn(2, 5, IN, dtype=dtype)
    base = F.linear(x.double(), weight, bias)
    assert_near(output_of(model, x), base)
    fill(model)
    output = output_of(model, x)
    assert output.dtype == dtype
    assert_near(output, F.linear(x.double(), weight + site_update(site), bias))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {site.lora_a.dtype, site.lora_b.dtype, site.scaling.dtype} == {wide}


@st.composite
def shapes_and_configs(draw):
    num_blocks = draw(st.integers(1, 4))
    in_features = num_blocks * draw(st.integers(1, 5))
    parts = draw(st.none() | st.lists(st.integers(1, 4), min_size=1, max_size=3))
    rank = st.integers(1, 5)
    alpha = st.floats(0.01, 10)
    equal = parts is not None and draw(st.booleans())
    if equal:
        parts = [parts[0]] * len(parts)
    sizes = None if parts is None else [num_blocks * part for part in parts]
    config = MELoRAConfig(
        rank=draw(rank | st.lists(rank, min_size=num_blocks, max_size=num_blocks)),
        num_blocks=num_blocks,
        alpha=draw(alpha | st.lists(alpha, min_size=num_blocks, max_size=num_blocks)),
        use_rslora=draw(st.booleans()),
        split=len(sizes) if equal else sizes,
    )
    out_features = sum(sizes) if sizes else num_blocks * draw(st.integers(1, 6))
    leading = draw(st.lists(st.integers(1, 3), max_size=3))
    return config, in_features, out_features, leading, draw(st.booleans()), draw(st.booleans())


@given(shapes_and_configs())
def test_any_shape_and_config_forward_and_fold(drawn):
    config, in_features, out_features, leading, bias, is_conv = drawn
    torch.manual_seed(0)
    inner = Conv1D(out_features, in_features) if is_conv else nn.Linear(in_features, out_features, bias=bias)
    model = Holder(inner.double())
    x = randn(*(leading or ([2] if is_conv else [])), in_features, dtype=torch.float64)
    plain = copy.deepcopy(model)
    melora_fx.rewrite(model, "inner", config)
    (site,) = melora_fx.sites(model).values()
    assert_equal(output_of(model, x), output_of(plain, x))
    assert site.lora_a.numel() + site.lora_b.numel() >= melora_fx.match(plain, "inner", config).sites[0].num_parameters
    fill(model)
    update = dense_update(config, site.lora_a, site.lora_b).detach()
    expected = output_of(plain, x) + x @ update.T
    assert_near(output_of(model, x), expected)
    weight = adapted_weight(site)
    melora_fx.fold(model)
    assert_near(inner.weight.t() if is_conv else inner.weight, weight)
    assert_near(output_of(model, x), expected)


@pytest.mark.default_cases("tower-*", "bert-whole", "gpt2-in_place")
def test_untrained_output_is_that_of_the_base_bit_for_bit(case):
    names = list(melora_fx.sites(case.model))
    plain = case.build()
    options = {}
    if case.captured:
        options["example_inputs"] = (case.inputs,) if isinstance(case.inputs, torch.Tensor) else case.inputs
    model = melora_fx.rewrite(case.build(), names, MELoRAConfig(rank=2, num_blocks=3, dropout=0.3), **options)
    assert list(melora_fx.sites(model)) == names
    assert_equal(output_of(model, case.inputs), output_of(plain, case.inputs))
    for site in melora_fx.sites(model).values():
        assert int(site.lora_b.count_nonzero()) == 0
        assert int((site.lora_a == 0).sum()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def test_untrained_output_is_that_of_the_base_in_each_dtype(dtype):
    plain = tower().to(dtype)
    x = randn(2, 5, IN, dtype=dtype)
    model = melora_fx.rewrite(tower().to(dtype), "all-linear", TOWER_CONFIG)
    assert_equal(output_of(model, x), output_of(plain, x))


def test_untrained_output_under_autocast():
    plain = tower()
    x = randn(2, 5, IN)
    model = melora_fx.rewrite(tower(), "all-linear", TOWER_CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(output_of(model, x), output_of(plain, x))


def test_init_is_the_documented_distribution():
    torch.manual_seed(0)
    model = nn.Linear(300, 300)
    (site,) = melora_fx.sites(melora_fx.rewrite(model, "all-linear", MELoRAConfig(rank=50, num_blocks=3))).values()
    bound = 1 / math.sqrt(100)  # nn.Linear's own for its in_features
    assert float(site.lora_a.detach().abs().max()) <= bound
    assert float(site.lora_a.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    config = MELoRAConfig(rank=(50, 10, 20), num_blocks=3, init="gaussian")
    (site,) = melora_fx.sites(melora_fx.rewrite(nn.Linear(300, 300), "all-linear", config)).values()
    for block, rank in enumerate(config.ranks):
        assert float(site.lora_a.detach()[block, :rank].std()) == pytest.approx(1 / rank, rel=0.06)


def test_blocks_and_sites_are_initialised_differently():
    model = melora_fx.rewrite(tower(), "all-linear", TOWER_CONFIG)
    a = [block for site in melora_fx.sites(model).values() for block in site.lora_a]
    assert all(not torch.equal(first, second) for i, first in enumerate(a) for second in a[:i])


def test_adapter_dropout_acts_in_training_on_the_adapter_only():
    config = MELoRAConfig(rank=2, num_blocks=3, alpha=5.0, dropout=0.5)
    model, site, weight, bias = linear(config)
    x = torch.ones(4000, IN)
    fill(model)
    dense = F.linear(x.double(), weight + site_update(site).detach(), bias)
    model.eval()
    assert_near(output_of(model, x), dense)
    model.train()
    output = output_of(model, x)
    assert not torch.equal(output, output_of(model, x))
    base = F.linear(x.double(), weight, bias)
    spread = (x.double() @ (site_update(site).detach() ** 2).T).sqrt()  # std of one element at p = 0.5
    error = (output.double() - dense).mean(0) * math.sqrt(len(x)) / spread[0]
    assert float(error.abs().max()) < 5, "dropout must keep the mean: kept elements are scaled by 1 / (1 - p)"
    assert float((output.double() - base).abs().max()) > 0.1
    with melora_fx.disabled(model):
        assert_equal(output_of(model, x), F.linear(x, model.inner.weight, model.inner.bias).detach())


@pytest.mark.parametrize("example_inputs", [None, (randn(2, IN),)], ids=["in_place", "whole"])
def test_adapter_dropout_takes_the_mode_of_the_model(example_inputs):
    config = MELoRAConfig(rank=2, num_blocks=3, dropout=0.5)
    model = fill(melora_fx.rewrite(tower(), "all-linear", config, example_inputs=example_inputs))
    x = randn(3, IN)
    assert_equal(output_of(model, x), output_of(model, x))
    model.train()
    assert not torch.equal(output_of(model, x), output_of(model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "functional"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_those_of_the_dense_update(config, kind, dtype):
    model, site, weight, bias = linear(config, dtype=dtype, kind=kind)
    fill(model)
    x = randn(2, 5, IN, dtype=dtype).requires_grad_()
    upstream = randn(2, 5, OUT, seed=9)
    model(x).mul(upstream).sum().backward()

    x64 = x.detach().double().requires_grad_()
    a, b = (tensor.detach().double().requires_grad_() for tensor in (site.lora_a, site.lora_b))
    F.linear(x64, weight + dense_update(config, a, b), bias).mul(upstream.double()).sum().backward()
    tolerance = TOLERANCE[dtype] if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}  # sums of 10 products ~ 10
    for ours, theirs in ((site.lora_a, a), (site.lora_b, b), (x, x64)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)
    assert site.lora_a.grad.count_nonzero() > 0
    assert all(p.grad is None for p in model.parameters() if p is not site.lora_a and p is not site.lora_b)


def test_only_the_adapter_gets_gradients(case):
    output = case.model(**case.inputs) if isinstance(case.inputs, dict) else case.model(case.inputs)
    if not isinstance(output, torch.Tensor):
        output = output.pooler_output if "pooler_output" in output else output.logits
    output.square().sum().backward()
    adapter = {id(p) for p in melora_fx.adapter_parameters(case.model).values()}
    for name, parameter in case.model.named_parameters():
        is_adapter = id(parameter) in adapter
        assert parameter.requires_grad is is_adapter, name
        assert (parameter.grad is not None) is is_adapter, name
    assert all(bool(p.grad.any()) for p in melora_fx.adapter_parameters(case.model).values())


@pytest.mark.parametrize("split", [None, (24, 12)], ids=["whole", "split"])
def test_padding_of_small_ranks_stays_zero_in_training(split):
    config = MELoRAConfig(rank=(1, 4, 2), num_blocks=3, split=split)
    model, site, _, _ = linear(config)
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=0.1, weight_decay=0.1)
    before = site.lora_b.detach().clone()
    for step in range(5):
        model(randn(7, IN, seed=step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(before, site.lora_b)
    for block, rank in enumerate(config.ranks):
        a = site.lora_a[block].unflatten(0, (-1, 4))
        assert int(a[:, :rank].count_nonzero()) == a[:, :rank].numel()
        assert int(a[:, rank:].count_nonzero()) == 0
        assert int(site.lora_b[block, :, rank:].count_nonzero()) == 0


def test_training_a_bfloat16_base_moves_the_adapter_below_bfloat16_rounding():
    model, site, _, _ = linear(TOWER_CONFIG, dtype=torch.bfloat16)
    fill(model)
    before = site.lora_b.detach().clone()
    optimizer = torch.optim.SGD(melora_fx.adapter_parameters(model).values(), lr=1e-6)
    model(randn(3, IN, dtype=torch.bfloat16)).sum().backward()
    assert site.lora_b.grad.dtype == torch.float32
    optimizer.step()
    moved = (site.lora_b != before) & (site.lora_b.bfloat16() == before.bfloat16())
    assert bool(moved.any())


def test_training_lowers_the_loss_and_leaves_the_base_alone(tower_case):
    model = tower_case.model.train()
    base = {name: value.clone() for name, value in tower_case.plain.state_dict().items()}
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=1e-2)
    x = randn(2, 8, IN)
    y = randn(2, 8, 6, seed=2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    state = model.state_dict()
    assert_equal({name: state[name] for name in base}, base)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = fill(melora_fx.rewrite(bert(), "query", TOWER_CONFIG)).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**tokens())[0].sum().backward()
        grads.append({name: p.grad for name, p in melora_fx.adapter_parameters(model).items()})
    assert_equal(grads[0], grads[1])
    assert all(bool(grad.any()) for grad in grads[0].values())


def test_generation_follows_the_adapter():
    ids = tokens(2, 4)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    plain = gpt2()
    expected = plain.generate(ids, **options)
    model = melora_fx.rewrite(gpt2(), ["c_attn", "c_proj", "c_fc"], TOWER_CONFIG)
    assert_equal(model.generate(ids, **options), expected)
    adapted = fill(model).generate(ids, **options)
    assert not torch.equal(adapted, expected)
    with melora_fx.disabled(model):
        assert_equal(model.generate(ids, **options), expected)
    assert_equal(melora_fx.fold(model).generate(ids, **options), adapted)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["no_dropout", "dropout"])
def test_inserted_nodes_are_plain_aten_nodes_and_the_code_can_be_read(dropout):
    config = MELoRAConfig(rank=2, num_blocks=3, dropout=dropout, split=3)
    model = melora_fx.rewrite(tower(), ["up", "own.projection"], config)
    up = melora_fx.sites(model)["up"].module.graph
    for node in up.nodes:
        if node.op == "call_function" and node.target is not F.linear:
            assert isinstance(node.target, torch._ops.OpOverload), node
            assert node.target.namespace == "aten"
    up.lint()
    for site in melora_fx.sites(model).values():
        assert "lora_a" in site.code
        assert "lora_b" in site.code
        assert "bmm" in site.code


@pytest.mark.parametrize("build", [tower, bert, gpt2], ids=["tower", "bert", "gpt2"])
def test_returns_the_same_object_and_keeps_its_parts(build):
    model = build()
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    result = melora_fx.rewrite(model, "all-linear", MELoRAConfig(rank=2, num_blocks=3))
    assert result is model
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in modules.items())
    assert all(isinstance(after[name], type(module)) for name, module in modules.items())
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("lowering", ["plain", "auto"])
def test_rewritten_model_is_exported_with_its_plain_nodes(lowering):
    plain = rewritten_tower(config=replace(TOWER_CONFIG, lowering="plain"))
    model = rewritten_tower(config=replace(TOWER_CONFIG, lowering=lowering))
    x = randn(2, 5, IN)
    program = torch.export.export(model, (x,), strict=False)
    assert_equal(output_of(program.module(), x), output_of(plain, x))


def test_freezes_all_but_the_adapter_and_what_is_kept():
    model = melora_fx.rewrite(tower(), "up", TOWER_CONFIG, keep_trainable=["head", "norm"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"up.lora_a", "up.lora_b", "head.weight", "head.bias", "norm.weight", "norm.bias"}


@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_kept_module_is_trained(whole):
    options = {"example_inputs": tokens()} if whole else {}
    model = melora_fx.rewrite(bert_classifier(), "query", TOWER_CONFIG, keep_trainable="classifier", **options)
    result = model(**tokens())
    result[0].sum().backward()
    grads = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"classifier.weight", "classifier.bias"} <= grads
    assert all("classifier" in name or "lora" in name for name in grads)


@pytest.mark.parametrize("kept", ["head", "own"], ids=["the_site", "above_the_site"])
def test_what_is_kept_trainable_is_not_adapted_too(kept):
    model = tower()
    with assert_unchanged(model), pytest.raises(ValueError, match="`keep_trainable` and `targets` both name"):
        melora_fx.rewrite(model, ["head", "projection"], TOWER_CONFIG, keep_trainable=kept)


@pytest.mark.parametrize(
    ("keep_trainable", "text"),
    [
        pytest.param("heda", r"`keep_trainable`: 'heda' matches nothing; nearest: head", id="unknown"),
        pytest.param(["head", "xyzzy"], "`keep_trainable`: 'xyzzy' matches nothing; nearest: up", id="one_of_two"),
        pytest.param("drop", "`keep_trainable`: 'drop' matches nothing", id="module_without_parameters"),
    ],
)
def test_kept_name_that_matches_nothing(keep_trainable, text):
    model = tower()
    with assert_unchanged(model), pytest.raises(ValueError, match=text):
        melora_fx.rewrite(model, "up", TOWER_CONFIG, keep_trainable=keep_trainable)


def test_indivisible_features_are_named_all_at_once():
    model = tower()
    with assert_unchanged(model), pytest.raises(ValueError, match="must be divisible") as caught:
        melora_fx.rewrite(model, "all-linear", MELoRAConfig(num_blocks=8))
    lines = str(caught.value).splitlines()
    assert lines == [
        "`up`: `out_features` (=36) must be divisible by `num_blocks` (=8); these would do: 1, 2, 3, 4, 6, 12",
        "`gate`: `out_features` (=36) must be divisible by `num_blocks` (=8); these would do: 1, 2, 3, 4, 6, 12",
        "`own.projection`: `out_features` (=36) must be divisible by `num_blocks` (=8); "
        "these would do: 1, 2, 3, 4, 6, 12",
        "`conv`: `in_features` (=36) must be divisible by `num_blocks` (=8); these would do: 1, 2, 3, 4, 6, 12",
        "`head`: `out_features` (=6) must be divisible by `num_blocks` (=8); these would do: 1, 2, 3, 6",
    ]


def test_misfit_of_a_split_is_refused():
    model = tower()
    with assert_unchanged(model), pytest.raises(ValueError, match=r"`up`: .*must be divisible by `split` \(=5\)"):
        melora_fx.rewrite(model, "up", MELoRAConfig(rank=1, num_blocks=1, split=5))


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        pytest.param("nope", {}, id="unknown_target"),
        pytest.param({"up": TOWER_CONFIG, "gate": MELoRAConfig(num_blocks=5)}, {}, id="one_misfit"),
        pytest.param("up", {"keep_trainable": "nope"}, id="unknown_kept"),
        pytest.param("up", {"keep_trainable": "nope", "example_inputs": (randn(2, IN),)}, id="unknown_kept_whole"),
    ],
)
def test_refusal_changes_nothing(targets, options):
    model = tower()
    next(model.parameters()).requires_grad_(False)
    with assert_unchanged(model), pytest.raises(ValueError, match=r"nearest|divisible"):
        melora_fx.rewrite(model, targets, TOWER_CONFIG, **options)


def test_rewriting_twice_is_refused_and_folding_allows_it_again():
    model = rewritten_tower()
    with assert_unchanged(model), pytest.raises(MELoRAError, match="already rewritten"):
        melora_fx.rewrite(model, "up", TOWER_CONFIG)
    melora_fx.fold(model)
    x = randn(2, IN)
    folded = output_of(model, x)
    melora_fx.rewrite(model, "all-linear", TOWER_CONFIG)
    assert list(melora_fx.sites(model)) == list(TOWER_SITES)
    assert_equal(output_of(model, x), folded)


def test_rewrite_twice_of_one_class_keeps_models_apart():
    first = rewritten_tower(0)
    second = rewritten_tower(0, MELoRAConfig(rank=1, num_blocks=2))
    x = randn(2, IN)
    before = output_of(first, x)
    melora_fx.fold(second)
    assert_equal(output_of(first, x), before)


@pytest.mark.parametrize("whole", [False, True], ids=["graph_module", "whole"])
@pytest.mark.parametrize("targets", ["all-linear", ["0", "2"], ["1"]], ids=["all", "first_and_last", "middle"])
def test_a_linear_that_feeds_a_linear_is_adapted_first(whole, targets):
    """In one graph: the later adapter must see the earlier one's output, even if no node is between them."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(randn(24, 24, seed=seed) / 5) for seed in range(3))

        def forward(self, x):
            return x @ self.a.T @ self.b.T @ self.c.T

    names = {"0": "a", "1": "b", "2": "c"}
    targets = [names[name] for name in targets] if isinstance(targets, list) else targets
    plain = Chain()
    x = randn(3, 24)
    model = Chain() if whole else fx.symbolic_trace(Chain())
    model = fill(melora_fx.rewrite(model, targets, TOWER_CONFIG, example_inputs=(x,) if whole else None))
    assert_near(output_of(model, x), output_of(dense_copy(model, plain), x.double()))
