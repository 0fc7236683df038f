"""The files that Hugging Face users expect beside a graph: the configuration and the tokenizer's."""

import shutil
from pathlib import Path

from torch import nn

from exporters.example_inputs import TOKENIZER_FILES
from exporters.hugging_face import is_hugging_face_config
from exporters.private import folder_of


def write_companions(model: nn.Module, folder: Path) -> tuple[str, ...]:
    """Writes the configuration and the tokenizer's files of `model` into `folder`, none for a model of no Hugging Face
    class.

    Returns:
        notes on what is missing, for the user.
    """
    config = getattr(model, "config", None)
    if not is_hugging_face_config(config):
        return ()
    config.save_pretrained(folder)
    source = folder_of(config)
    files = _files_in(source, TOKENIZER_FILES) if source else []
    for file in files:
        shutil.copy(file, folder / file.name)
    return () if files else ("no tokenizer files: `config._name_or_path` is not a local folder that has them",)


def copy_companions(source: Path, folder: Path) -> None:
    """Copies config.json and the tokenizer's files from the folder of one graph to another's."""
    for file in _files_in(source, ("config.json", *TOKENIZER_FILES)):
        shutil.copyfile(file, folder / file.name)


def _files_in(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]
