"""Model folders: with or without weights, and inputs to trace the model with."""

from pathlib import Path

import pytest
from support.models import assert_equal, bert_classifier, output_of
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

from exporters import export_onnx
from exporters.example_inputs import example_inputs
from melora_fx import MELoRAError
from melora_fx.load_model import load_model


def test_weights_are_read_or_not(tmp_path: Path) -> None:
    model = bert_classifier()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    inputs = example_inputs(loaded, tmp_path)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (2, 16),
        "attention_mask": (2, 16),
    }
    assert_equal(output_of(loaded, inputs), output_of(model, inputs))
    assert all(parameter.is_meta for parameter in load_model(tmp_path, with_weights=False).parameters())


def test_class_and_number_of_labels_can_be_given(tmp_path: Path) -> None:
    bert_classifier().save_pretrained(tmp_path)
    model = load_model(tmp_path, with_weights=False, class_name="BertForTokenClassification", num_labels=7)
    assert type(model).__name__ == "BertForTokenClassification"
    assert model.classifier.out_features == 7


def test_vision_models_get_an_image(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=36, image_size=16, patch_size=8
    )
    model = ViTForImageClassification(config).eval()
    inputs = example_inputs(model, tmp_path)
    assert output_of(model, inputs).shape == (2, 2)


def t5() -> T5ForConditionalGeneration:
    sizes = {"vocab_size": 50, "d_model": 24, "d_kv": 12, "d_ff": 36, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def test_a_decoder_beside_an_encoder_gets_tokens_of_its_own(tmp_path: Path) -> None:
    model = t5()
    inputs = example_inputs(model, tmp_path)
    assert inputs["decoder_input_ids"].shape != inputs["input_ids"].shape
    assert output_of(model, inputs).shape == (*inputs["decoder_input_ids"].shape, 50)


@pytest.mark.slow
def test_the_graph_of_an_encoder_and_a_decoder_keeps_their_lengths_apart(tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path)
    inputs = example_inputs(load_model(tmp_path), tmp_path)
    report = export_onnx(load_model(tmp_path), inputs, tmp_path / "t5.onnx")
    assert report.inputs["decoder_input_ids"] not in (report.inputs["input_ids"], (2, 5))


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match=r"has no config\.json"):
        load_model(tmp_path)
    bert_classifier().config.save_pretrained(tmp_path)
    with pytest.raises(MELoRAError, match="no model class 'Nonsense'"):
        load_model(tmp_path, class_name="Nonsense")
    with pytest.raises(MELoRAError, match="weights cannot be read"):
        load_model(tmp_path, class_name="BertModel")
    with pytest.raises(MELoRAError, match="holds a bert model, not the LlamaForCausalLM"):
        load_model(tmp_path, class_name="LlamaForCausalLM")
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(MELoRAError, match="weights cannot be read"):
        load_model(tmp_path, class_name="BertModel")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MELoRAError, match=r"config\.json` cannot be read"):
        load_model(tmp_path)
