"""Trains a model with an adapter, PEFT's or ours."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import peft
import torch
from torch import nn

import melora_fx

from .runs import Arm

ALPHA = 16
"""The numerator of alpha / rank for every adapter, with the rank of a block. The LoRA paper proposes one alpha, so that
one learning rate suits adapters of all ranks; the value is that of the MELoRA authors' scripts."""
WARMUP = 0.06
"""Share of the steps in which the learning rate rises; it falls to zero in the others."""

Batch = Mapping[str, torch.Tensor]


def add_adapter(model: nn.Module, arm: Arm, targets: Sequence[str], head: Sequence[str] = ()) -> nn.Module:
    """Returns the model with a new adapter. Only the adapter and the modules named in `head` are trained."""
    if arm.kind == "none":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in head for part in name.split(".")))
        return model
    if arm.kind == "LoRA":
        config = peft.LoraConfig(
            r=arm.rank, lora_alpha=ALPHA, target_modules=list(targets), modules_to_save=list(head) or None
        )
        return peft.get_peft_model(model, config)
    config = melora_fx.MELoRAConfig(rank=arm.rank, num_blocks=arm.num_blocks, alpha=ALPHA)
    return melora_fx.rewrite(model, list(targets), config, keep_trainable=list(head))


def num_adapter_parameters(model: nn.Module, head: Sequence[str] = ()) -> int:
    """Returns the number of trained parameters without the head."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in name.split(".") for part in head)
    )


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    num_steps: int,
    learning_rate: float,
    autocast: torch.dtype = torch.float32,
) -> float:
    """Trains with AdamW without weight decay, and gradients clipped at norm 1; returns the seconds that it took.

    With `autocast` to bfloat16, parameters and the optimizer's state stay in float32.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    rising = max(1, round(WARMUP * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (num_steps - step) / max(1, num_steps - rising))
    )
    model.train()
    start = time.perf_counter()
    for batch in batches:
        with torch.autocast("cpu", autocast, enabled=autocast != torch.float32):
            loss: Any = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - start
