"""Tokenised batches of the demo's texts, and what a runner computes on them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from exporters.runtime.torch_runner import Runner
from exporters.training.texts import Texts

BATCH = 16
_EXAMPLES = 8
_MAX_TOKENS = 32


class Batches:
    """Tokenised batches of the texts."""

    def __init__(self, tokenizer: Any, texts: Texts) -> None:
        self.tokenizer = tokenizer
        self.texts = texts

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Model inputs (batch, sequence) of int64, padded to the longest text."""
        return dict(
            self.tokenizer(list(texts), padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        )

    def example(self) -> dict[str, torch.Tensor]:
        """Model inputs of the first held-out texts: what graphs are exported with and timed on."""
        return self.encode([text for text, _ in self.texts.held_out[:_EXAMPLES]])

    def held_out(self) -> Iterator[dict[str, torch.Tensor]]:
        """Model inputs over the held-out part, in order."""
        for start in range(0, len(self.texts.held_out), BATCH):
            rows = self.texts.held_out[start : start + BATCH]
            yield self.encode([text for text, _ in rows])

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """(inputs, labels (batch,)) over the training part once, in random order."""
        order = torch.randperm(len(self.texts.train), generator=generator).tolist()
        for start in range(0, len(order), BATCH):
            rows = [self.texts.train[index] for index in order[start : start + BATCH]]
            yield self.encode([text for text, _ in rows]), torch.tensor([label for _, label in rows])


def compute_logits(runner: Runner, batches: Batches) -> np.ndarray:
    """Logits (held-out texts, labels)."""
    return np.concatenate([runner.run(inputs)["logits"] for inputs in batches.held_out()])


def compute_accuracy(runner: Runner, batches: Batches) -> float:
    """Share of the held-out texts whose largest logit is that of their label."""
    labels = np.array([label for _, label in batches.texts.held_out])
    return float((compute_logits(runner, batches).argmax(-1) == labels).mean())
