"""The demo's training loop: adapters and head, AdamW, a linear decay."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from exporters.runtime.torch_runner import TorchRunner
from melora_fx.progress import show_progress

from .batches import BATCH, Batches, compute_accuracy
from .report import console

_LEARNING_RATE = 2e-3
_LAST_FACTOR = 0.05
"""What the linear decay leaves of the learning rate at the last step."""

_COMPILE_PAYS_S = 600.0
"""Seconds of eager training from which compiling surely pays: it takes a minute or two for a gain of some 20 %."""


@dataclass(frozen=True)
class History:
    """Training loss (mean over the batch) of each step; (steps done, held-out accuracy) after each epoch."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)


def train(model: nn.Module, batches: Batches, num_epochs: int, seed: int) -> History:
    """Trains what requires a gradient; the same losses for the same seed. The model is left in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(batches.texts.train) // BATCH)
    num_steps = num_epochs * steps_per_epoch
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, _LAST_FACTOR, num_steps)
    step_model = _compiled_where_it_pays(model, batches, num_steps)
    history = History()
    with show_progress("train", num_steps, console=console) as show:
        for _ in range(num_epochs):
            model.train()
            for inputs, labels in batches.shuffled(generator):
                loss = nn.functional.cross_entropy(step_model(**inputs).logits, labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                history.losses.append(loss.item())
                show(f"loss {history.losses[-1]:.3f}", advance=1)
            accuracy = compute_accuracy(TorchRunner(model.eval()), batches)
            history.evaluations.append((len(history.losses), accuracy))
            console.print(f"epoch {len(history.evaluations)}: held-out accuracy {accuracy:.1%}")
    return history


def _compiled_where_it_pays(model: nn.Module, batches: Batches, num_steps: int) -> Any:
    """The model, compiled if the training is long enough to win back the compile time; says which."""
    expected_s = _eager_step_s(model, batches) * num_steps
    pays = expected_s > _COMPILE_PAYS_S
    console.print(
        f"torch.compile: {'yes' if pays else 'no'}, {num_steps} steps take about {expected_s:.0f} s eager "
        f"(it pays from {_COMPILE_PAYS_S:.0f} s)"
    )
    return torch.compile(model, dynamic=True) if pays else model


def _eager_step_s(model: nn.Module, batches: Batches) -> float:
    """Seconds of one forward and backward, the fastest of three."""
    inputs = batches.encode([text for text, _ in batches.texts.train[:BATCH]])
    model.eval()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model(**inputs).logits.sum().backward()
        times.append(time.perf_counter() - start)
    model.zero_grad()
    return min(times)
