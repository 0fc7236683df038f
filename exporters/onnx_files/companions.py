"""Writes and compares the files that Hugging Face users expect next to a graph: configurations, tokenizer files."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporters.example_inputs import TOKENIZER_FILES
from exporters.hugging_face import is_hugging_face_config, is_hugging_face_model
from exporters.private import folder_of
from melora_fx.rewriting.module import class_name

_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
GENAI_CONFIG = "genai_config.json"
_NO_SETTINGS = ("transformers_version", "_name_or_path", "_from_model_config", "dtype", "torch_dtype")
"""Keys of a configuration that record where it comes from or how it was loaded."""


def write_companions(model: nn.Module, folder: Path) -> tuple[str, ...]:
    """Writes the configurations and the tokenizer's files of `model` into `folder`; nothing if `model` is not a Hugging
    Face model.

    Returns:
        notes for the user on missing files.
    """
    config = getattr(model, "config", None)
    if not is_hugging_face_config(config):
        return ()
    described = copy.deepcopy(config)
    described.architectures = [class_name(model)]
    described.save_pretrained(folder)
    if is_hugging_face_model(model) and model.can_generate() and (settings := model.generation_config) is not None:
        (folder / GENERATION_CONFIG).write_text(_without_tensors(settings).to_json_string(), encoding="utf-8")
    source = folder_of(config)
    files = _files_in(source, TOKENIZER_FILES) if source else []
    for file in files:
        shutil.copy(file, folder / file.name)
    return () if files else ("no tokenizer files: `config._name_or_path` is not a local folder that has them",)


def _without_tensors(settings: Any) -> Any:
    """Returns a copy of a generation configuration with tensors as lists and numbers, which JSON can store."""
    plain = copy.deepcopy(settings)
    for name, value in vars(plain).items():
        if isinstance(value, torch.Tensor):
            setattr(plain, name, value.tolist())
    return plain


def copy_companions(source: Path, folder: Path) -> None:
    """Copies the configurations and the tokenizer's files from one graph's folder to another's."""
    for file in _files_in(source, (_CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)):
        shutil.copyfile(file, folder / file.name)


def copy_genai_config(source: Path, path: Path) -> None:
    """Copies the genai_config.json of the graph `source`, if any, next to the graph `path`, which the copy names."""
    if has_genai_config(source):
        described = json.loads(source.with_name(GENAI_CONFIG).read_text(encoding="utf-8"))
        described["model"]["decoder"]["filename"] = path.name
        path.with_name(GENAI_CONFIG).write_text(json.dumps(described, indent=4) + "\n", encoding="utf-8")


def has_genai_config(path: Path) -> bool:
    """Returns whether the genai_config.json next to a graph names that graph; a file of another form names none."""
    try:
        described = json.loads(path.with_name(GENAI_CONFIG).read_text(encoding="utf-8"))
        return bool(described["model"]["decoder"]["filename"] == path.name)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def model_weights(folder: Path) -> list[Path]:
    """Returns the files of a Hugging Face model's weights in a folder, without files of adapters."""
    found = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return sorted(file for file in found if not file.name.startswith("adapter"))


def says_the_same(first: Path, second: Path) -> bool:
    """Returns whether two files of one name have the same content or, if they are configurations, the same settings."""
    if first.read_bytes() == second.read_bytes():
        return True
    return first.name in (_CONFIG, GENERATION_CONFIG) and _settings(first) == _settings(second)


def is_of_one_model(first: Path, second: Path) -> bool:
    """Returns whether two files of one name belong to one model; a genai_config.json may name another of its graphs."""
    if first.name == GENAI_CONFIG:
        return _of_any_graph(first) == _of_any_graph(second)
    return says_the_same(first, second)


def _of_any_graph(file: Path) -> Any:
    """Returns a genai_config.json's settings of the model, without the graph's; the text of a file of another form."""
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        settings = json.loads(text)["model"]
        return settings | {"decoder": None}
    except (ValueError, KeyError, TypeError):
        return text


def _settings(file: Path) -> Any:
    """Returns the settings in a configuration, defaults included; the text of a file that cannot be read."""
    from transformers import CONFIG_MAPPING, GenerationConfig  # slow to import: only if two configurations differ

    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        settings = json.loads(text)
        config_class = GenerationConfig if file.name == GENERATION_CONFIG else CONFIG_MAPPING[settings["model_type"]]
        settings = config_class.from_dict(settings).to_dict()
    except Exception:  # classes of configurations raise their own types
        return text
    return {key: value for key, value in settings.items() if key not in _NO_SETTINGS}


def _files_in(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]
