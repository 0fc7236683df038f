"""How a model is exported: with a cache or without, as requested and as its configuration says."""

from typing import Any

import pytest
import torch
import transformers as hf
from support.decoders import SIZES, VOCABULARY, example, llama
from support.models import assert_equal, assert_unchanged, bert_classifier, gpt2, tokens, tower
from torch import nn

import melora_fx
from exporters.decoders.flat_cache import flat_cache
from exporters.decoders.parts import Part, parts_of, sites_in
from exporters.onnx_files.cache_names import has_cache
from melora_fx import MELoRAError
from melora_fx.capture.model_settings import without_cache


def parts(model: nn.Module, inputs: dict[str, Any], use_cache: Any = "auto") -> tuple[list[Part], tuple[str, ...]]:
    return parts_of(model, inputs, use_cache, has_own_axes=False, is_folder=True)


def llava(**settings: Any) -> Any:
    """Returns a Llava whose text part has the settings of a decoder."""
    vision = hf.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = hf.LlamaConfig(**SIZES | settings)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1)
    return hf.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("make", "use_cache", "expected"),
    [
        (llama, "auto", True),
        (llama, True, True),
        (llama, False, False),
        (lambda: llama(use_cache=False), "auto", False),
        (lambda: llama(use_cache=False), True, True),
        (lambda: llama(use_cache=False), False, False),
        (llava, "auto", True),
        (lambda: llava(use_cache=False), "auto", False),
        (lambda: llama().model, "auto", False),
    ],
    ids=[
        "auto",
        "asked for",
        "refused",
        "not configured",
        "asked for though not configured",
        "neither",
        "of a part",
        "not of a part",
        "no head",
    ],
)
def test_whether_there_is_a_cache(make: Any, use_cache: Any, expected: bool) -> None:
    """There is no note if nobody could expect a cache."""
    model = make()
    with assert_unchanged(model):
        (part,), notes = parts(model, example(), use_cache)
    assert has_cache(part.inputs) == expected
    assert part.forward is (flat_cache if expected else without_cache)
    assert part.file is None
    assert notes == ()
    if not expected:
        assert_equal(part.inputs, example())


@pytest.mark.parametrize("make", [tower, lambda: bert_classifier(num_layers=1)], ids=["a module", "a classifier"])
def test_what_generates_nothing_has_none(make: Any) -> None:
    (part,), notes = parts(make(), tokens())
    assert part.forward is without_cache
    assert notes == ()
    expected = r"`use_cache=True`: the graph cannot have a key-value cache: `\w+` is not a transformers model"
    with pytest.raises(MELoRAError, match=expected):
        parts(make(), tokens(), True)


class Wrapped(nn.Module):
    """Wraps a model as PEFT does: it has the model's configuration, and generates."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.generate = model, model.config, model.generate

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def test_a_model_within_another_is_none_and_a_note_says_so() -> None:
    (part,), notes = parts(Wrapped(llama()), example())
    assert notes == ("without a key-value cache: `Wrapped` is not a transformers model that generates",)
    assert not has_cache(part.inputs)


@pytest.mark.parametrize("use_cache", ["yes", None, 1, "True"], ids=str)
def test_options_that_are_none(use_cache: Any) -> None:
    with pytest.raises(ValueError, match=r"`use_cache` \(=.*\) must be True, False or \"auto\""):
        parts(llama(), example(), use_cache)


def test_axes_of_ones_own_have_no_cache() -> None:
    (part,), notes = parts_of(llama(), example(), "auto", has_own_axes=True, is_folder=True)
    assert not has_cache(part.inputs)
    assert notes == ("without a key-value cache: `dynamic_axes` names custom axes",)


def test_what_a_forward_leaves_in_a_model_is_taken_back() -> None:
    """transformers hooks layers in the first forward that returns hidden states; another model counts its calls."""
    for model in (llama(output_hidden_states=True), counting()):
        with assert_unchanged(model):
            (part,), _ = parts(model, example())
        assert has_cache(part.inputs)


def counting() -> Any:
    class Counts(hf.LlamaForCausalLM):
        calls = 0
        seen: list[tuple[int, ...]]

        def forward(self, input_ids: Any, attention_mask: Any = None, cache: Any = None, use_cache: Any = None) -> Any:
            self.calls += 1
            self.seen.append(tuple(input_ids.shape))
            return super().forward(input_ids, attention_mask, cache=cache, use_cache=use_cache)

    torch.manual_seed(0)
    model = Counts(hf.LlamaConfig(**SIZES)).eval()
    model.seen = []
    return model


def test_a_batch_of_images_is_none_of_a_decoder() -> None:
    inputs = example() | {"pixel_values": torch.zeros(2, 3, 8, 8)}
    (part,), notes = parts(llava(), inputs)
    assert not has_cache(part.inputs)
    assert notes == ("without a key-value cache: `example_inputs` has `pixel_values` in addition to the tokens",)


def test_token_types_are_none_either() -> None:
    inputs = tokens() | {"token_type_ids": torch.zeros_like(tokens()["input_ids"])}
    _, notes = parts(gpt2(num_layers=1), inputs)
    assert notes == ("without a key-value cache: `example_inputs` has `token_type_ids` in addition to the tokens",)


def pair() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "adapted"])
def test_the_sites_of_an_encoder_and_a_decoder(is_adapted: bool) -> None:
    """The encoder's graph contains the keys and values that the decoder attends to; without sites there are none."""
    model = pair()
    if is_adapted:
        melora_fx.rewrite(model, ["q", "k", "v", "o"])
    sites = melora_fx.sites(model)
    with assert_unchanged(model):
        (encoder, decoder), _ = parts(model, example())
        found = [sites_in(model, part, sites).keys() for part in (encoder, decoder)]
    crossing = {name for name in sites if "EncDecAttention" in name and name[-2:] in (".k", ".v")}
    of_encoder = {name for name in sites if name.startswith("encoder.")} | crossing
    assert found == [of_encoder, sites.keys() - of_encoder]
    assert bool(crossing) == is_adapted
