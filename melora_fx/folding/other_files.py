"""Finds and copies the files next to a checkpoint's weights that belong to a folded checkpoint too."""

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
"""Suffixes of files, and folders, in the checkpoint's own folder that contain the base's weights in other forms."""


def find_other_files(checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """Returns the files to copy unchanged, by their paths in the folder, and notes that name the others."""
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
        "they contain the base's weights": weights,
        "they are hidden": hidden,
        "they link to folders above them": [str(path.relative_to(checkpoint.directory)) for path in cycles],
    }
    return copied, [f"not copied, because {reason}: {', '.join(names)}" for reason, names in reasons.items() if names]


def _holds_weights(path: Path) -> bool:
    """Returns whether a file or folder contains the base's weights in another form; files in other folders never do."""
    if path.is_dir():
        return path.name in _WEIGHT_FOLDERS
    return path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")


def _files_below(folder: Path, above: tuple[Path, ...], cycles: list[Path]) -> list[Path]:
    """Returns the files in a folder and below it, also through links. Links to a folder in `above`, the resolved paths
    of the folders that contain this one, are appended to `cycles` instead.

    Raises:
        MELoRAError: if a folder cannot be read.
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
    """Copies the content of a file, and creates missing folders.

    Raises:
        MELoRAError: if the source cannot be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = source.open("rb")
    except OSError as error:
        raise MELoRAError(f"`{source}` cannot be read: {error.strerror}") from error
    with file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy)
