"""A model folder's tokenizer, and what it makes of the texts: lengths in tokens, and how many are cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoTokenizer

from exporters.example_inputs import TOKENIZER_FILES
from melora_fx import MELoRAError

_NO_VOCABULARY = ("preprocessor_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer_config.json")
_NO_LIMIT = 10**9
"""Tokenizers without a limit of their own give a number above this one."""


@dataclass(frozen=True)
class TokenLengths:
    """How the texts are tokenised, with the special tokens around them.

    Attributes:
        lengths: number of tokens of each text, uncut.
        max_tokens: where longer ones are cut.
        share_unknown: share of the tokens that the tokenizer does not know.
    """

    lengths: tuple[int, ...]
    max_tokens: int
    share_unknown: float

    @property
    def num_cut(self) -> int:
        return sum(length > self.max_tokens for length in self.lengths)

    @property
    def share_cut(self) -> float:
        return self.num_cut / len(self.lengths)

    def __str__(self) -> str:
        count = len(self.lengths)
        cut = f"{self.num_cut} of {count} texts ({self.share_cut:.1%}) are cut at {self.max_tokens} tokens"
        text = cut if self.num_cut else f"no text is cut: the longest has {max(self.lengths)} tokens"
        return text + (f"; {self.share_unknown:.1%} of the tokens are unknown" if self.share_unknown > 0.01 else "")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder; it pads on the right, where positions that are counted from the left stay.

    Raises:
        MELoRAError: where the folder has none, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES if name not in _NO_VOCABULARY):
        raise MELoRAError(
            f"`{folder}` has no tokenizer: save the one that the model was trained with into it, "
            "`tokenizer.save_pretrained(folder)`"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise MELoRAError(f"`{folder}`: the tokenizer cannot be read: {type(error).__name__}: {error}") from error
    tokenizer.padding_side = "right"
    return tokenizer


def measure_texts(
    tokenizer: Any, texts: Sequence[str], model: nn.Module, folder: Path, max_tokens: int | None
) -> TokenLengths:
    """The lengths of the texts, and where they are cut: at `max_tokens`, or not before the model's own limit.

    Raises:
        ValueError: where `max_tokens` is above the model's limit, or leaves no token of a text.
        MELoRAError: for a tokenizer that knows none of the texts, or gives tokens that the model has not.
    """
    tokens = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    limit = token_limit(tokenizer, model)
    longest = max(map(len, tokens))
    least = tokenizer.num_special_tokens_to_add() + 1
    if max_tokens is not None and not least <= max_tokens <= (limit or max_tokens):
        most = f"at most {limit}, the model's limit" if limit and max_tokens > limit else f"at least {least}"
        raise ValueError(f"`max_tokens` (={max_tokens}) must be {most}")
    unknown = _refuse_unknown(tokenizer, tokens, folder)
    vocabulary = _num_tokens(model)
    highest = max((token for each in tokens for token in each), default=0)
    if highest >= vocabulary:
        raise MELoRAError(
            f"`{folder}`: its tokenizer gives token {highest}, the model has {vocabulary}: it is another model's"
        )
    return TokenLengths(tuple(map(len, tokens)), max_tokens or max(min(longest, limit or longest), least), unknown)


def token_limit(tokenizer: Any, model: nn.Module) -> int | None:
    """How many tokens the model takes at most; None where nothing says so.

    Where positions are counted from beyond the padding token's number, as RoBERTa's are, these are fewer than it has.
    """
    config: Any = model.config
    limits = [tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if isinstance(limit, int) and 0 < limit < _NO_LIMIT), default=None)


def set_padding(tokenizer: Any, config: Any, folder: Path) -> None:
    """Gives tokenizer and configuration the same padding token: the model's, the tokenizer's, or that of an end.

    A decoder classifies the last token that is no padding: there the tokenizer's goes before the model's, as whoever
    uses the trained model pads with that.

    Raises:
        MELoRAError: where there is none of them.
    """
    text_config = config.get_text_config()
    own = getattr(text_config, "pad_token_id", None)
    if isinstance(own, int) and 0 <= own < len(tokenizer) and not (_is_decoder(config) and tokenizer.pad_token):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(own)
        return
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= getattr(text_config, "vocab_size", _NO_LIMIT):
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise MELoRAError(f"`{folder}`: its tokenizer has neither a padding nor an end token: give it a `pad_token`")
    text_config.pad_token_id = tokenizer.pad_token_id


def _is_decoder(config: Any) -> bool:
    """Whether models of this configuration are decoders alone."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def _num_tokens(model: Any) -> int:
    return model.get_input_embeddings().weight.size(0)


def _refuse_unknown(tokenizer: Any, tokens: Sequence[Sequence[int]], folder: Path) -> float:
    """Share of the texts' tokens that the tokenizer does not know; an error where it knows none."""
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    own = [token for each in tokens for token in each if token not in special]
    unknown = sum(token == tokenizer.unk_token_id for token in own) / len(own) if own else 1.0
    if unknown == 1.0:
        raise MELoRAError(
            f"`{folder}`: its tokenizer knows no word of the texts: save the one that the model was trained with into "
            "the folder, `tokenizer.save_pretrained(folder)`"
        )
    return unknown
