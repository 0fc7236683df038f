"""Reads the tokenizer of an exported folder, and the special tokens in its configurations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporters.hugging_face import first_setting
from exporters.onnx_files.companions import GENERATION_CONFIG
from melora_fx import MELoRAError


class TokenizedFolder:
    """The tokenizer and the special tokens of a folder that `export_onnx` has written.

    Attributes:
        end_tokens: the tokens that end a text.
        start_token: the token that the decoder's texts begin with in an encoder-decoder model; None without an encoder.
        forced_token: the token that such a decoder writes first regardless of the logits; None if there is none.

    Raises:
        MELoRAError: if the folder's tokenizer or configuration is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig  # slow to import, so only here

        self._folder = folder
        settings: Any = None
        try:
            self._config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if (folder / GENERATION_CONFIG).is_file():
                settings = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # each tokenizer raises its own types
            raise MELoRAError(
                f"the configurations and tokenizer of `{folder}` cannot be read ({type(error).__name__}: "
                f"{str(error)[:200]}): copy the model's, as `save_pretrained` writes them, next to the graph"
            ) from error
        text = self._config.get_text_config(decoder=True)
        ends: Any = getattr(settings or text, "eos_token_id", None)
        self.end_tokens: list[int] = [ends] if isinstance(ends, int) else list(ends or ())
        self._positions: int | None = getattr(text, "max_position_embeddings", None)
        sources = [source for source in (settings, self._config, text) if source is not None]
        self.start_token: int | None = first_setting(sources, "decoder_start_token_id")
        self.forced_token: int | None = first_setting(sources, "forced_bos_token_id")

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each prompt; raises MELoRAError if a prompt has none, or too many."""
        encoded = []
        for index, prompt in enumerate(prompts):
            ids = list(self.tokenizer(prompt)["input_ids"])
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [self.tokenizer.bos_token_id]
            if not ids:
                raise MELoRAError(f"prompt {index} (={prompt!r}) has no tokens, and the tokenizer no first token")
            if self._positions is not None and len(ids) + (self.start_token is None) > self._positions:
                raise MELoRAError(
                    f"prompt {index} has {len(ids)} tokens: the model in `{self._folder}` has {self._positions} "
                    "positions for prompts and new tokens (`max_position_embeddings`): shorten it"
                )
            encoded.append(ids)
        return encoded

    def most_new_tokens(self, encoded: Sequence[Sequence[int]], asked: int) -> list[int]:
        """Returns the maximum number of new tokens of each text: `asked`, or fewer if the model lacks positions."""
        return [asked if self._positions is None else min(asked, self._positions - len(ids)) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
