"""Generates text with an exported decoder."""

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
"""Called with the number of a prompt and the next piece of its text."""

_PADDING = 0
"""An id that every vocabulary has: padding is masked."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""The end of a decoded text whose last token is only a part of a character."""


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
    """Returns the text that a decoder generates for each prompt, without the prompt.

    All prompts run in one batch. A text ends at an end token of the model (from generation_config.json; without that
    file, from config.json), after `max_new_tokens` tokens, or at the model's last position.

    Args:
        path: a folder in which `export_onnx` has written a graph with a cache, or that graph; the folder's tokenizer is
            used. If the folder contains an encoder's and a decoder's graph, the encoder reads the prompts.
        prompts: one string or several.
        adapter: the adapter for a graph with swappable adapters, as for `OrtRunner.run`.
        max_new_tokens: maximum number of new tokens of each text, at least 1.
        sample: whether to draw tokens at random, with `temperature` and `top_p`, instead of the most likely ones.
        temperature: above 1 for more surprising texts, below 1 for less surprising ones; above 0.
        top_p: tokens are drawn from the smallest set with at least this total probability; above 0 and at most 1.
        seed: the seed of the random numbers, at least 0.
        on_text: called with the number of a prompt, from 0, and each new piece of its text as soon as it is decoded.
        provider: as for `OrtRunner`.
        threads: as for `OrtRunner`.

    Returns:
        one text for each prompt, in their order.

    Raises:
        ValueError: if an option is out of range, or there are no prompts.
        MELoRAError: if the graph has no cache, or the folder no tokenizer; if a prompt has no tokens and the tokenizer
            no token to begin with; if a prompt leaves the model no position for a new token; otherwise as for
            `OrtRunner`.
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
    """Yields the next token of each text, step by step; None if a text has ended, also in place of its end token.

    Args:
        decoder: a decoder that has made no step yet.
        prompts: token ids of each text.
        most: maximum number of new tokens of each text.
        ends: tokens that end a text.
        first: the token that each text begins with regardless of the logits; None to choose it like the others.
        choose: returns the next tokens, (batch,), for logits (batch, vocabulary).
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
    """Returns token ids and mask of texts, (batch, sequence) both, padded at the left or at the right."""
    length = max(map(len, texts))
    tokens = np.full((len(texts), length), _PADDING, np.int64)
    mask = np.zeros_like(tokens)
    for row, text in enumerate(texts):
        places = slice(length - len(text), length) if left else slice(0, len(text))
        tokens[row, places], mask[row, places] = text, 1
    return tokens, mask


def _graphs(path: Path) -> tuple[Path | None, Path]:
    """Returns the files of the encoder's graph, None if there is none, and of the decoder's."""
    graph = onnx_file_path(path)
    pair = graph.with_name(ENCODER_FILE), graph.with_name(DECODER_FILE)
    has_pair = all(file.is_file() for file in pair) and (graph in pair or not graph.is_file())
    return pair if has_pair else (None, graph)


def _check_options(prompts: object, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> list[str]:
    """Returns the prompts as a list; raises ValueError if an option is out of range."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`prompts` (={prompts!r}) must be one string or several")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` (={seed!r}) must be a whole number, 0 or more")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` (={max_new_tokens!r}) must be a whole number, 1 or more")
    if not temperature > 0:
        raise ValueError(
            f"`temperature` (={temperature!r}) must be above 0; `sample=False` takes the most likely tokens"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` (={top_p!r}) must be above 0 and at most 1")
    return texts


@dataclass
class _Writer:
    """The growing text of one prompt. It is decoded together with the tokens `before` it, because some tokenizers drop
    the space before the first word of a text.
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
        """Writes the rest of the text, and returns all of it."""
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
