"""Experts of a mixture in a user's week: trained, moved from one form to another, distinguished from other stacks.

Also what a second reader tried: optimizers, wrapped layers, resized heads, parts of a model.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.expert_stacks import CONFIG, FORMS, TARGETS, expected, factor_gradients, inputs, mixtral, the_site
from support.expert_stacks import rewritten as rewritten_experts
from support.models import (
    IN,
    OUT,
    assert_equal,
    assert_near,
    assert_unchanged,
    bert_classifier,
    by_torch_save,
    dense_copy,
    fill,
    gpt2,
    output_of,
    randn,
    tokens,
)
from support.packed import Caller, Lines, Packed
from support.training import STEPS, StopAt, trainer_of
from torch import nn
from torch.nn import functional as F
from transformers import Trainer

import melora_fx
from melora_fx import AdapterCheckpointCallback, MELoRAConfig, MELoRAError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lru_cache.*:UserWarning", "ignore:`?gradient_checkpointing"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
THREE = MELoRAConfig(rank=2, num_blocks=3, alpha=3.0)


def captured(form: str, config: MELoRAConfig = CONFIG, example: dict[str, torch.Tensor] | None = None) -> nn.Module:
    return fill(melora_fx.rewrite(mixtral(form), TARGETS, config, example_inputs=example or tokens()))


def near(actual: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-5) -> bool:
    """Returns whether tensors are equal up to rounding, relative to the largest value."""
    return bool((actual.double() - wanted.double()).abs().max() <= bound * wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_in_place_they_compile_as_one_graph(form: str, dtype: torch.dtype) -> None:
    """In float32, transformers calls another operator when Dynamo compiles."""
    sizes = {"hidden_size": 32, "intermediate_size": 32}  # and a rank in multiples of 16 bytes
    config = MELoRAConfig(rank=8, num_blocks=2)
    model = fill(melora_fx.rewrite(mixtral(form, **sizes), "all-linear", config)).to(dtype).eval()
    with torch.no_grad():
        wanted = output_of(model, tokens())
        compiled = output_of(torch.compile(model, backend="eager", fullgraph=True), tokens())
    assert near(compiled, wanted, 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.slow
def test_an_adapter_means_the_same_in_every_form_and_place(tmp_path: Path) -> None:
    """grouped, whole → batched, whole → batched, in place → grouped, whole."""
    model = captured("grouped_mm")
    wanted = output_of(model, tokens())
    for step, (form, example) in enumerate((("batched_mm", tokens()), ("batched_mm", None), ("grouped_mm", tokens()))):
        melora_fx.save_adapter(model, tmp_path / str(step))
        names = list(melora_fx.sites(model))
        model = melora_fx.load_adapter(mixtral(form), tmp_path / str(step), example_inputs=example)
        assert list(melora_fx.sites(model)) == names
        assert near(output_of(model, tokens()), wanted)
    assert_equal(output_of(model, tokens()), wanted)


@pytest.mark.default_cases("grouped_mm")
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_micro_batches_of_other_sizes_than_the_example(form: str) -> None:
    """Compared with autograd through W + Δ in the dense float64 model."""
    model = captured(form)
    dense = None
    batches = (tokens(), tokens(3, 7, seed=5), tokens(1, 1, seed=6))
    for batch in batches:
        logits = model(**batch).logits
        (logits * randn(*logits.shape, seed=3)).sum().backward()
    dense = dense_copy(model, mixtral("batched_mm"))
    for batch in batches:
        logits = dense(**batch).logits
        (logits * randn(*logits.shape, seed=3).double()).sum().backward()
    weights = dict(dense.named_parameters())
    for name, site in melora_fx.sites(model).items():
        for kind, gradient in zip(("lora_a", "lora_b"), factor_gradients(site, weights[name].grad), strict=True):
            assert near(getattr(site, kind).grad, gradient, 1e-4), (name, kind)


@pytest.mark.default_cases("grouped_mm")
@pytest.mark.parametrize("form", FORMS)
def test_one_expert_for_each_token(form: str) -> None:
    plain = mixtral(form, num_experts_per_tok=1)
    model = fill(melora_fx.rewrite(plain, TARGETS, CONFIG, example_inputs=tokens()))
    dense = dense_copy(model, mixtral("batched_mm", num_experts_per_tok=1))
    for given in (tokens(1, 1), tokens(1, 9), tokens(7, 1)):
        assert near(output_of(model, given), output_of(dense, given))


@pytest.mark.parametrize("form", FORMS)
def test_ranks_and_alphas_are_exchanged_in_place(form: str, tmp_path: Path) -> None:
    small = MELoRAConfig(rank=(1, 3), num_blocks=2, alpha=(2.0, 5.0), use_rslora=True)
    other = fill(rewritten_experts(form, small))
    melora_fx.save_adapter(other, tmp_path)
    model = fill(rewritten_experts(form, MELoRAConfig(rank=4, num_blocks=2, alpha=1.0)), seed=6)
    melora_fx.load_adapter(model, tmp_path)
    assert_near(model(**inputs()), expected(other, inputs()))


@pytest.mark.parametrize("form", FORMS)
def test_a_site_knows_whether_its_rows_are_sorted_by_expert(form: str) -> None:
    """Copies too, and while the base runs: exports read it."""
    model = rewritten_experts(form)
    for each in (model, by_torch_save(model)):
        assert the_site(each).record.is_aten == (form != "grouped_mm")
        with melora_fx.disabled(each):
            assert the_site(each).record.is_aten == (form != "grouped_mm")


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode_is_right_or_refused(form: str) -> None:
    model = fill(rewritten_experts(form))
    lora_b = the_site(model).lora_b.detach()

    def output(values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {"stack_lora_b": values}, (), inputs())

    try:
        with torch.no_grad():
            _, tangent = torch.func.jvp(output, (lora_b,), (lora_b,))
    except (MELoRAError, NotImplementedError):
        return
    with melora_fx.disabled(model):
        base = model(**inputs())
    assert_near(tangent, expected(model, inputs()) - base.double())  # linear in B


class Pieces(Lines):
    """Rows as a language model's collator returns them."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(index), "attention_mask": torch.ones(6, dtype=torch.long)}


