"""The example step with which a decoder is exported: different sizes, padding, and a past from the model itself."""

from typing import Any

import pytest
import torch
import transformers as hf
from support.decoders import VOCABULARY, example, llama
from support.models import assert_equal, assert_unchanged

from exporters.decoders.example_step import example_step, padded_texts, positions_of, step_axes
from exporters.decoders.parts import parts_of
from melora_fx import MELoRAError

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 20)


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.arange(rows * length).view(rows, length) % (VOCABULARY - 3) + 3


@pytest.mark.parametrize("length", LENGTHS)
def test_past_and_new_tokens_are_several_and_not_as_many(length: int) -> None:
    step = example_step(llama(), {"input_ids": ids(2, length)})
    new, past = step["input_ids"].size(1), step["past_key_values.0.key"].size(2)
    assert min(new, past) >= 2
    assert new != past
    assert step["attention_mask"].shape == (2, past + new)
    assert step["position_ids"].shape == (2, new)


def test_the_inputs_are_those_of_a_graph_in_its_order() -> None:
    step = example_step(llama(), {"input_ids": ids(3, 7)})
    cache = [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert [*step] == ["input_ids", "attention_mask", "position_ids", *cache]
    assert {step[name].shape for name in cache} == {(3, 2, 4, 8)}
    assert all(value.is_contiguous() for value in step.values())
    assert {step[name].dtype for name in ("input_ids", "attention_mask", "position_ids")} == {torch.int64}


def test_the_step_follows_its_past() -> None:
    """For the text without padding, the step has the model's own cache of the first tokens, and the rest."""
    model = llama()
    step = example_step(model, {"input_ids": ids(2, 7)})
    whole, _ = padded_texts(ids(2, 7), None)
    with torch.no_grad():
        expected = model(input_ids=whole[1:], use_cache=True)
        first = model(input_ids=whole[1:, :4], use_cache=True)
    for layer, kept in enumerate(first["cache" if "cache" in first else "past_key_values"].layers):
        torch.testing.assert_close(step[f"past_key_values.{layer}.key"][1:], kept.keys)
        torch.testing.assert_close(step[f"past_key_values.{layer}.value"][1:], kept.values)
    assert_equal(step["input_ids"][1:], whole[1:, 4:])
    assert expected.logits.size(1) == 7


def test_the_first_text_is_padded_and_no_text_at_its_end() -> None:
    _, mask = padded_texts(ids(2, 7), None)
    assert mask.tolist() == [[0, 1, 1, 1, 1, 1, 1], [1] * 7]
    given = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
    _, mask = padded_texts(ids(2, 7), given)
    assert mask.tolist() == [[0, 0, 1, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32, torch.int64], ids=str)
def test_every_kind_of_mask_is_one_of_numbers(dtype: torch.dtype) -> None:
    given = torch.tensor([[0, 0, 1], [1, 1, 1]])
    before = given.clone()
    tokens, mask = padded_texts(ids(2, 3).int(), given.to(dtype))
    assert mask.dtype == tokens.dtype == torch.int64
    assert mask.tolist() == [[0, 0, 1, 0, 0, 1], [1] * 6]
    assert tokens.tolist() == ids(2, 3).repeat(1, 2).tolist()
    assert_equal(given, before)


def test_positions_are_counted_without_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    expected = [[0, 0, 0, 1, 2], [0, 1, 1, 2, 3], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    assert positions_of(mask).tolist() == expected


def test_a_model_without_positions_gets_none() -> None:
    torch.manual_seed(0)
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)).eval()
    assert [*example_step(bloom, {"input_ids": ids(2, 7)})][:3] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
    ]


@pytest.mark.parametrize("mode", ["train", "checkpointing"])
def test_a_model_in_training_is_left_in_it(mode: str) -> None:
    """With dropout, which draws random numbers, and without a cache in training."""
    model = llama(attention_dropout=0.5).train()
    if mode == "checkpointing":
        model.activation_checkpointing_enable()
    inputs = example()
    expected = example_step(llama(), inputs)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with assert_unchanged(model):
        (part,), notes = parts_of(model, inputs, "auto", has_own_axes=False, is_folder=True)
    assert not notes
    assert_equal(part.inputs, expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(inputs, example())


def test_axes_by_name() -> None:
    assert step_axes("input_ids") == step_axes("position_ids") == step_axes("logits") == {0: "batch", 1: "sequence"}
    assert step_axes("attention_mask") == {0: "batch", 1: "total_sequence"}
    assert step_axes("past_key_values.11.value") == {0: "batch", 2: "past_sequence"}
    assert step_axes("present.11.value") == {0: "batch", 2: "total_sequence"}
    for name in ("past_key_values.0.encoder.key", "present.0.encoder.value"):
        assert step_axes(name) == {0: "batch", 2: "encoder_sequence"}


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ({"input_ids": ids(2, 7) + VOCABULARY}, "IndexError"),
        ({"input_ids": ids(2, 7)[0]}, "IndexError"),
        ({"input_ids": ids(2, 7)[:, :0]}, "ZeroDivisionError"),
    ],
    ids=["outside of the vocabulary", "one axis", "no tokens"],
)
def test_what_the_model_does_not_take(inputs: dict[str, Any], error: str) -> None:
    model = llama()
    expected = f"`LlamaForCausalLM` does not accept `example_inputs`: {error}: "
    with assert_unchanged(model), pytest.raises(MELoRAError, match=expected):
        parts_of(model, inputs, "auto", has_own_axes=False, is_folder=True)
