"""Loads the tokenizer of a model folder, and measures texts in tokens: lengths, and how many are cut."""

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
"""Tokenizers without a limit report a number above this one."""


@dataclass(frozen=True)
class TokenLengths:
    """The lengths of the texts in tokens, special tokens included.

    Attributes:
        lengths: number of tokens of each text before it is cut.
        max_tokens: number of tokens at which longer texts are cut.
        share_unknown: share of the tokens, special ones excluded, that the tokenizer does not know.
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
    """Loads the tokenizer of a model folder. It pads on the right, which keeps positions that count from the left.

    Raises:
        MELoRAError: if the folder has no tokenizer, or it cannot be read.
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
    """Measures the texts in tokens. They are cut at `max_tokens`, or only at the model's limit if it is None.

    Raises:
        ValueError: if `max_tokens` is above the model's limit, or leaves no token of a text.
        MELoRAError: if the tokenizer knows none of the texts, or returns tokens that the model lacks.
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
            f"`{folder}`: its tokenizer returns token {highest}, but the model has {vocabulary}: it is another model's"
        )
    return TokenLengths(tuple(map(len, tokens)), max_tokens or max(min(longest, limit or longest), least), unknown)


def token_limit(tokenizer: Any, model: nn.Module) -> int | None:
    """Returns the largest number of tokens that the model accepts, or None if nothing states a limit.

    If positions start after the padding token's id, as in RoBERTa, the model accepts fewer tokens than it has
    positions.
    """
    config: Any = model.config
    limits = [tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if isinstance(limit, int) and 0 < limit < _NO_LIMIT), default=None)


def set_padding(tokenizer: Any, config: Any, folder: Path) -> None:
    """Sets the same padding token in tokenizer and configuration: the model's, the tokenizer's, or the end token.

    For a decoder the tokenizer's comes before the model's: a decoder classifies the last token that is not padding, and
    users of the trained model pad with the tokenizer's.

    Raises:
        MELoRAError: if there is none of the three.
    """
    text_config = config.get_text_config()
    own = getattr(text_config, "pad_token_id", None)
    if isinstance(own, int) and 0 <= own < len(tokenizer) and not (_is_decoder(config) and tokenizer.pad_token):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(own)
        return
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= getattr(text_config, "vocab_size", _NO_LIMIT):
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise MELoRAError(f"`{folder}`: its tokenizer has neither a padding nor an end token: set its `pad_token`")
    text_config.pad_token_id = tokenizer.pad_token_id


def _is_decoder(config: Any) -> bool:
    """Returns whether models of this configuration are decoders only."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def _num_tokens(model: Any) -> int:
    return model.get_input_embeddings().weight.size(0)


def _refuse_unknown(tokenizer: Any, tokens: Sequence[Sequence[int]], folder: Path) -> float:
    """Returns the share of the texts' tokens that the tokenizer does not know; raises MELoRAError if it knows none."""
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    own = [token for each in tokens for token in each if token not in special]
    unknown = sum(token == tokenizer.unk_token_id for token in own) / len(own) if own else 1.0
    if unknown == 1.0:
        raise MELoRAError(
            f"`{folder}`: its tokenizer knows no word of the texts: save the one that the model was trained with into "
            "the folder, `tokenizer.save_pretrained(folder)`"
        )
    return unknown
