"""The training loop: trains adapters and new parts with AdamW and a linear decay, and resumes after a kill.

It does not use `transformers.Trainer`, which needs one more package and writes its checkpoints in place: if it is
killed while it writes, it leaves a folder that it cannot resume from.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from exporters.runtime.torch_runner import TorchRunner
from melora_fx import MELoRAError
from melora_fx.progress import show_progress

from .batches import Batches, compute_accuracy
from .checkpoints import Checkpoints, History
from .device import device_of
from .report import console

_LAST_FACTOR = 0.05
"""The share of the learning rate that is left at the end of the linear decay."""


@dataclass(frozen=True)
class Schedule:
    """The length and the learning rate of a training; `seed` is the seed of the order of the texts and of dropout."""

    epochs: int = 5
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"`epochs` (={self.epochs}) must be at least 1")
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"`seed` (={self.seed}) must be from 0 to {(1 << 31) - 1}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` (={self.learning_rate}) must be above 0")


def train(model: nn.Module, batches: Batches, schedule: Schedule, checkpoints: Checkpoints) -> History:
    """Trains the parameters that require a gradient, from the last checkpoint on.

    Leaves the model in evaluation mode. A resumed run ends with the same bits as an uninterrupted one.

    Raises:
        MELoRAError: if a loss is not finite, or a checkpoint cannot be read or written.
    """
    num_steps = schedule.epochs * batches.num_steps
    torch.manual_seed(schedule.seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=schedule.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - (1 - _LAST_FACTOR) * min(step, num_steps) / num_steps
    )
    history = checkpoints.load(model, optimizer, scheduler)
    if history.losses:
        console.print(f"resuming after step {len(history.losses)} of {num_steps}")
    else:
        _evaluate(model, batches, history)
    with show_progress("train", num_steps, console=console) as show:
        show(advance=len(history.losses))
        for epoch in range(len(history.losses) // batches.num_steps, schedule.epochs):
            model.train()
            first = len(history.losses) - epoch * batches.num_steps
            for inputs, labels in batches.shuffled(schedule.seed, epoch, first):
                loss = _step(model, inputs, labels, optimizer)
                scheduler.step()
                history.losses.append(_refuse_diverged(loss, history))
                show(f"loss {loss:.3f}", advance=1)
                if checkpoints.are_due and len(history.losses) % batches.num_steps:
                    checkpoints.save(model, optimizer, scheduler, history)
            _evaluate(model, batches, history)
            checkpoints.save(model, optimizer, scheduler, history)
            console.print(f"epoch {epoch + 1}: held-out accuracy {history.evaluations[-1][1]:.1%}")
    model.eval()
    return history


def _step(model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor, optimizer: Any) -> float:
    """Makes one update, and returns the loss before it."""
    device = device_of(model)
    logits = model(**{name: value.to(device) for name, value in inputs.items()}).logits
    loss = nn.functional.cross_entropy(logits, labels.to(device))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _evaluate(model: nn.Module, batches: Batches, history: History) -> None:
    history.evaluations.append((len(history.losses), compute_accuracy(TorchRunner(model.eval()), batches)))


def _refuse_diverged(loss: float, history: History) -> float:
    """Returns the loss; raises MELoRAError if it is not finite, which no later step can repair."""
    if not math.isfinite(loss):
        raise MELoRAError(
            f"the training diverged: the loss of step {len(history.losses) + 1} is {loss}; use a smaller "
            "`learning_rate` or a smaller `alpha`"
        )
    return loss
