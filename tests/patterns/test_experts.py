"""Adapters of the experts of a mixture, whose weights are stacks of matrices.

The oracle multiplies each row by its own expert's dense W + Δ in float64.
"""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import peft
import pytest
import torch
import transformers as hf
from hypothesis import strategies as st
from support.expert_stacks import (
    CONFIG,
    CONFIGS,
    FORMS,
    IN,
    OUT,
    ROUTES,
    SIZES,
    TARGETS,
    E,
    Experts,
    _spread,
    expected,
    factor_gradients,
    inputs,
    mixtral,
    rewritten,
    the_site,
)
from support.models import (
    TOLERANCE,
    adapted_weight,
    assert_equal,
    assert_near,
    assert_unchanged,
    dense_copy,
    fill,
    output_of,
    randn,
    tokens,
)
from support.properties import exports
from torch import nn

import melora_fx
from exporters import OrtRunner, export_onnx, fold_onnx
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.adapter.update import add_update
from melora_fx.patterns.grouped_blocks import grouped_blocks

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*lru_cache.*:UserWarning"),
]


@pytest.mark.default_cases("*-torch.float32-out_in-*", "*-torch.bfloat16-in_out-mixed")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_outputs(form: str, dtype: torch.dtype, transposed: bool, route: str) -> None:
    model = rewritten(form, dtype=dtype, transposed=transposed)
    given = inputs(route, dtype)
    assert_equal(model(**given), Experts(form, dtype=dtype, transposed=transposed)(**given).detach())
    fill(model)
    site = the_site(model)
    assert (site.in_features, site.out_features, site.num_experts) == (IN, OUT, E)
    assert site.weight_is_transposed == transposed
    assert site.lora_a.dtype == torch.float32
    assert_near(model(**given), expected(model, given))


def test_a_module_of_ones_own_in_place() -> None:
    for form in ("batched_mm", "grouped_mm"):
        model = melora_fx.rewrite(Experts(form), "stack", CONFIG)
        assert_near(fill(model)(**inputs()), expected(model, inputs()))


@pytest.mark.situation(
    "Experts of a mixture",
    "`grouped_mm`, `batched_mm`, with `example_inputs=`",
    "output and gradients of the dense oracle",
)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_configurations_and_gradients(form: str, name: str) -> None:
    config = CONFIGS[name]
    model = fill(rewritten(form, config))
    site = the_site(model)
    assert (tuple(site.lora_a.shape), tuple(site.lora_b.shape)) == config.adapter_shapes(IN, OUT, E)
    given = inputs()
    given["x"].requires_grad_()
    output = model(**given)
    weights = randn(*output.shape, seed=8)
    (output * weights).sum().backward()
    dense = adapted_weight(site).requires_grad_()
    x = given["x"].detach().double().requires_grad_()
    oracle = torch.stack([dense[i] @ row for i, row in zip(given["ids"].tolist(), x, strict=True)])
    (oracle * weights.double()).sum().backward()
    assert_near(output, oracle)
    assert_near(given["x"].grad, x.grad)
    assert site.weight.grad is None
    for kind, gradient in zip(("lora_a", "lora_b"), factor_gradients(site, dense.grad), strict=True):
        assert_near(getattr(site, kind).grad, gradient)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_of_the_adapter_alone(form: str) -> None:
    model = fill(rewritten(form, MELoRAConfig(rank=2, num_blocks=2, dropout=0.5)))
    given = inputs()
    assert_near(model(**given), expected(model, given))
    model.train()
    torch.manual_seed(0)
    first = model(**given)
    second = model(**given)
    assert not torch.equal(first, second)
    with melora_fx.disabled(model):
        assert_equal(model(**given), Experts(form)(**given).detach())


def test_an_expert_without_rows_learns_nothing() -> None:
    for form in FORMS:
        model = fill(rewritten(form))
        model(**inputs("one without rows")).sum().backward()
        for gradient in (the_site(model).lora_a.grad, the_site(model).lora_b.grad):
            by_expert = gradient.chunk(E)
            assert not by_expert[2].any()
            assert all(by_expert[expert].any() for expert in (0, 1, 3))


