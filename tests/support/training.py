"""A small classifier and a `transformers.Trainer` for it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import melora_fx
from melora_fx import MELoRAConfig
from support.models import bert_classifier

CONFIG = MELoRAConfig(rank=2, num_blocks=3, alpha=3.0, dropout=0.1)


STEPS = 6


class Sentences(torch.utils.data.Dataset):
    """Random tokens; the label is whether the first is above 20."""

    def __init__(self) -> None:
        self.tokens = torch.randint(0, 40, (24, 5), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": (self.tokens[index, 0] > 20).long()}


class Losses(TrainerCallback):
    """Stores every logged loss by step."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.by_step[state.global_step] = logs["loss"]


class StopAt(TrainerCallback):
    """Stops a run early, as if the machine were taken away."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def rewritten() -> BertForSequenceClassification:
    model = bert_classifier()
    model.config.hidden_dropout_prob = 0.1  # the modules already have theirs; set here so that a copy keeps it
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return melora_fx.rewrite(model, ["query", "value"], CONFIG, keep_trainable=["classifier"])


def default_arguments(directory: Path) -> dict[str, Any]:
    """Returns the arguments of a Trainer that takes some steps on a CPU and writes checkpoints."""
    return {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(**default_arguments(directory) | options)


def trainer_of(
    model: nn.Module, directory: Path, *callbacks: TrainerCallback, data: Any = None, **options: Any
) -> tuple[Trainer, Losses]:
    losses = Losses()
    data = data or Sentences()
    made = Trainer(
        model,
        arguments(directory, **options),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[*callbacks, losses],
    )
    return made, losses