def example_with_labels() -> dict[str, torch.Tensor]:
    given = tokens(2, 6)
    return {**given, "labels": given["input_ids"]}


def losses_of(model: nn.Module, directory: Path, *callbacks: Any, resume: Any = None, **options: Any) -> list[float]:
    made, losses = trainer_of(model, directory, *callbacks, data=Pieces(), **options)
    made.train(resume_from_checkpoint=resume)
    return list(losses.by_step.values())


@pytest.mark.slow
def test_a_trainer_trains_every_form_alike(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_strategy": "no"}
    in_place = fill(melora_fx.rewrite(mixtral("batched_mm"), TARGETS, CONFIG))
    wanted = losses_of(in_place, tmp_path, gradient_checkpointing=True, **options)
    for form in FORMS:
        actual = losses_of(captured(form, example=example_with_labels()), tmp_path, **options)
        assert actual == pytest.approx(wanted, rel=1e-4)


class Own(nn.Module):
    """A user-defined model: no `save_pretrained`, no `tie_weights`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, IN)
        self.hidden = nn.Linear(IN, IN)
        self.head = nn.Linear(IN, 50)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: Any = None) -> dict[str, Any]:
        logits = self.head(torch.tanh(self.hidden(self.embedding(input_ids))))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


WITHOUT_SAVE_PRETRAINED: dict[str, Callable[[], nn.Module]] = {
    "a whole capture": lambda: captured("grouped_mm", example=example_with_labels()),
    "one's own model": lambda: fill(melora_fx.rewrite(Own(), ["hidden"], THREE)),
}


@pytest.mark.slow
@pytest.mark.parametrize("build", WITHOUT_SAVE_PRETRAINED.values(), ids=WITHOUT_SAVE_PRETRAINED)
def test_a_model_without_save_pretrained_resumes_from_its_adapter(build: Any, tmp_path: Path) -> None:
    callback = AdapterCheckpointCallback
    wanted = losses_of(build(), tmp_path / "whole", callback())
    losses_of(build(), tmp_path / "run", callback(), StopAt(3))
    assert losses_of(build(), tmp_path / "run", callback(), resume=True)[-3:] == pytest.approx(wanted[-3:], rel=1e-6)


@pytest.mark.default_cases("one's own model")
@pytest.mark.parametrize("build", WITHOUT_SAVE_PRETRAINED.values(), ids=WITHOUT_SAVE_PRETRAINED)
def test_a_model_without_save_pretrained_gets_its_best_adapter(build: Any, tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    assert len(losses_of(build(), tmp_path, AdapterCheckpointCallback(), **options)) == STEPS


@pytest.mark.slow
def test_generate_of_the_model_inside_folded() -> None:
    model = mixtral()
    graph = fill(melora_fx.rewrite(model, TARGETS, CONFIG, example_inputs=tokens()))

    def generated() -> torch.Tensor:
        return model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=8, do_sample=False, pad_token_id=0)

    before = generated()
    with melora_fx.folded(graph):
        inside = generated()
    assert_equal(generated(), before)
    assert not torch.equal(inside, before)
    melora_fx.fold(graph)
    assert_equal(generated(), inside)


def test_copies_in_place_and_other_implementations_later() -> None:
    model = fill(melora_fx.rewrite(mixtral("batched_mm"), TARGETS, CONFIG))
    wanted = output_of(model, tokens())
    folded = melora_fx.fold(copy.deepcopy(model))
    model.set_experts_implementation("grouped_mm")
    assert near(output_of(model, tokens()), wanted)
    for form in ("grouped_mm", "eager"):
        folded.set_experts_implementation(form)
        assert near(output_of(folded, tokens()), wanted)
    model.set_experts_implementation("eager")
    with pytest.raises(MELoRAError, match=r"`model\.layers\.0\.mlp\.experts\.(gate_up|down)_proj`: .* uses its weight"):
        model(**tokens())


class Added(nn.Module):
    """Learned positions of several kinds, like prompts and relative tables."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 5, IN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table[0]


class Gains(Added):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.table.mean(0)


class Causal(nn.Conv1d):
    """A convolution as streaming audio models write it."""

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Standardised(nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return F.conv1d(x.transpose(1, 2), weight, self.bias, padding="same").transpose(1, 2)


class Convolution(nn.Module):
    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x.transpose(1, 2)).transpose(1, 2)


NO_STACKS: dict[str, Callable[[], nn.Module]] = {
    "Conv1d": lambda: Convolution(nn.Conv1d(IN, IN, 3, padding=1)),
    "ConvTranspose1d": lambda: Convolution(nn.ConvTranspose1d(IN, IN, 1)),
    "a table": Added,
    "gains": Gains,
    "Conv1d, causal": lambda: Causal(IN, IN, 3, padding=1),
    "Conv1d, standardised": lambda: Standardised(IN, IN, 3),
    "Conv1d, weight norm": lambda: Convolution(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(IN, IN, 3, padding=1)),
    ),
}