def test_rows_behind_the_last_group_are_left_alone() -> None:
    """As with expert parallelism: they belong to another machine's experts and contain anything."""
    x = randn(5, 6)
    x[3:] = float("nan")
    x.requires_grad_()
    blocks = randn(4, 2, 3, seed=2).requires_grad_()
    offs = torch.tensor([1, 3])
    output = grouped_blocks(x, blocks, offs)
    assert_equal(output[3:].detach(), torch.zeros(2, 4))
    output.sum().backward()
    assert blocks.grad.isfinite().all()
    assert_equal(x.grad[3:], torch.zeros(2, 6))


def test_the_operator_is_sound() -> None:
    x, blocks = (randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((5, 6), (6, 4, 3)))
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    torch.library.opcheck(grouped_blocks, (x, blocks, offs))
    torch.autograd.gradcheck(lambda x, blocks: grouped_blocks(x, blocks, offs), (x, blocks))


def test_compilers_keep_what_reads_offsets_out_of_cuda_graphs() -> None:
    for operator in (grouped_blocks, torch.ops.melora.grouped_blocks_gradient.default):
        assert torch.Tag.cudagraph_unsafe in operator.tags


@hypothesis.given(data=st.data())
def test_the_operator_against_a_loop(data: st.DataObject) -> None:
    experts, blocks, width, height = (data.draw(st.integers(1, 4), label=name) for name in ("E", "N", "K", "L"))
    counts = data.draw(st.lists(st.integers(0, 5), min_size=experts, max_size=experts), label="rows")
    x = randn(sum(counts), blocks * width)
    matrices = randn(experts * blocks, height, width, seed=2)
    output = grouped_blocks(x, matrices, torch.tensor(counts).cumsum(0))
    dense = [torch.block_diag(*matrices.double()[e * blocks : (e + 1) * blocks]) for e in range(experts)]
    rows = zip(x.double().split(counts), dense, strict=True)
    assert_near(output, torch.cat([part @ matrix.t() for part, matrix in rows]))


def test_a_stack_used_otherwise_is_refused() -> None:
    class Normed(Experts):
        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(x, ids) + self.stack[ids].sum()

    model = Normed("batched_mm")
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match=r"`stack` cannot be adapted: its weight is also used by `index`"),
    ):
        melora_fx.rewrite(model, "stack", CONFIG, example_inputs=inputs())


def test_a_form_without_a_pattern_is_named() -> None:
    class AllExperts(Experts):
        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return torch.einsum("si,eoi->seo", x, self.stack).sum(1)

    report = melora_fx.match(AllExperts(""), lambda *_: True, CONFIG, example_inputs=inputs())
    name, reason = report.skipped[0]
    assert name == "stack"
    assert reason.startswith("a stack of matrices (4, 40, 24) in a form that has no pattern, `einsum`: ")


@pytest.mark.parametrize(("form", "lowering"), [("batched_mm", "plain"), ("grouped_mm", "activation")])
def test_lowerings(form: str, lowering: str) -> None:
    report = melora_fx.match(Experts(form), "stack", CONFIG, example_inputs=inputs())
    assert report.sites[0].lowering == lowering
    assert the_site(rewritten(form)).lowering == lowering
    model = Experts(form)
    config = dataclasses.replace(CONFIG, lowering="weight")
    with (
        assert_unchanged(model),
        pytest.raises(ValueError, match=r"`stack`: `lowering` \(='weight'\) needs a linear"),
    ):
        melora_fx.rewrite(model, "stack", config, example_inputs=inputs())


def test_the_lowered_form_has_the_plain_bits_and_no_gradient_of_the_stack() -> None:
    plain, model = (fill(rewritten("grouped_mm", dataclasses.replace(CONFIG, lowering=n))) for n in ("plain", "auto"))
    with torch.profiler.profile() as profile:
        output = model(**inputs())
        output.sum().backward()
    expected = plain(**inputs())
    expected.sum().backward()
    assert_equal(output, expected)
    for kind in ("lora_a", "lora_b"):
        assert_equal(getattr(the_site(model), kind).grad, getattr(the_site(plain), kind).grad)
    assert not any("grouped_mm_fallback" in event.key for event in profile.key_averages())
    assert sum(event.count for event in profile.key_averages() if event.key.endswith("blocks_gradient")) == 2  # A, B


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiled(form: str) -> None:
    torch._dynamo.reset()
    model = fill(rewritten(form))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for route in ("mixed", "one with all"):
        given = inputs(route)
        output = compiled(**given)
        assert_near(output, expected(model, given))
        output.sum().backward()
    assert the_site(model).lora_a.grad.any()


