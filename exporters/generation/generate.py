"""`generate`: text from an exported decoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from exporters.export_files import onnx_file_path
from exporters.runtime.ort_runner import OrtRunner
from melora_fx import MELoRAError

from .decoder import CachedDecoder
from .sampling import draw, most_likely

OnText = Callable[[int, str], None]
"""Takes the number of a prompt and what comes next of its text."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Ends a text whose last token is a part of a character."""


def generate(
    path: str | os.PathLike[str],
    prompts: str | Sequence[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 64,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: OnText | None = None,
    provider: str = "cpu",
    threads: int | None = None,
) -> list[str]:
    """What a decoder writes after each of the prompts, without the prompts.

    All prompts are computed together, padded at their left. A text ends with one of the model's end tokens
    (generation_config.json, or config.json), after `max_new_tokens`, or with the last position that the model has.

    Args:
        path: a folder that `export_onnx` has written with a cache, or the graph in it; its tokenizer is used.
        prompts: one text or several.
        adapter: for a graph with swappable adapters, as for `OrtRunner.run`.
        max_new_tokens: tokens of each text at most.
        sample: draw tokens at random, with `temperature` and `top_p`; else the most likely one is taken.
        temperature: above 1 for more surprising texts, below 1 for less.
        top_p: tokens are drawn from the fewest that have this probability together.
        seed: of the random numbers.
        on_text: is called with the number of a prompt and each piece of its text as soon as it is there.
        provider, threads: as for `OrtRunner`.

    Raises:
        ValueError: for options out of range, and no prompts.
        MELoRAError: for a graph without a cache or a folder without a tokenizer; for a prompt that is empty, or as long
            as what the model can take; else as `OrtRunner`.
    """
    _check_options(max_new_tokens, temperature, top_p)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("`prompts` must have at least one text")
    graph = onnx_file_path(path)
    runner = OrtRunner(graph, provider=provider, threads=threads)
    decoder = CachedDecoder(runner, len(texts), adapter)
    reader = _TokenizedFolder(graph.parent)
    encoded = reader.encode(texts)
    choose = partial(draw, temperature=temperature, top_p=top_p, generator=np.random.default_rng(seed))
    writers = [_Writer(reader, index, on_text) for index in range(len(texts))]
    tokens = new_tokens(
        decoder,
        encoded,
        reader.max_new_tokens(encoded, max_new_tokens),
        ends=reader.end_tokens,
        pad=reader.pad_token,
        choose=choose if sample else most_likely,
    )
    for step in tokens:
        for writer, token in zip(writers, step, strict=True):
            if token is not None:
                writer.add(token)
    return [writer.finish() for writer in writers]


def new_tokens(
    decoder: CachedDecoder,
    prompts: Sequence[Sequence[int]],
    most: int,
    *,
    ends: Sequence[int] = (),
    pad: int = 0,
    choose: Callable[[np.ndarray], np.ndarray] = most_likely,
) -> Iterator[list[int | None]]:
    """The next token of each text, step by step; None where a text has ended, its end token included.

    Args:
        decoder: one on which no step was made.
        prompts: token ids of each text.
        most: number of steps at most.
        ends: tokens that end a text.
        pad: fills texts that are shorter, or at their end.
        choose: the next tokens, (batch,), by logits (batch, vocabulary).
    """
    length = max(map(len, prompts))
    tokens = np.full((len(prompts), length), pad, np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    has_ended = np.zeros(len(prompts), bool)
    for index in range(most):
        chosen = choose(decoder.step(tokens, mask)[:, -1])
        has_ended |= np.isin(chosen, ends)
        yield [None if ended else int(token) for token, ended in zip(chosen, has_ended, strict=True)]
        if has_ended.all() or index + 1 == most:
            return
        tokens = np.where(has_ended, pad, chosen)[:, None]
        mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], axis=1)


def _check_options(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` (={max_new_tokens!r}) must be a whole number, 1 or more")
    if not temperature > 0:
        raise ValueError(f"`temperature` (={temperature!r}) must be above 0; `sample=False` takes the likeliest tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` (={top_p!r}) must be above 0, and 1 at most")


class _TokenizedFolder:
    """The tokenizer in an exported folder, and what the configurations there say of tokens."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig  # heavy: only where it is used

        self._folder = folder
        try:
            self._config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # each tokenizer raises its own
            raise MELoRAError(
                f"`{folder}` has no configuration and tokenizer that can be read ({type(error).__name__}: "
                f"{str(error)[:200]}): copy the model's, as `save_pretrained` writes them, beside the graph"
            ) from error
        settings: Any = None
        if (folder / "generation_config.json").is_file():
            settings = GenerationConfig.from_pretrained(folder)
        text = self._config.get_text_config(decoder=True)
        found = [getattr(source, "eos_token_id", None) for source in (settings, text, self.tokenizer)]
        ends: Any = next((value for value in found if value is not None), [])
        self.end_tokens: list[int] = [ends] if isinstance(ends, int) else list(ends)
        pads = (self.tokenizer.pad_token_id, *self.end_tokens, 0)
        self.pad_token: int = next(token for token in pads if token is not None)
        self._positions: int | None = getattr(text, "max_position_embeddings", None)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """The token ids of each prompt; raises a MELoRAError for one that has none, or too many."""
        encoded = []
        for index, prompt in enumerate(prompts):
            ids = list(self.tokenizer(prompt)["input_ids"])
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [self.tokenizer.bos_token_id]
            if not ids:
                raise MELoRAError(f"prompt {index} (={prompt!r}) has no tokens, and the tokenizer none to begin with")
            if self._positions is not None and len(ids) >= self._positions:
                raise MELoRAError(
                    f"prompt {index} has {len(ids)} tokens: the model in `{self._folder}` takes {self._positions} with "
                    "those that it writes (`max_position_embeddings`): shorten it"
                )
            encoded.append(ids)
        return encoded

    def max_new_tokens(self, encoded: Sequence[Sequence[int]], asked: int) -> int:
        """As many as were asked for, as far as the model has positions for them."""
        if self._positions is None:
            return asked
        return min(asked, self._positions - max(map(len, encoded)))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@dataclass
class _Writer:
    """The text of one prompt as it grows."""

    reader: _TokenizedFolder
    index: int
    on_text: OnText | None
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def add(self, token: int) -> None:
        self.ids.append(token)
        if self.on_text is not None:
            text = self.reader.decode(self.ids)
            if not text.endswith(_INCOMPLETE):
                self._write(text)

    def finish(self) -> str:
        """The whole text."""
        self._write(self.reader.decode(self.ids))
        return self.text

    def _write(self, text: str) -> None:
        if self.on_text is not None and len(text) > len(self.text):
            self.on_text(self.index, text[len(self.text) :])
        self.text = text
