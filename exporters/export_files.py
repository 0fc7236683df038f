"""How an export's files come to their place: all of them or none."""

import os
import shutil
from pathlib import Path

from melora_fx import MELoRAError
from melora_fx.files import writing


def onnx_file_path(path: str | os.PathLike[str]) -> Path:
    """The .onnx file that `path` means: itself, or model.onnx in a folder."""
    path = Path(path)
    return path if path.suffix == ".onnx" else path / "model.onnx"


def refuse_folder(path: Path) -> None:
    """Raises a MELoRAError for a path that is a folder, or too long to be a file."""
    with writing(path):
        if path.is_dir():
            raise MELoRAError(f"`{path}` is a folder: it cannot be written as a file")


def move_files(staging: Path, path: Path) -> None:
    """Moves the finished files beside `path`, the graph itself last: when killed, no graph has another's weights."""
    for file in staging.iterdir():
        refuse_folder(path.parent / file.name)
    path.unlink(missing_ok=True)
    for file in sorted(staging.iterdir(), key=lambda file: file.name == path.name):
        os.replace(file, path.parent / file.name)


def keep_failed(staging: Path, path: Path) -> Path:
    """Moves the files of a refused graph into the folder NAME.failed beside `path`, for inspection."""
    failed = path.with_suffix(".failed")
    with writing(failed):
        shutil.rmtree(failed, ignore_errors=True)
        os.replace(staging, failed)
    return failed