@pytest.fixture(scope="module", params=FORMS)
def whole(request: pytest.FixtureRequest) -> tuple[Any, nn.Module]:
    """A plain model, and a rewritten whole capture of its copy with filled adapters. Tests must copy before changes."""
    plain = mixtral(request.param)
    model = melora_fx.rewrite(copy.deepcopy(plain), TARGETS, CONFIG, example_inputs=tokens())
    return plain, fill(model)


@pytest.mark.default_cases("grouped_mm")
def test_match_and_sites(whole: tuple[Any, nn.Module]) -> None:
    plain, model = whole
    report = melora_fx.match(plain, TARGETS, CONFIG, example_inputs=tokens())
    assert [(site.in_features, site.out_features, site.num_experts) for site in report.sites] == [
        (24, 72, 4),
        (36, 24, 4),
    ]
    assert " × 4 " in str(report)
    parameters = melora_fx.adapter_parameters(model)
    assert list(parameters) == [f"{site.name}.{kind}" for site in report.sites for kind in ("lora_a", "lora_b")]
    assert sum(site.num_parameters for site in report.sites) == sum(p.numel() for p in parameters.values())


@pytest.mark.slow
def test_all_linear_has_the_experts() -> None:
    for example_inputs in (None, tokens()):
        report = melora_fx.match(mixtral("batched_mm"), "all-linear", CONFIG, example_inputs=example_inputs)
        assert sum(site.num_experts for site in report.sites) == 4 + 1 + 4 + 4  # attention, router, two stacks


def test_outputs_of_a_model(whole: tuple[Any, nn.Module]) -> None:
    """At other lengths too."""
    plain, model = whole
    model = copy.deepcopy(model)
    for given in (tokens(), tokens(3, 7)):
        dense = dense_copy(model, mixtral("batched_mm"))  # the grouped form does not compute in float64
        error = (output_of(model, given).double() - output_of(dense, given)).abs().max()
        assert error <= 1e-5 * output_of(dense, given).abs().max()
        with melora_fx.disabled(model):
            assert_equal(output_of(model, given), output_of(plain, given))


def test_folds(whole: tuple[Any, nn.Module]) -> None:
    plain, model = whole
    model = copy.deepcopy(model)
    expected = {name: adapted_weight(site) for name, site in melora_fx.sites(model).items()}
    before = output_of(model, tokens())
    stacks = {name: site.weight for name, site in melora_fx.sites(model).items()}
    report = melora_fx.check_fold(model)
    assert {site.total_rank for site in report.sites} == {E * 4}
    assert all(sum(site.ranks) == site.total_rank for site in report.sites)
    kept = {name: weight.clone() for name, weight in stacks.items()}
    with melora_fx.folded(model):
        inside = output_of(model, tokens())
    assert_equal(stacks, kept)
    melora_fx.fold(model)
    assert_equal(output_of(model, tokens()), inside)
    for name, weight in stacks.items():
        assert_near(weight, expected[name])
    assert (inside - before).abs().max() <= 1e-5 * before.abs().max()
    assert set(model.state_dict()) == set(plain.state_dict())
    assert not melora_fx.sites(model)


def test_a_fold_of_a_stack_has_the_bits_of_its_matrices(whole: tuple[Any, nn.Module]) -> None:
    model = copy.deepcopy(whole[1]).to(torch.bfloat16)
    for site in melora_fx.sites(model).values():
        adapter = AdapterTensors(site.config, site.lora_a.float(), site.lora_b.float())
        alone = [weight.detach().clone() for weight in site.weight]
        together = site.weight.detach().clone()
        for matrix, own in zip(alone, adapter.by_matrix(), strict=True):
            add_update(own, matrix)
        add_update(adapter, together)
        assert_equal(together, torch.stack(alone))


