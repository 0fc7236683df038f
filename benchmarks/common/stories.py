"""Stories for a decoder to learn from: a file of English text, and a minute of training an adapter on it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import melora_fx
from melora_fx import MELoRAError

LEARNING_RATE = 5e-4
BATCH = 2
WINDOW = 128


def why_no_text(path: Path) -> str:
    """Returns what to do about a missing file; empty if it is there."""
    if path.is_file():
        return ""
    return (
        f"`{path}` is missing: pass --text a file of some 30 kB of English text, one story per line; the numbers in "
        "results/ are for an excerpt of TinyStories (roneneldan/TinyStories on Hugging Face)"
    )


def read_windows(path: Path, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token windows (count, WINDOW) of the first half of the stories for training, and of the second, held out.

    Raises:
        MELoRAError: if a half is shorter than a window.
    """
    # Some stories are in the excerpt twice: without this, held-out stories could be trained on.
    stories = list({line.lower(): line for line in path.read_text().splitlines() if line}.values())
    halves = stories[: len(stories) // 2], stories[len(stories) // 2 :]
    tokens = [torch.tensor(tokenizer("\n".join(half)).input_ids, dtype=torch.long) for half in halves]
    train, held_out = (ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW) for ids in tokens)
    if not len(train) or not len(held_out):
        raise MELoRAError(f"`{path}` is too short: each half of its lines must have at least {WINDOW} tokens")
    return train, held_out


def train_adapter(model: nn.Module, windows: torch.Tensor, steps: int) -> None:
    """Trains the adapters of `model` on windows drawn at random, and prints the losses."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=LEARNING_RATE)
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == steps - 1:
            print(f"    step {step + 1:2}: loss {loss.item():.3f}", flush=True)
