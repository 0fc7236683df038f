"""`transformers.Trainer` trains a rewritten model as it trains any other, and resumes from its checkpoints."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import assert_equal, bert_classifier, fill, in_situations
from support.training import CONFIG, STEPS, Sentences, StopAt, rewritten, trainer_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import BertForSequenceClassification, TrainerCallback

import melora_fx
from exporters import export_onnx
from melora_fx import AdapterCheckpointCallback, MELoRAConfig, MELoRAError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.default_cases("* only the adapter")
@pytest.mark.filterwarnings("ignore:`save_pretrained` of a rewritten model")
@in_situations(
    "callbacks",
    "Trainer",
    "the losses of an uninterrupted run",
    {
        "stopped and resumed from its own checkpoint": [],
        "stopped and resumed from a checkpoint of only the adapter": [AdapterCheckpointCallback],
    },
)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, callbacks) -> None:
    model = rewritten()
    trainer, expected = trainer_of(model, tmp_path / "whole", *(make() for make in callbacks))
    trainer.train()
    stopped, first = trainer_of(rewritten(), tmp_path / "run", StopAt(3), *(make() for make in callbacks))
    stopped.train()
    resumed, second = trainer_of(rewritten(), tmp_path / "run", *(make() for make in callbacks))
    resumed.train(resume_from_checkpoint=True)
    assert list(first.by_step) == [1, 2, 3]
    assert list(second.by_step) == [4, 5, 6]
    assert first.by_step | second.by_step == expected.by_step
    assert len(set(expected.by_step.values())) == STEPS, "the losses must change"
    assert_equal(state_of(resumed.model), state_of(model))


@pytest.mark.situation("Trainer", "`AdapterCheckpointCallback`", "`checkpoint-N/` is an adapter folder")
def test_a_checkpoint_is_an_adapter_folder(tmp_path) -> None:
    model = rewritten()
    trainer, _ = trainer_of(model, tmp_path, AdapterCheckpointCallback())
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(saved) == trained
    assert not (tmp_path / "checkpoint-6" / "config.json").exists(), "`from_pretrained` would take it for a model"
    loaded = melora_fx.load_adapter(bert_classifier(), tmp_path / "checkpoint-6")
    assert_equal({name: loaded.state_dict()[name] for name in saved}, {n: model.state_dict()[n] for n in saved})


def test_a_checkpoints_files_have_the_mode_of_a_new_file(tmp_path) -> None:
    model = rewritten()
    trainer_of(model, tmp_path, AdapterCheckpointCallback())
    (tmp_path / "new").touch()
    model.save_pretrained(tmp_path / "checkpoint-1")
    modes = {file.stat().st_mode for file in (tmp_path / "checkpoint-1").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


@pytest.mark.slow
def test_a_checkpoint_has_the_biases_that_are_trained(tmp_path) -> None:
    model = melora_fx.rewrite(bert_classifier(), ["query"], CONFIG, keep_trainable=["query.bias", "classifier"])
    before = state_of(model)
    trainer_of(model, tmp_path, AdapterCheckpointCallback())[0].train()
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert set(saved) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    name = "bert.encoder.layer.0.attention.self.query.bias"
    assert not torch.equal(saved[name], before[name])
    loaded = melora_fx.load_adapter(bert_classifier(), tmp_path / "checkpoint-6")
    assert_equal(loaded.state_dict()[name], model.state_dict()[name])


@pytest.mark.slow
@pytest.mark.situation(
    "Trainer", "`AdapterCheckpointCallback` and `load_best_model_at_end`", "the best adapter is restored"
)
def test_the_best_adapter_comes_back_at_the_end(tmp_path) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            seen[state.global_step] = state_of(model)

    model = rewritten()
    trainer, _ = trainer_of(
        model,
        tmp_path,
        AdapterCheckpointCallback(),
        Keep(),
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        learning_rate=0.1,
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best < STEPS, "the last one would prove nothing"
    assert_equal(state_of(model), seen[best])


@pytest.mark.situation("Trainer", "`save_model` after the training", "a warning that names `save_adapter`")
def test_save_model_names_save_adapter(tmp_path) -> None:
    trainer, _ = trainer_of(rewritten(), tmp_path, AdapterCheckpointCallback())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # checkpoints do not warn
        trainer.train()
    with pytest.warns(UserWarning, match="`melora_fx.save_adapter`, or call `melora_fx.fold` first"):
        trainer.save_model(str(tmp_path / "final"))
    melora_fx.fold(trainer.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.save_model(str(tmp_path / "folded"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "folded")
    assert_equal(loaded.state_dict(), trainer.model.state_dict())


def test_a_plain_module_writes_adapter_checkpoints_too(tmp_path) -> None:
    class Wrapper(nn.Module):  # it has no `save_pretrained` that a Trainer could call
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert_classifier()

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return dict(self.inner(input_ids=input_ids, labels=labels))

    model = melora_fx.rewrite(Wrapper(), ["query"], CONFIG)
    trainer, _ = trainer_of(model, tmp_path, AdapterCheckpointCallback())
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert set(saved) == set(melora_fx.adapter_parameters(model))
    assert melora_fx.load_adapter(Wrapper(), tmp_path / "checkpoint-6")


def test_a_plain_model_is_refused_when_the_trainer_is_made(tmp_path) -> None:
    with pytest.raises(MELoRAError, match="`AdapterCheckpointCallback` needs a rewritten model"):
        trainer_of(bert_classifier(), tmp_path, AdapterCheckpointCallback())


def _dense_run(options: dict[str, Any], directory: Path) -> list[float]:
    trainer, losses = trainer_of(rewritten_without_dropout("plain"), directory, save_strategy="no", **options)
    trainer.train()
    return list(losses.by_step.values())


def rewritten_without_dropout(lowering: str = "auto") -> nn.Module:
    config = MELoRAConfig(rank=2, num_blocks=3, alpha=3.0, lowering=lowering)
    model = melora_fx.rewrite(bert_classifier(), ["query", "value"], config, keep_trainable=["classifier"])
    return fill(model)


@pytest.mark.default_cases("gradient accumulation")
@in_situations(
    "options",
    "Trainer",
    'the losses of `lowering="plain"`',
    {
        "label smoothing": {"label_smoothing_factor": 0.2},
        "gradient accumulation": {"gradient_accumulation_steps": 3},
        "gradient clipping": {"max_grad_norm": 0.05},
        "gradient checkpointing": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        "`torch_compile=True`": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    },
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing", "ignore:None of the inputs have requires_grad")
def test_the_trainers_options_train_as_plain_nodes_do(tmp_path, options) -> None:
    expected = _dense_run({key: value for key, value in options.items() if "compile" not in key}, tmp_path / "plain")
    trainer, losses = trainer_of(rewritten_without_dropout(), tmp_path / "lowered", save_strategy="no", **options)
    trainer.train()
    assert list(losses.by_step.values()) == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == STEPS


@pytest.mark.situation("Trainer", "bfloat16 (`bf16=True`)", "trains; A and B stay float32")
def test_a_trainer_in_bfloat16(tmp_path) -> None:
    model = rewritten_without_dropout()
    trainer, losses = trainer_of(model, tmp_path, bf16=True, save_strategy="no")
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses.by_step.values())
    assert {parameter.dtype for parameter in melora_fx.adapter_parameters(model).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.situation(
    "Trainer",
    "bfloat16 (`bf16=True`), then `export_onnx`",
    "refused with the remedy, because the graph would be under autocast",
)
def test_an_export_after_a_trainer_in_bfloat16(tmp_path) -> None:
    model = rewritten_without_dropout()
    trainer, _ = trainer_of(model, tmp_path / "run", bf16=True, save_strategy="no")
    trainer.train()
    inputs = {"input_ids": torch.arange(10).view(2, 5)}
    with pytest.raises(MELoRAError, match=r"autocast .*`accelerator\.unwrap_model\(model, keep_fp32_wrapper=False\)`"):
        export_onnx(model, inputs, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()
    export_onnx(trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False), inputs, tmp_path / "graph")


@pytest.mark.situation("Trainer", "a moving average swapped in for evaluation", "the average is evaluated")
def test_an_average_swapped_in_for_evaluation(tmp_path) -> None:
    class Swapped(TrainerCallback):
        """A moving average of the trained parameters, exchanged with them around an evaluation."""

        def __init__(self, model: nn.Module) -> None:
            self.model = model
            self.average = {name: value.detach().clone() for name, value in self._trained().items()}

        def _trained(self) -> dict[str, nn.Parameter]:
            return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

        def exchange(self) -> None:
            for name, value in self._trained().items():
                value.data, self.average[name] = self.average[name], value.data

        def on_step_end(self, *_: Any, **__: Any) -> None:
            for name, value in self._trained().items():
                self.average[name].lerp_(value.detach(), 0.5)

    model = rewritten_without_dropout()
    swapped = Swapped(model)
    trainer, _ = trainer_of(model, tmp_path, swapped, save_strategy="no")
    average = AveragedModel(copy.deepcopy(model), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    with torch.no_grad():  # the first update of an AveragedModel copies
        average.n_averaged += 1

    class Follow(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            average.update_parameters(model)

    trainer.add_callback(Follow())
    trainer.train()
    own = trainer.evaluate()["eval_loss"]
    swapped.exchange()
    loss = trainer.evaluate()["eval_loss"]
    swapped.exchange()
    assert trainer.evaluate()["eval_loss"] == own
    dataset = Sentences()
    batch = {"input_ids": dataset.tokens, "labels": (dataset.tokens[:, 0] > 20).long()}
    with torch.no_grad():
        assert loss == pytest.approx(float(average.module.eval()(**batch).loss), rel=1e-5)
    assert abs(loss - own) > 1e-4
