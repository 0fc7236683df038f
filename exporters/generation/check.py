"""Compares a decoder's graph with torch, step by step; each of the two fills its own cache.

Incorrect padding raises no error, so texts are tried one by one and in pairs, padded at the beginning and at the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from exporters.decoders.step_conditions import without_refuted
from exporters.graph.export import Export
from exporters.hugging_face import decoder_config
from exporters.measuring.compare import Comparison, compare_steps_of
from exporters.measuring.rounding import refuse_unequal
from exporters.onnx_files.cache_names import ENCODER_MASK, LOGITS, MASK, TOKENS, is_cross, is_past, next_past
from exporters.onnx_files.metadata import read_facts
from exporters.onnx_runtime import Arrays
from exporters.runtime.cache_inputs import as_types, empty_cache, step_inputs
from exporters.runtime.ort_runner import OrtRunner
from exporters.runtime.torch_runner import Runner, TorchRunner
from melora_fx.whole_capture.conditions import Condition

_MOST_TOKENS = 2**10
"""Larger windows are not tried: the memory of attention grows with the square of the tokens. Also the limit for models
without `max_position_embeddings`.
"""


class Texts(NamedTuple):
    """A trial: its description, token ids and mask, (batch, tokens), the tokens of each step, and the cache's dtype."""

    words: str
    tokens: np.ndarray
    mask: np.ndarray
    steps: tuple[int, ...]
    dtype: np.dtype


class StepsComparison(NamedTuple):
    """The comparisons, by the trial in words, and the known conditions on the sizes of a step's inputs."""

    comparisons: dict[str, Comparison]
    conditions: list[Condition]


def compare_steps(export: Export, path: Path) -> StepsComparison:
    """Compares the file of a decoder's export with its model, in the model's current mode, on ONNX Runtime's CPU.

    Raises:
        MELoRAError: if an error is above the precision's tolerance and above what rounding explains, or if ONNX
            Runtime cannot run the file.
    """
    runner = OrtRunner(path, save_memory=True).without_check()
    facts = read_facts(path)
    precision = export.options.precision
    comparisons: dict[str, Comparison] = {}
    tried = list[dict[str, tuple[int, ...]]]()
    beside = {name: value for name, value in export.inputs.items() if is_cross(name) or name == ENCODER_MASK}
    with export.forward(export.model):
        torch_runner = TorchRunner(export.model)
        for texts in _trial_texts(export):
            for adapter in export.adapter.trials(export.model, export.sites, facts):
                also = f"{texts.words}, {adapter.name} adapter" if adapter.name else texts.words
                with adapter.context:
                    comparison, shapes = _compare(runner.with_tensors(adapter.inputs()), torch_runner, texts, beside)
                    read = partial(_torch_steps, torch_runner, runner, texts, beside)
                    refuse_unequal(also, comparison, precision.tolerance_of_more, export.model, precision, read)
                comparisons[also] = comparison
                tried += shapes
    return StepsComparison(comparisons, without_refuted(export.conditions, tried))


def _trial_texts(export: Export) -> Iterator[Texts]:
    """Returns the trials of `_all_texts` for which the model has enough positions."""
    most = _most_tokens(export)
    return (texts for texts in _all_texts(export) if sum(texts.steps) <= most)


def _most_tokens(export: Export) -> int:
    return int(getattr(decoder_config(export.model), "max_position_embeddings", None) or _MOST_TOKENS)


