"""A model whose forward accepts and returns its cache as tensors: what it computes, and that it is restored after."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from support.decoders import SIZES, VOCABULARY, example, llama, spread
from support.models import assert_equal, assert_unchanged, bert_classifier, gpt2, randn, tokens, tower
from torch import nn

import melora_fx
from exporters.decoders.flat_cache import CacheLayout, cache_layout, cache_misfit, dotted, flat_cache, identifier
from exporters.onnx_files.cache_names import past_names, past_of
from exporters.private import cache_argument

TEXTS = {"input_ids": torch.tensor([[5, 9, 4, 20], [7, 8, 3, 11]]), "attention_mask": torch.ones(2, 4).long()}


def gemma() -> Any:
    """Returns a Gemma 3 with a window on the first of two layers."""
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(**SIZES | {"head_dim": 8, "sliding_window": 4, "layer_types": types})
    return spread(hf.Gemma3ForCausalLM(config))


def bloom() -> Any:
    torch.manual_seed(0)
    return spread(hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)))


def with_rope(kind: str) -> Any:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    return llama(
        rope_parameters=rope | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind != "yarn" else rope
    )


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (llama, CacheLayout(2, takes_positions=True)),
        (lambda: gpt2(num_layers=1), CacheLayout(1, takes_positions=True)),
        (gemma, CacheLayout(2, takes_positions=True)),
        (bloom, CacheLayout(1, takes_positions=False)),
        (lambda: melora_fx.rewrite(llama(), "all-linear"), CacheLayout(2, takes_positions=True)),
    ],
    ids=["llama", "gpt2", "a window", "no positions", "rewritten"],
)
def test_the_layout_of_a_cache(make: Callable[[], Any], layout: CacheLayout) -> None:
    model = make().eval()
    with assert_unchanged(model):
        assert cache_layout(model) == layout
        assert cache_misfit(model, example()) is None


def test_what_has_no_such_cache_has_no_layout() -> None:
    assert cache_layout(tower()) is None
    assert cache_layout(bert_classifier(num_layers=1)) is None
    torch.manual_seed(0)
    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1))
    assert cache_layout(mamba) is None


@pytest.mark.parametrize(
    ("make", "inputs", "reason"),
    [
        (tower, {"x": randn(2, 24)}, "`Tower` is not a transformers model that generates"),
        (bert_classifier, tokens(), "`BertForSequenceClassification` is not a transformers model that generates"),
        (lambda: llama().model, example(), "`LlamaModel` is not a transformers model that generates"),
        (llama, {"inputs_embeds": randn(2, 7, 32)}, "`example_inputs` has no `input_ids`"),
        (llama, example() | {"labels": 1, "use_cache": True}, "`example_inputs` has `labels`, `use_cache` in addition"),
        (
            llama,
            example() | {"attention_mask": torch.ones(2, 9)},
            "`attention_mask` has the shape (2, 9), not that",
        ),
        (llama, example() | {"attention_mask": torch.ones(2, 1, 7, 7)}, "`attention_mask` has the shape (2, 1, 7, 7)"),
        (lambda: with_rope("dynamic"), example(), "(`rope_type` 'dynamic') changes with the number of tokens"),
        (lambda: with_rope("longrope"), example(), "(`rope_type` 'longrope') changes with the number of tokens"),
    ],
    ids=[
        "a module",
        "a classifier",
        "no head",
        "no tokens",
        "more inputs",
        "a longer mask",
        "a mask of four axes",
        "dynamic rope",
        "long rope",
    ],
)
def test_why_there_is_no_cache(make: Callable[[], Any], inputs: dict[str, Any], reason: str) -> None:
    assert reason in str(cache_misfit(make(), inputs))


def test_a_rotary_embedding_of_fixed_frequencies_is_none() -> None:
    assert cache_misfit(with_rope("yarn"), example()) is None


def test_a_kind_of_rotary_embedding_for_each_kind_of_layer() -> None:
    model = gemma()
    kinds = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}
    model.config = SimpleNamespace(
        is_encoder_decoder=False, get_text_config=lambda decoder: SimpleNamespace(rope_parameters=kinds)
    )
    assert "'dynamic'" in str(cache_misfit(model, example()))


class TakesAGate(hf.LlamaForCausalLM):
    def forward(self, input_ids: Any, attention_mask: Any, gate: Any, past_key_values: Any = None, **more: Any) -> Any:
        outputs = super().forward(input_ids, attention_mask, **{str(cache_argument(self)): past_key_values}, **more)
        outputs.logits = outputs.logits * gate
        return outputs


class TakesAnything(hf.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class GivesATuple(hf.LlamaForCausalLM):
    def forward(self, input_ids: Any, attention_mask: Any = None, past_key_values: Any = None, **more: Any) -> Any:
        return (super().forward(input_ids, attention_mask, **more).logits,)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (TakesAGate, "its forward does not run with only tokens (TypeError: "),
        (TakesAnything, "`TakesAnything.forward` must accept a cache and `attention_mask`"),
        (GivesATuple, "it keeps more of earlier tokens than keys and values of each layer"),
    ],
)
def test_forwards_of_a_users_own(kind: Any, reason: str) -> None:
    model = kind(hf.LlamaConfig(**SIZES)).eval()
    assert reason in str(cache_misfit(model, example()))


def whole_and_in_steps(model: Any, *steps: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the outputs for `TEXTS` in one step, and in these steps, each with the cache of the previous ones."""
    taken = []
    end = 0
    with torch.no_grad(), flat_cache(model):
        whole = model(**TEXTS)
        past: dict[str, torch.Tensor] = {}
        for size in steps:
            start, end = end, end + size
            given = {"input_ids": TEXTS["input_ids"][:, start:end], "attention_mask": TEXTS["attention_mask"][:, :end]}
            taken.append(model(**given, **past))
            past = {identifier(past_of(name)): value for name, value in taken[-1].items() if name != "logits"}
    return whole, taken


