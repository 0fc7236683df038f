"""The files beside a checkpoint's weights: which of them belong to a folded one too."""

import shutil
from pathlib import Path

from melora_fx.errors import MELoRAError

from .checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint

_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".ot",
)
_WEIGHT_FOLDERS = ("onnx", "openvino", "original", "coreml")
"""Suffixes in the checkpoint's own folder, and folders in it, that hold the base's weights in other forms."""


def find_other_files(checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """The files to copy as they are, by their paths in the folder, and notes that name the others."""
    copied: list[Path] = []
    weights: list[str] = []
    hidden: list[str] = []
    cycles: list[Path] = []
    own = checkpoint.directory.resolve()
    ours = {*checkpoint.files, CONFIG_FILE, *([INDEX_FILE] if checkpoint.index else [])}
    for path in sorted(checkpoint.directory.iterdir()):
        if path.name in ours:
            continue
        if path.name.startswith("."):
            hidden.append(path.name)
        elif _holds_weights(path):
            weights.append(path.name)
        else:
            files = _files_below(path, (own, *own.parents), cycles) if path.is_dir() else [path]
            copied += [file.relative_to(checkpoint.directory) for file in files]
    reasons = {
        "they hold the base's weights": weights,
        "they are hidden": hidden,
        "they are links to folders that they lie in": [str(path.relative_to(checkpoint.directory)) for path in cycles],
    }
    return copied, [f"not copied, as {reason}: {', '.join(names)}" for reason, names in reasons.items() if names]


def _holds_weights(path: Path) -> bool:
    """Whether this is a file or folder of the base's weights in another form; files in other folders are not."""
    if path.is_dir():
        return path.name in _WEIGHT_FOLDERS
    return path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")


def _files_below(folder: Path, above: tuple[Path, ...], cycles: list[Path]) -> list[Path]:
    """The files in a folder and in those below it, through links too; `cycles` gets the links to a folder of `above`,
    which are those that this one lies in, resolved.

    Raises:
        MELoRAError: for a folder that cannot be read.
    """
    real = folder.resolve()
    if real in above:
        cycles.append(folder)
        return []
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise MELoRAError(f"`{folder}` cannot be read: {error.strerror}") from error
    found = [_files_below(path, (*above, real), cycles) if path.is_dir() else [path] for path in paths]
    return [file for files in found for file in files]


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's content; folders on the way are made.

    Raises:
        MELoRAError: where the source cannot be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = source.open("rb")
    except OSError as error:
        raise MELoRAError(f"`{source}` cannot be read: {error.strerror}") from error
    with file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy)