def _all_texts(export: Export) -> Iterator[Texts]:
    """Yields trials of one and two texts, one and several tokens a step, padded and not, and longer than a window."""
    ids = export.inputs[TOKENS].cpu().numpy()
    vocabulary = int(decoder_config(export.model).vocab_size)
    generator = np.random.default_rng(0)
    dtype = next(value for name, value in export.inputs.items() if is_past(name)).numpy().dtype

    def tokens(batch: int, length: int) -> np.ndarray:
        made = generator.integers(0, vocabulary, (batch, length))
        if length >= ids.shape[1]:
            made[:, : ids.shape[1]] = ids[:batch]
        return made

    def texts(words: str, batch: int, *steps: int, padding: slice | None = None) -> Texts:
        mask = np.ones((batch, sum(steps)), np.int64)
        if padding is not None:
            mask[0, padding] = 0
        return Texts(words, tokens(batch, sum(steps)), mask, steps, dtype)

    yield texts("one token", 1, 1, 1)
    yield texts("two texts of a token", 2, 1, 1)
    yield texts("one text", 1, 6, 1, 1)
    yield texts("several tokens a step", 1, 5, 3, 1)
    yield texts("two texts", 2, 6, 1)
    if MASK not in export.inputs:
        yield texts("several tokens of two texts a step", 2, 3, 2, 1)
        return
    yield texts("padding before a text", 2, 7, 1, 1, padding=slice(0, 3))
    yield texts("padding behind a text", 2, 7, 1, 1, padding=slice(4, 7))
    if not export.has_one_token_steps:
        yield texts("several tokens of two texts a step", 2, 5, 3, 2, padding=slice(0, 2))
    for window in _windows(export):
        if window <= _MOST_TOKENS:
            yield texts(f"a window of {window} tokens and more", 1, window + 2, 1)
            yield texts(f"padding, and a window of {window} tokens", 2, window + 2, 1, 1, padding=slice(0, 3))


def _windows(export: Export) -> Sequence[int]:
    """Returns the sizes of the attention windows in the model's configuration, in tokens, sorted."""
    config = decoder_config(export.model)
    found = {getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")}
    return sorted(size for size in found if isinstance(size, int) and size > 0)


def _compare(
    runner: OrtRunner, torch_runner: Runner, texts: Texts, beside: Mapping[str, torch.Tensor]
) -> tuple[Comparison, list[dict[str, tuple[int, ...]]]]:
    """Returns the largest errors of all steps, and each step's input shapes. `beside`: the inputs from an encoder."""
    inputs = runner.session.get_inputs()
    encoded = _encoded(texts, beside)
    steps = _run(runner, inputs, texts, empty_cache(inputs, len(texts.tokens)), as_types(inputs, encoded))
    given = [given | encoded for given, _ in _given(inputs, texts)]
    shapes = [{name: value.shape for name, value in each.items()} for each in given]
    return compare_steps_of(steps, _torch_steps(torch_runner, runner, texts, beside)), shapes


def _torch_steps(
    torch_runner: Runner, runner: OrtRunner, texts: Texts, beside: Mapping[str, torch.Tensor]
) -> list[Arrays]:
    """Returns torch's outputs at each step, for the inputs of `runner`."""
    inputs = runner.session.get_inputs()
    cache = {name: value.astype(texts.dtype) for name, value in empty_cache(inputs, len(texts.tokens)).items()}
    return _run(torch_runner, inputs, texts, cache, _encoded(texts, beside))


def _encoded(texts: Texts, beside: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: value[: len(texts.tokens)].numpy() for name, value in beside.items()}


def _run(runner: Runner, inputs: Sequence[Any], texts: Texts, cache: Arrays, encoded: Arrays) -> list[Arrays]:
    """Returns the outputs of each step, which gets the cache of the one before, with zeros at padding."""
    read = []
    for given, mask in _given(inputs, texts):
        outputs = runner.run(given | cache | encoded)
        cache = next_past(outputs)
        read.append(_without_padding(outputs, mask))
    return read


def _given(inputs: Sequence[Any], texts: Texts) -> Iterator[tuple[Arrays, np.ndarray]]:
    """Yields the inputs of each step without the cache, and the mask of all tokens so far."""
    names = [value.name for value in inputs]
    end = 0
    for size in texts.steps:
        start, end = end, end + size
        mask = texts.mask[:, :end]
        yield step_inputs(names, texts.tokens[:, start:end], mask), mask


def _without_padding(outputs: Arrays, mask: np.ndarray) -> Arrays:
    """Returns the outputs with zeros at padding, where nothing reads them."""
    read = {}
    for name, value in outputs.items():
        is_read = mask.astype(bool)
        if name == LOGITS:
            read[name] = np.where(is_read[:, -value.shape[1] :, None], value, 0)
        else:
            read[name] = np.where(is_read[:, None, :, None], value, 0)
    return read
