"""`generate`: text from an exported decoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from exporters.decoders.parts import DECODER_FILE, ENCODER_FILE
from exporters.export_files import onnx_file_path
from exporters.runtime.ort_runner import OrtRunner

from .decoder import CachedDecoder, encode
from .sampling import draw, most_likely
from .tokenized_folder import TokenizedFolder

OnText = Callable[[int, str], None]
"""Takes the number of a prompt and what comes next of its text."""

_PADDING = 0
"""Any id that every vocabulary has: it is masked."""

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

    All prompts are computed together. A text ends with one of the model's end tokens (generation_config.json's; without
    that file config.json's), after `max_new_tokens`, or with the last position that the model has.

    Args:
        path: a folder that `export_onnx` has written with a cache, or the graph in it; its tokenizer is used. A folder
            with an encoder's and a decoder's graph gives what the decoder writes for the prompts.
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
    texts = _check_options(prompts, max_new_tokens, temperature, top_p, seed)
    encoder_path, decoder_path = _graphs(Path(path))
    runner = OrtRunner(decoder_path, provider=provider, threads=threads)
    reader = TokenizedFolder(decoder_path.parent)
    encoded = reader.encode(texts)
    writers = [_Writer(reader, index, on_text) for index in range(len(texts))]
    if encoder_path is None:
        decoder = CachedDecoder(runner, len(texts), adapter)
        writers = [replace(writer, before=prompt) for writer, prompt in zip(writers, encoded, strict=True)]
    else:
        encoder = OrtRunner(encoder_path, provider=provider, threads=threads)
        decoder = CachedDecoder(runner, len(texts), adapter, encode(encoder, *padded(encoded, left=False), adapter))
        encoded = [[reader.start_token or 0]] * len(texts)
    choose = partial(draw, temperature=temperature, top_p=top_p, generator=np.random.default_rng(seed))
    tokens = new_tokens(
        decoder,
        encoded,
        reader.most_new_tokens(encoded, max_new_tokens),
        ends=reader.end_tokens,
        first=None if encoder_path is None else reader.forced_token,
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
    most: Sequence[int],
    *,
    ends: Sequence[int] = (),
    first: int | None = None,
    choose: Callable[[np.ndarray], np.ndarray] = most_likely,
) -> Iterator[list[int | None]]:
    """The next token of each text, step by step; None where a text has ended, its end token included.

    Args:
        decoder: one on which no step was made.
        prompts: token ids of each text.
        most: number of new tokens of each text at most.
        ends: tokens that end a text.
        first: what each text begins with whatever the logits are, if anything.
        choose: the next tokens, (batch,), by logits (batch, vocabulary).
    """
    tokens, mask = padded(prompts, left=True)
    has_ended = np.zeros(len(prompts), bool)
    for index in range(max(most)):
        chosen = choose(decoder.step(tokens, mask)[:, -1])
        if index == 0 and first is not None:
            chosen = np.full_like(chosen, first)
        has_ended |= np.isin(chosen, ends) | (index >= np.array(most))
        yield [None if ended else int(token) for token, ended in zip(chosen, has_ended, strict=True)]
        if has_ended.all() or index + 1 == max(most):
            return
        tokens = np.where(has_ended, _PADDING, chosen)[:, None]
        mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], axis=1)


def padded(texts: Sequence[Sequence[int]], *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of texts, (batch, sequence) both, filled up at their left, or their right."""
    length = max(map(len, texts))
    tokens = np.full((len(texts), length), _PADDING, np.int64)
    mask = np.zeros_like(tokens)
    for row, text in enumerate(texts):
        places = slice(length - len(text), length) if left else slice(0, len(text))
        tokens[row, places], mask[row, places] = text, 1
    return tokens, mask


def _graphs(path: Path) -> tuple[Path | None, Path]:
    """The graphs of an encoder, if there is one, and of a decoder."""
    graph = onnx_file_path(path)
    pair = graph.with_name(ENCODER_FILE), graph.with_name(DECODER_FILE)
    has_pair = all(file.is_file() for file in pair) and (graph in pair or not graph.is_file())
    return pair if has_pair else (None, graph)


def _check_options(prompts: object, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> list[str]:
    """The prompts as a list; raises a ValueError for options out of range."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`prompts` (={prompts!r}) must be one text or several")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` (={seed!r}) must be a whole number, 0 or more")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` (={max_new_tokens!r}) must be a whole number, 1 or more")
    if not temperature > 0:
        raise ValueError(f"`temperature` (={temperature!r}) must be above 0; `sample=False` takes the likeliest tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` (={top_p!r}) must be above 0, and 1 at most")
    return texts


@dataclass
class _Writer:
    """The text of one prompt as it grows. Decoded without the tokens `before` it, it would lack the space that it
    begins with where tokenizers drop that of a text's first word.
    """

    reader: TokenizedFolder
    index: int
    on_text: OnText | None
    before: Sequence[int] = ()
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def add(self, token: int) -> None:
        self.ids.append(token)
        if self.on_text is not None:
            text = self._decode()
            if not text.endswith(_INCOMPLETE):
                self._write(text)

    def finish(self) -> str:
        """The whole text."""
        self._write(self._decode())
        return self.text

    def _decode(self) -> str:
        whole = self.reader.decode([*self.before, *self.ids])
        if whole.startswith(self._text_before):
            return whole.removeprefix(self._text_before)
        return self.reader.decode(self.ids)

    @cached_property
    def _text_before(self) -> str:
        return self.reader.decode(self.before)

    def _write(self, text: str) -> None:
        if self.on_text is not None and len(text) > len(self.text):
            self.on_text(self.index, text[len(self.text) :])
        self.text = text
