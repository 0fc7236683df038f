"""Runs a decoder's graph with its cache: each step adds tokens to the texts, and returns the logits after them."""

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
    """Texts that grow step by step, with their cache, which stays on the session's device and is never copied.

    Args:
        runner: the runner of a graph with a cache.
        batch: number of texts.
        adapter: as for `OrtRunner.run`.
        encoded: the result of `encode`, for the decoder of an encoder-decoder model.

    Raises:
        MELoRAError: if the graph has no cache.
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
        """Adds tokens to the texts, and returns the logits after each new token, (batch, new, vocabulary).

        Args:
            tokens: ids of the new tokens, (batch, new).
            mask: the mask of all tokens so far, (batch, past + new); 0 for padding.

        Raises:
            MELoRAError: as for `OrtRunner.run`.
        """
        given = self._runner.to_device(step_inputs(self._runner.input_names, tokens, mask))
        outputs = self._runner.run_on_device(given | self._cache, self._adapter)
        self._cache |= next_past(outputs)
        logits: np.ndarray = outputs[LOGITS].numpy()
        return logits


def encode(
    runner: OrtRunner, tokens: np.ndarray, mask: np.ndarray, adapter: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Runs an encoder's graph; returns the decoder's inputs from it, for `CachedDecoder`, on the session's device.

    Args:
        runner: the runner of the encoder's graph.
        tokens, mask: ids of the texts, and a mask with 0 for padding, (batch, sequence) both.
        adapter: as for `OrtRunner.run`.
    """
    values = runner.to_device({TOKENS: tokens, MASK: mask})
    outputs = runner.run_on_device(values, adapter)
    return {ENCODER_MASK: values[MASK], **next_past(outputs)}
