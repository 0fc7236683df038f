"""Tokenises labelled texts in batches, and computes a runner's logits and accuracy on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from exporters.runtime.torch_runner import Runner

from .texts import Texts

_EXAMPLES = 8
_SORTED_TOGETHER = 50
"""Number of batches whose texts are sorted by length together, to reduce padding; the batches are then shuffled."""


@dataclass(frozen=True)
class Batches:
    """Batches of texts of about the same length.

    Attributes:
        texts: the training and the held-out part.
        lengths: number of tokens of each text, the training part first.
        batch_size: number of texts per batch.
        max_tokens: number of tokens at which texts are cut.
    """

    tokenizer: Any
    texts: Texts
    lengths: tuple[int, ...]
    batch_size: int
    max_tokens: int

    @property
    def num_steps(self) -> int:
        """Number of batches of the training part."""
        return -(-len(self.texts.train) // self.batch_size)

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns the model inputs, (batch, sequence) in int64, padded to the longest text."""
        cut = {"truncation": True, "max_length": self.max_tokens}
        return dict(self.tokenizer(list(texts), padding=True, return_tensors="pt", **cut))

    def example(self) -> dict[str, torch.Tensor]:
        """Returns the model inputs of the first held-out texts, which graphs are exported with and timed on."""
        return self.encode([text for text, _ in self.texts.held_out[:_EXAMPLES]])

    def held_out(self) -> Iterator[tuple[dict[str, torch.Tensor], list[int]]]:
        """Yields (model inputs, indices of the texts) over the held-out part, from short to long texts."""
        offset = len(self.texts.train)
        order = sorted(range(len(self.texts.held_out)), key=lambda index: self.lengths[offset + index])
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield self.encode([self.texts.held_out[index][0] for index in chosen]), chosen

    def shuffled(self, seed: int, epoch: int, first: int = 0) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yields (model inputs, labels (batch,)) over the training part once, in the random order of this epoch.

        Args:
            seed, epoch: determine the order, together with the texts' lengths and the batch size.
            first: number of batches to skip, because they were already trained on.
        """
        for chosen in self._shuffled_indices(seed, epoch)[first:]:
            rows = [self.texts.train[index] for index in chosen]
            yield self.encode([text for text, _ in rows]), torch.tensor([label for _, label in rows])

    def _shuffled_indices(self, seed: int, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.texts.train), generator=generator).tolist()
        window = _SORTED_TOGETHER * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda index: self.lengths[index])
            batches += [near[each : each + self.batch_size] for each in range(0, len(near), self.batch_size)]
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def compute_logits(runner: Runner, batches: Batches) -> np.ndarray:
    """Returns the logits of a runner, (held-out texts, labels)."""
    found: dict[int, np.ndarray] = {}
    for inputs, indices in batches.held_out():
        found |= dict(zip(indices, runner.run(inputs)["logits"], strict=True))
    return np.stack([found[index] for index in range(len(found))])


def compute_accuracy(runner: Runner, batches: Batches) -> float:
    """Returns the share of the held-out texts whose largest logit is that of their label."""
    return accuracy_of(compute_logits(runner, batches), batches)


def accuracy_of(logits: np.ndarray, batches: Batches) -> float:
    """Returns the accuracy of logits (held-out texts, labels)."""
    labels = np.array([label for _, label in batches.texts.held_out])
    return float((logits.argmax(-1) == labels).mean())
