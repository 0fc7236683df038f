"""TRL's trainers on a small Llama, and what they log. TRL is slow to import, so functions import it."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

import melora_fx
from support.sharded import CONFIG, fill, llama
from support.text_models import byte_pairs, sentences
from support.training import Losses, default_arguments

REWARDS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
"""The values that a DPOTrainer logs and that depend on the reference."""


def tokenizer() -> Any:
    return byte_pairs(around=False, bos_token="<s>", eos_token="</s>", pad_token="</s>")


VOCABULARY = 400
"""The size of the vocabulary of `tokenizer`."""


def base(**settings: Any) -> LlamaForCausalLM:
    return llama(vocab_size=VOCABULARY, **settings)


def rewritten(model: Any = None, *, is_filled: bool = True, **options: Any) -> Any:
    """Returns `base()` or `model` with adapters on every linear except the head, the same each time."""
    options = {"targets": "all-linear", "config": CONFIG} | options
    torch.manual_seed(3)
    model = melora_fx.rewrite(base() if model is None else model, **options)
    return fill(model) if is_filled else model


def texts() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"text": text} for text, _ in sentences(24)])


def preferences() -> Any:
    from datasets import Dataset

    rows = sentences(24)
    return Dataset.from_list(
        [
            {"prompt": text, "chosen": f" {rows[index - 1][1]}", "rejected": f" {rows[index - 5][0]}"}
            for index, (text, _) in enumerate(rows)
        ]
    )


def _arguments(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    return default_arguments(directory) | {"bf16": False} | options


def sft_trainer(model: nn.Module, directory: Path, *callbacks: Any, **options: Any) -> tuple[Any, Losses]:
    from trl import SFTConfig, SFTTrainer

    losses = Losses()
    made = SFTTrainer(
        model,
        SFTConfig(**_arguments(directory, options)),
        train_dataset=texts(),
        processing_class=tokenizer(),
        callbacks=[*callbacks, losses],
    )
    return made, losses


class Logs(Losses):
    """Stores the logged `REWARDS` of each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.by_step[state.global_step] = [float(logs[name]) for name in REWARDS]  # type: ignore[assignment]


def dpo_trainer(model: nn.Module, reference: Any, directory: Path, **options: Any) -> tuple[Any, Logs]:
    from trl import DPOConfig, DPOTrainer

    logs = Logs()
    made = DPOTrainer(
        model,
        reference,
        DPOConfig(**_arguments(directory, {"save_strategy": "no"} | options)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        callbacks=[logs],
    )
    return made, logs


class WithoutAdapters(nn.Module):
    """Computes what a rewritten model computes inside `disabled`, for trainers that need a reference model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        vars(self)["model"] = model  # not a child, so that this module has no parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["model"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with melora_fx.disabled(self.model):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def around_the_same_weights(model: nn.Module) -> Any:
    """Returns a second model with the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