@pytest.mark.parametrize("make", [llama, gemma, bloom])
def test_steps_compute_what_the_model_computes_at_once(make: Callable[[], Any]) -> None:
    model = make()
    with torch.no_grad():
        expected = model(**TEXTS, use_cache=False).logits
    whole, steps = whole_and_in_steps(model, 2, 1, 1)
    torch.testing.assert_close(whole["logits"], expected)
    torch.testing.assert_close(torch.cat([step["logits"] for step in steps], dim=1), expected)
    for name, value in whole.items():
        if name != "logits":
            torch.testing.assert_close(steps[-1][name], value)


def test_names_and_shapes_are_those_of_a_graph() -> None:
    whole, _ = whole_and_in_steps(llama(), 4)
    names = [f"present.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert [*whole] == ["logits", *names]
    assert {whole[name].shape for name in names} == {(2, 2, 4, 8)}


def test_the_past_is_taken_by_either_name_and_left_alone() -> None:
    model = llama()
    with torch.no_grad(), flat_cache(model):
        first = model(input_ids=TEXTS["input_ids"][:, :2])
        past = {past_of(name): value.clone() for name, value in first.items() if name != "logits"}
        before = {name: value.clone() for name, value in past.items()}
        dots = model(input_ids=TEXTS["input_ids"][:, 2:], **past)
        lines = model(input_ids=TEXTS["input_ids"][:, 2:], **{identifier(name): each for name, each in past.items()})
    assert_equal(dots, lines)
    assert_equal(past, before)


@pytest.mark.parametrize("name", [*past_names(2), *past_names(12, "encoder."), "attention_mask", "position_ids"])
def test_names_have_an_inverse(name: str) -> None:
    assert identifier(name).isidentifier()
    assert dotted(identifier(name)) == name
    assert dotted(name) == name


@pytest.mark.parametrize("has_own", [False, True], ids=["its class's", "its own"])
@pytest.mark.parametrize("fails", [False, True], ids=["", "after an error"])
def test_the_forward_is_put_back(has_own: bool, fails: bool) -> None:
    model = llama()
    calls = []
    if has_own:
        inner = model.forward

        def counted(input_ids: Any = None, attention_mask: Any = None, cache: Any = None, **more: Any) -> Any:
            calls.append(input_ids.shape)
            return inner(input_ids=input_ids, attention_mask=attention_mask, cache=cache, **more)

        model.forward = counted
    before = dict(vars(model))
    with assert_unchanged(model):
        try:
            with flat_cache(model), torch.no_grad():
                model(**TEXTS)
                assert vars(model)["forward"] is not before.get("forward")
                if fails:
                    model(input_ids=torch.full((1, 1), VOCABULARY))
        except IndexError:
            assert fails
    assert vars(model) == before
    assert calls == ([(2, 4), (1, 1)] if fails else [(2, 4)]) * has_own


def test_blocks_within_blocks_are_left_one_by_one() -> None:
    model = nn.Linear(2, 2)
    other = llama()
    with flat_cache(other):
        outer = vars(other)["forward"]
        with pytest.raises(AssertionError), flat_cache(model):  # a module without a cache
            pass
        assert vars(other)["forward"] is outer
    assert "forward" not in vars(other)
    assert "forward" not in vars(model)