@pytest.mark.default_cases("grouped_mm")
def test_saves_and_loads(whole: tuple[Any, nn.Module], tmp_path: Path) -> None:
    plain, model = whole
    melora_fx.save_adapter(model, tmp_path)
    expected = output_of(model, tokens())
    loaded = melora_fx.load_adapter(copy.deepcopy(plain), tmp_path, example_inputs=tokens())
    assert_equal(output_of(loaded, tokens()), expected)
    other = fill(copy.deepcopy(model), seed=9)
    assert not torch.equal(output_of(other, tokens()), expected)
    assert_equal(output_of(melora_fx.load_adapter(other, tmp_path), tokens()), expected)
    wrong = copy.deepcopy(plain)
    with torch.no_grad():
        wrong.model.layers[0].mlp.experts.down_proj[3] += 1
    with (
        assert_unchanged(wrong),
        pytest.raises(MELoRAError, match=r"experts\.down_proj`: 1\d of 64 sampled values differ"),
    ):
        melora_fx.load_adapter(wrong, tmp_path, example_inputs=tokens())


def test_adapters_for_another_number_of_experts(whole: tuple[Any, nn.Module], tmp_path: Path) -> None:
    melora_fx.save_adapter(whole[1], tmp_path)
    plain = hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=3))
    with (
        assert_unchanged(plain),
        pytest.raises(MELoRAError, match=r"lora_a is \(8, 2, 12\) .* does not fit a weight of shape \(3, 72, 24\)"),
    ):
        melora_fx.load_adapter(plain, tmp_path, example_inputs=tokens())


def test_copies_and_pickles(whole: tuple[Any, nn.Module]) -> None:
    _, model = whole
    expected = output_of(model, tokens())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(output_of(other, tokens()), expected)
        assert melora_fx.sites(other).keys() == melora_fx.sites(model).keys()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = fill(copy.deepcopy(model), seed=9)
    other.load_state_dict(state)
    assert_equal(output_of(other, tokens()), expected)


@pytest.mark.slow
def test_programs_and_exports_of_the_grouped_form() -> None:
    plain = mixtral().requires_grad_(False)
    with melora_fx.capture.model_settings.without_cache(plain):
        program = torch.export.export(plain, (), tokens(), strict=False)
    model = melora_fx.rewrite(program, TARGETS, CONFIG)
    assert_equal(output_of(model, tokens()), output_of(plain, tokens()))
    assert list(melora_fx.sites(model)) == [f"model.layers.0.mlp.experts.{name}" for name in TARGETS]
    assert exports(fill(model), tokens())


