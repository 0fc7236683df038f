"""A decoder's graph and its cache: each step adds tokens to the texts, and gives the logits of what may follow them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from exporters.onnx_files.cache_names import ENCODER_MASK, LOGITS, MASK, TOKENS, has_cache, next_past
from exporters.runtime.cache_inputs import empty_cache, step_inputs
from exporters.runtime.ort_runner import OrtRunner
from melora_fx import MELoRAError


class CachedDecoder:
    """Texts on their way through a graph; their cache stays where the session computes, and is never copied.

    Args:
        runner: of a graph with a cache.
        batch: number of texts.
        adapter: as for `OrtRunner.run`.
        encoded: what it takes of its encoder, beside one (`encode`).

    Raises:
        MELoRAError: for a graph without a cache.
    """

    def __init__(
        self,
        runner: OrtRunner,
        batch: int,
        adapter: str | os.PathLike[str] | None = None,
        encoded: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if not has_cache(runner.input_names):
            raise MELoRAError(
                f"`{runner.path}` has no key-value cache: export a model that generates with `use_cache=True`"
            )
        self._runner = runner
        self._adapter = adapter
        self._cache: dict[str, Any] = runner.to_device(empty_cache(runner.session.get_inputs(), batch))
        self._cache |= encoded

    def step(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The logits after each of the new tokens, (batch, new, vocabulary).

        Args:
            tokens: ids, (batch, new).
            mask: of all tokens so far, (batch, past + new); 0 for padding.

        Raises:
            MELoRAError: as `OrtRunner.run`.
        """
        given = self._runner.to_device(step_inputs(self._runner.input_names, tokens, mask))
        outputs = self._runner.run_on_device(given | self._cache, self._adapter)
        self._cache |= next_past(outputs)
        logits: np.ndarray = outputs[LOGITS].numpy()
        return logits


def encode(
    runner: OrtRunner, tokens: np.ndarray, mask: np.ndarray, adapter: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """What a decoder takes of its encoder's graph, for `CachedDecoder`; it stays where the session computes.

    Args:
        runner: the encoder's.
        tokens, mask: ids of the texts, and 0 for padding, (batch, sequence) both.
        adapter: as for `OrtRunner.run`.
    """
    values = runner.to_device({TOKENS: tokens, MASK: mask})
    outputs = runner.run_on_device(values, adapter)
    return {ENCODER_MASK: values[MASK], **next_past(outputs)}