@pytest.mark.parametrize("captured_whole", [False, True], ids=["in place", "whole"])
@pytest.mark.parametrize("build", NO_STACKS.values(), ids=NO_STACKS)
def test_all_linear_does_not_miss_what_is_no_linear(build: Callable[[], nn.Module], captured_whole: bool) -> None:
    model = nn.Sequential(nn.Linear(IN, IN), build(), nn.Linear(IN, IN))
    example = (randn(2, 5, IN),) if captured_whole else None
    rewritten = melora_fx.rewrite(model, "all-linear", THREE, example_inputs=example)  # a warning would be an error
    assert set(melora_fx.sites(rewritten)) == {"0", "2"}


def test_what_cannot_be_captured_has_no_experts_to_blame() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = hf.BertConfig()
            self.config._experts_implementation = "eager"  # as transformers sets it in any model
            self.convolution = nn.Conv1d(IN, IN, 1)
            self.linear = nn.Linear(IN, IN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.convolution(x.transpose(1, 2)).transpose(1, 2)
            return self.linear(x) if x.sum() > 0 else x

    model = Branching()
    with assert_unchanged(model), pytest.raises(melora_fx.MELoRAError, match=r"torch\.export cannot capture") as caught:
        melora_fx.rewrite(model, "all-linear", THREE, example_inputs=(randn(2, 5, IN),))
    assert "set_experts_implementation" not in str(caught.value)


@pytest.mark.parametrize("of", ["its own", "another model's"])
def test_an_optimizer_steps_beside_a_packed_linear(of: str) -> None:
    model = fill(melora_fx.rewrite(nn.Sequential(nn.Linear(IN, IN), Packed(IN, OUT)), "all-linear", THREE))
    trained = model if of == "its own" else nn.Linear(IN, OUT)
    codes = model[1].codes.clone()
    parameters = [value for value in trained.parameters() if value.requires_grad]
    before = [value.detach().clone() for value in parameters]
    optimizer = torch.optim.SGD(parameters, 1e-2)
    trained(randn(5, IN)).sum().backward()
    optimizer.step()
    assert not any(torch.equal(value, old) for value, old in zip(parameters, before, strict=True))
    assert_equal(model[1].codes, codes)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_trained_bias_gets_the_gradient_of_the_packed_forward(scale: float) -> None:
    plain = nn.Sequential(nn.Linear(IN, IN), Caller(Packed(IN, OUT), scale=scale))
    x = randn(5, IN)
    plain(x).sum().backward()
    wanted = plain[1].inner.bias.grad.clone()
    model: Any = fill(melora_fx.rewrite(plain, "all-linear", THREE))
    model[1].inner.bias.grad = None
    model[1].inner.bias.requires_grad_(True)
    model(x).sum().backward()
    assert_equal(model[1].inner.bias.grad, wanted)


class Pairs(nn.Module):
    """Products of pairs of features, chosen as in layers of logic gates."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = IN
        self.register_buffer("pairs", torch.randint(0, IN, (IN, 2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., self.pairs[:, 0]] * x[..., self.pairs[:, 1]]


def test_a_table_of_indices_is_no_packed_weight() -> None:
    report = melora_fx.match(nn.Sequential(nn.Linear(IN, IN), Pairs()), "all-linear", THREE)
    assert [site.name for site in report.sites] == ["0"]


def with_compiled_layers() -> Any:
    model = bert_classifier()
    for index, layer in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[index] = torch.compile(layer, backend="eager")
    return model


KEPT = "bert.encoder.layer.0.output.LayerNorm"


def test_a_module_kept_inside_a_compiled_layer_is_loaded(tmp_path: Path) -> None:
    model = fill(melora_fx.rewrite(bert_classifier(), ["query"], THREE, keep_trainable=KEPT))
    melora_fx.save_adapter(model, tmp_path)
    loaded = melora_fx.load_adapter(with_compiled_layers(), tmp_path)
    assert_equal(output_of(loaded, tokens()), output_of(model, tokens()))


def test_kept_and_adapted_at_once_is_refused_in_compiled_layers() -> None:
    model = with_compiled_layers()
    with assert_unchanged(model), pytest.raises(ValueError, match="`keep_trainable` and `targets` both name"):
        melora_fx.rewrite(model, ["query"], THREE, keep_trainable="attention")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_the_verbs_on_layers_compiled_after_the_rewrite() -> None:
    model = bert_classifier()
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    fill(melora_fx.rewrite(model, ["query", "value"], THREE, keep_trainable="classifier"))
    wanted = output_of(model, tokens())
    for index, layer in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[index] = torch.compile(layer, backend="eager")
    model.classifier = torch.compile(model.classifier, backend="eager")
    assert_equal(output_of(model, tokens()), wanted)
    with melora_fx.disabled(model):
        assert_equal(output_of(model, tokens()), output_of(bert_classifier(), tokens()))
    with melora_fx.folded(model):
        assert near(output_of(model, tokens()), wanted)
    assert_equal(output_of(model, tokens()), wanted)
    assert near(output_of(melora_fx.fold(model), tokens()), wanted)
    after = {name.replace("_orig_mod.", ""): value.requires_grad for name, value in model.named_parameters()}
    assert after == before


def grown() -> Any:
    model: Any = fill(melora_fx.rewrite(gpt2(), ["c_attn", "lm_head"], THREE))
    model.resize_token_embeddings(57)
    return model


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_a_fold_with_a_grown_head_changes_nothing() -> None:
    model = grown()
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    with pytest.raises((melora_fx.MELoRAError, RuntimeError)):
        melora_fx.fold(model, untie=True)
    assert_equal(model.transformer.h[0].attn.c_attn.weight.detach(), before)


def test_an_adapter_that_does_not_fit_its_weight_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(melora_fx.MELoRAError, match="lm_head"):
        melora_fx.save_adapter(grown(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("use", [Trainer.train, Trainer.evaluate], ids=["trained", "evaluated only"])
def test_a_folded_part_leaves_nothing_on_the_whole(use: Callable[[Trainer], Any], tmp_path: Path) -> None:
    model = bert_classifier()
    fill(melora_fx.rewrite(model.bert, ["query", "value"], THREE))
    model.classifier.requires_grad_(False)
    use(trainer_of(model, tmp_path / "run", AdapterCheckpointCallback())[0])
    melora_fx.fold(model.eval())
    model.save_pretrained(tmp_path / "folded")  # a warning would be an error here
    loaded = type(model).from_pretrained(tmp_path / "folded")
    assert_equal(output_of(loaded, tokens()), output_of(model, tokens()))
    trainer_of(model.requires_grad_(True), tmp_path / "more")[0].train()