@pytest.mark.situation(
    "Experts of a mixture", "`fold` of a whole capture", "the model's own `generate` uses the merged experts"
)
def test_the_original_model_has_what_was_folded() -> None:
    """A capture shares its parameters: `generate` of the model uses the merged experts."""
    model = mixtral()
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(**prompt, **options)
    graph = fill(melora_fx.rewrite(model, TARGETS, CONFIG, example_inputs=tokens()))
    expected = output_of(graph, tokens())
    assert_equal(model.generate(**prompt, **options), before)
    melora_fx.fold(graph)
    assert (output_of(model, tokens()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.equal(model.generate(**prompt, **options), before)


@pytest.mark.situation("Experts of a mixture", "in place, `grouped_mm`, `batched_mm`", "works")
@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_in_place(form: str) -> None:
    model = mixtral(form)
    types = {name: type(module) for name, module in model.named_modules()}
    rewritten_model = melora_fx.rewrite(model, TARGETS, CONFIG)
    assert rewritten_model is model
    fill(model)
    expected = output_of(model, tokens())
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, pad_token_id=0).shape == (1, 6)
    melora_fx.fold(model)
    assert (output_of(model, tokens()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert {name: type(module) for name, module in model.named_modules()} == types


@pytest.mark.situation(
    "Experts of a mixture", "in place, a loop over experts", "refused with an error that names the remedy"
)
def test_in_place_refusals_name_the_remedy() -> None:
    model = mixtral("eager")
    remedy = r"gate_up_proj` cannot .*called one by one: first call .*\(\"grouped_mm\"\)` or `\(\"batched_mm\"\)`"
    with assert_unchanged(model), pytest.raises(MELoRAError, match=remedy):
        melora_fx.rewrite(model, TARGETS, CONFIG)
    with pytest.warns(UserWarning, match=r"leaves 2 linears alone: .*experts\.gate_up_proj.*experts\.down_proj"):
        melora_fx.rewrite(model, "all-linear", CONFIG)


@pytest.mark.slow
def test_a_loop_over_experts_is_not_captured() -> None:
    model = mixtral("eager")
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match=r"cannot capture .*: a loop over experts .*\(\"grouped_mm\"\)`: "),
    ):
        melora_fx.rewrite(model, TARGETS, CONFIG, example_inputs=tokens())


@pytest.mark.default_cases("grouped_mm")
@pytest.mark.situation(
    "Experts of a mixture", "compared with PEFT's `target_parameters`", "the same outputs and merged stacks"
)
def test_against_peft(whole: tuple[Any, nn.Module]) -> None:
    """Ordinary LoRA of the experts: outputs, and the merged stacks."""
    plain, _ = whole
    config = MELoRAConfig(rank=3, num_blocks=1, alpha=6.0)
    model = fill(melora_fx.rewrite(copy.deepcopy(plain), TARGETS, config, example_inputs=tokens()))
    other = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=[f"mlp.experts.{n}" for n in TARGETS]),
    ).eval()
    copy_into_peft(model, other)
    expected = output_of(other, tokens())
    actual = output_of(model, tokens())
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    stacks = {name: site.weight for name, site in melora_fx.sites(model).items()}
    melora_fx.fold(model)
    merged = dict(other.merge_and_unload().named_parameters())
    for name, weight in stacks.items():
        torch.testing.assert_close(weight.data, merged[name].data, **TOLERANCE[torch.float32])


def copy_into_peft(model: nn.Module, other: nn.Module) -> None:
    """Copies A and B. PEFT stores A as (E·R, I), expert by expert, and B as (O, R·E), expert by expert in each rank."""
    wrappers = {
        f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}": module
        for path, module in other.named_modules()
        if hasattr(module, "parameter_name")
    }
    with torch.no_grad():
        for name, site in melora_fx.sites(model).items():
            wrapper = wrappers[name]
            wrapper.lora_A["default"].weight.copy_(site.lora_a.flatten(0, 1))
            wrapper.lora_B["default"].weight.copy_(site.lora_b.permute(1, 2, 0).flatten(1))


def gpt_oss(form: str) -> Any:
    """Returns a GPT-OSS, whose stacks are (E, I, O), with a bias."""
    torch.manual_seed(0)
    return _spread(hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, head_dim=12, num_local_experts=4)), form)


def qwen2_moe(form: str) -> Any:
    sizes = SIZES | {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 12}
    torch.manual_seed(0)
    return _spread(hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**sizes, num_experts=4)), form)


def qwen3_moe(form: str) -> Any:
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(**SIZES, moe_intermediate_size=20, head_dim=12, num_experts=4)
    return _spread(hf.Qwen3MoeForCausalLM(config), form)


@pytest.mark.parametrize(
    ("build", "form"),
    [
        pytest.param(build, form, marks=() if (build, form) == (gpt_oss, "grouped_mm") else pytest.mark.slow)
        for build in (gpt_oss, qwen2_moe, qwen3_moe)
        for form in FORMS
    ],
)
def test_other_architectures(build: Callable[[str], Any], form: str) -> None:
    plain = build(form)
    model = melora_fx.rewrite(copy.deepcopy(plain), TARGETS, CONFIG, example_inputs=tokens())
    assert sum(site.num_experts == 4 for site in melora_fx.sites(model).values()) == 2
    base = output_of(plain, tokens())
    assert_equal(output_of(model, tokens()), base)
    fill(model)
    dense = output_of(dense_copy(model, build("batched_mm")), tokens())
    actual = output_of(model, tokens())
    assert (actual.double() - dense).abs().max() <= 1e-5 * dense.abs().max()
    assert (dense - base).abs().max() > 0.1 * base.abs().max()
    stacks = [site for site in melora_fx.sites(model).values() if site.num_experts > 1]
    assert {site.weight_is_transposed for site in stacks} == {build is gpt_oss}
    melora_fx.fold(model)
    assert (output_of(model, tokens()) - actual).abs().max() <= 1e-5 * actual.abs().max()


