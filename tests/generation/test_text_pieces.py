"""Texts while they are written: pieces of whole characters that join to the text, including its initial space."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from support.decoders import text_folder
from support.exports import Exports
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from exporters import generate
from exporters.generation import generate as module

SPECIAL = ["<s>", "</s>", "<unk>"]
TEXT = "na\u00efve \U0001f642\U0001f469\u200d\U0001f467 \u65e5\u672c, don't\n\t x \u0301 \u00a3"
"""Characters of one to four bytes, an emoji of several characters, a combining accent."""


def save(tokenizer: Tokenizer, folder: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def write_byte_level(folder: Path) -> None:
    """Writes a tokenizer whose tokens are single bytes, or the first two of an emoji's four."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first_two = [symbols[0][:2] for symbols in pre_tokenizers.ByteLevel(False).pre_tokenize_str("\U0001f642")]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet, *first_two])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(pair[0], pair[1]) for pair in first_two]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    save(tokenizer, folder)


def write_metaspace(folder: Path) -> None:
    """Writes a tokenizer like Llama 2's: decoding drops a text's first space, and unknown characters become bytes."""
    words = ["\u2581once", "\u2581upon", "\u2581a", "\u2581", ",", "upon", "once"]
    symbols = sorted({symbol for word in words for symbol in word})
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *symbols]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    save(tokenizer, folder)


def write_word_piece(folder: Path) -> None:
    words = [*SPECIAL, "we", "do", "n", "'", "t", ".", ",", "##ing", "##s"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    save(tokenizer, folder)


Scripted = Callable[..., tuple[list[str], list[list[str]]]]


@pytest.fixture
def scripted(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """A function that returns what `generate` returns, and each text's pieces, if the model writes these tokens."""

    def write(
        write_tokenizer: Callable[[Path], None], prompts: Sequence[str], texts: Sequence[Sequence[int]]
    ) -> tuple[list[str], list[list[str]]]:
        folder = text_folder(exports("decoder").path, tmp_path / "folder", write_tokenizer)
        longest = max(map(len, texts))
        steps = [[text[index] if index < len(text) else None for text in texts] for index in range(longest)]
        monkeypatch.setattr(module, "new_tokens", lambda *_, **__: iter(steps))
        pieces: list[list[str]] = [[] for _ in texts]
        returned = generate(folder, prompts, on_text=lambda index, piece: pieces[index].append(piece))
        assert generate(folder, prompts) == returned
        return returned, pieces

    return write


def ids_of(write_tokenizer: Callable[[Path], None], folder: Path, text: str) -> list[int]:
    write_tokenizer(folder)
    ids: list[int] = hf.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    return ids


def test_characters_of_several_tokens_come_whole(scripted: Scripted, tmp_path: Path) -> None:
    ids = ids_of(write_byte_level, tmp_path / "tokenizer", TEXT)
    assert len(TEXT) < len(ids) < len(TEXT.encode())
    returned, pieces = scripted(write_byte_level, ["ab", "c\U0001f642"], [ids, ids[::-1]])
    assert returned[0] == TEXT
    assert pieces[0] == [*TEXT]
    assert "".join(pieces[1]) == returned[1]


def test_a_text_that_ends_within_a_character(scripted: Scripted, tmp_path: Path) -> None:
    ids = ids_of(write_byte_level, tmp_path / "tokenizer", "a\U0001f642")
    returned, pieces = scripted(write_byte_level, ["ab"] * 3, [ids, ids[:-1], ids[:2]])
    assert returned == ["a\U0001f642", "a\ufffd", "a\ufffd"]
    assert pieces == [["a", "\U0001f642"], ["a", "\ufffd"], ["a", "\ufffd"]]


def test_pieces_join_to_the_text_whatever_the_bytes_are(scripted: Scripted) -> None:
    generator = np.random.default_rng(0)
    texts = [generator.integers(3, 260, generator.integers(1, 30)).tolist() for _ in range(64)]
    texts += [generator.choice([3 + 163, 3 + 100, 40, 41, 259], 20).tolist() for _ in range(64)]
    returned, pieces = scripted(write_byte_level, ["\U0001f642"] * len(texts), texts)
    assert ["".join(each) for each in pieces] == returned
    assert all(piece for each in pieces for piece in each)


def test_special_tokens_are_not_written(scripted: Scripted, tmp_path: Path) -> None:
    ids = ids_of(write_byte_level, tmp_path / "tokenizer", "\u00e9a")
    mixed = [ids[0], 0, ids[1], 2, ids[2]]
    returned, pieces = scripted(write_byte_level, ["ab"], [mixed])
    assert returned == ["\u00e9a"]
    assert pieces == [["\u00e9", "a"]]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("once", " upon a \U0001f642, once"),
        ("once", "upon"),
        ("once", "\u65e5 upon"),
        ("once upon \U0001f642", " a"),
        ("", "once upon"),
    ],
    ids=["a word", "the rest of a word", "a character of bytes", "after bytes", "no prompt"],
)
def test_a_prompt_and_its_text_are_the_whole_text(scripted: Scripted, tmp_path: Path, prompt: str, text: str) -> None:
    """Also if the first word of a text is decoded without its space."""
    whole, before = (ids_of(write_metaspace, tmp_path / "tokenizer", each) for each in (prompt + text, prompt))
    assert whole[: len(before)] == before
    returned, pieces = scripted(write_metaspace, [prompt], [whole[len(before) :]])
    assert returned == [text]
    assert "".join(pieces[0]) == text


def test_a_tokenizer_that_takes_spaces_out(scripted: Scripted, tmp_path: Path) -> None:
    """WordPiece removes them before dots and within words."""
    ids = ids_of(write_word_piece, tmp_path / "tokenizer", "doing dos, we n't.")
    returned, pieces = scripted(write_word_piece, ["we"], [ids])
    assert returned == [" doing dos, we n ' t."]
    assert "".join(pieces[0]) == returned[0]


def test_what_a_callback_raises_is_raised(exports: Exports, tmp_path: Path) -> None:
    def fails(_: int, __: str) -> None:
        raise KeyError("mine")

    folder = text_folder(exports("decoder").path, tmp_path / "folder", eos_token_id=None)
    arguments: dict[str, Any] = {"on_text": fails}
    with pytest.raises(KeyError, match="mine"):
        generate(folder, "w5 w9", **arguments)