@pytest.mark.slow
def test_bfloat16_of_a_model() -> None:
    """In bfloat16 the base's operator is `aten._grouped_mm`, the adapters' is not."""
    plain = mixtral(hidden_size=32, intermediate_size=48).to(torch.bfloat16)
    model = melora_fx.rewrite(copy.deepcopy(plain), TARGETS, CONFIG, example_inputs=tokens())
    assert {site.pattern for site in melora_fx.sites(model).values()} == {"aten._grouped_mm"}
    assert_equal(output_of(model, tokens()), output_of(plain, tokens()))
    fill(model)
    torch.compile(model, backend="aot_eager", fullgraph=True)(**tokens()).logits.float().sum().backward()
    before = output_of(model, tokens())
    melora_fx.fold(model)
    assert (output_of(model, tokens()) - before).abs().max() <= 0.1 * before.abs().max()


@pytest.mark.slow
def test_folds_into_a_checkpoint_that_holds_stacks(tmp_path: Path) -> None:
    model = gpt_oss("grouped_mm")
    model.save_pretrained(tmp_path / "base")
    graph = fill(melora_fx.rewrite(model, TARGETS, CONFIG, example_inputs=tokens()))
    melora_fx.save_adapter(graph, tmp_path / "adapter")
    melora_fx.fold(graph)
    melora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    folded = hf.GptOssForCausalLM.from_pretrained(tmp_path / "out")
    assert_equal(dict(folded.state_dict()), dict(model.state_dict()))


def test_a_checkpoint_that_holds_experts_one_by_one_is_refused(whole: tuple[Any, nn.Module], tmp_path: Path) -> None:
    plain, model = whole
    plain.save_pretrained(tmp_path / "base")
    melora_fx.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(MELoRAError, match=r"gate_up_proj`: the checkpoint stores its weight in another form: fold in"):
        melora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_unmerged_exports_that_are_refused(whole: tuple[Any, nn.Module], tmp_path: Path) -> None:
    _, model = whole
    site = next(iter(melora_fx.sites(model).values()))
    if "grouped" in site.pattern:
        for adapter in ("keep", "swap"):
            with pytest.raises(MELoRAError, match=r"experts\.gate_up_proj`.*cannot stay in a graph: .*batched_mm"):
                export_onnx(model, tokens(), tmp_path / "model.onnx", use_cache=False, adapter=adapter)


@pytest.mark.slow_cases("grouped_mm")
def test_exports(whole: tuple[Any, nn.Module], tmp_path: Path) -> None:
    """Merged graphs, from an export and a fold on disk; unmerged ones if the rows gather their matrices."""
    plain, model = whole
    arrays = {name: value.numpy() for name, value in tokens().items()}
    melora_fx.save_adapter(model, tmp_path / "adapter")
    export_onnx(plain, tokens(), tmp_path / "base.onnx", use_cache=False)
    fold_onnx(tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "merged.onnx")
    export_onnx(model, tokens(), tmp_path / "folded.onnx", use_cache=False, adapter="fold")
    paths = [tmp_path / "merged.onnx", tmp_path / "folded.onnx"]
    if "grouped" not in next(iter(melora_fx.sites(model).values())).pattern:
        export_onnx(model, tokens(), tmp_path / "unmerged.onnx", use_cache=False, adapter="keep")
        paths.append(tmp_path / "unmerged.onnx")
        with pytest.raises(MELoRAError, match=r"experts\.down_proj.*cannot be inputs: export with `keep` or `fold`"):
            export_onnx(model, tokens(), tmp_path / "swap.onnx", use_cache=False, adapter="swap")
    expected = output_of(model, tokens())
    for path in paths:
        actual = torch.from_numpy(OrtRunner(path).run(arrays)["logits"])
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
