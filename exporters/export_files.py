"""Moves an export's files to their place: one rename replaces the graph, and each graph has its own weights."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from exporters.onnx_files.companions import (
    GENAI_CONFIG,
    has_genai_config,
    is_of_one_model,
    model_weights,
    says_the_same,
)
from exporters.onnx_files.metadata import is_foreign, is_ours
from exporters.onnx_files.onnx_file import may_refer_to
from exporters.onnx_files.save_graph import is_data_name
from melora_fx import MELoRAError
from melora_fx.files import locked, writing


def onnx_file_path(path: str | os.PathLike[str]) -> Path:
    """Returns the .onnx file that `path` means: `path` itself, or model.onnx in the folder `path`."""
    path = Path(path)
    return path if path.suffix == ".onnx" else path / "model.onnx"


def report_path(path: Path) -> Path:
    """Returns the path of the report on the graph `path`."""
    return path.with_name(f"{path.stem}.export.json")


def refuse_folder(path: Path) -> None:
    """Raises MELoRAError if `path` is a folder, has a parent that is a file, or is too long for a file."""
    with writing(path):
        if path.parent.exists() and not path.parent.is_dir():
            raise MELoRAError(f"`{path}` cannot be written: `{path.parent}` is a file: name a .onnx file or a folder")
        if path.is_dir():
            raise MELoRAError(f"`{path}` is a folder: it cannot be written as a file")


def refuse_other_model(companions: Path, path: Path) -> None:
    """Raises an error if an export to `path` would overwrite another model's files or mix with them.

    Args:
        companions: the folder with the files that will be written next to the graph: configurations and the tokenizer's
            files.
        path: the graph's place. If it holds a graph that `export_onnx` wrote, and no other graph is in its folder, the
            companion files there are taken to be that graph's.

    Raises:
        MELoRAError: if `path` is another tool's graph; if a companion file would change one that belongs to other
            graphs, to a Hugging Face model, or to an unknown owner; if a configuration would be added to the weights
            of another model.
    """
    folder = path.parent
    if is_foreign(path):
        raise MELoRAError(f"`{path}` is a graph that `export_onnx` did not write: remove it, or name another file")
    present = [(file, folder / file.name) for file in sorted(companions.iterdir())]
    changed = [old for new, old in present if old.is_file() and not is_of_one_model(new, old)]
    if changed and (others := sorted(file.name for file in folder.glob("*.onnx") if file != path)):
        raise MELoRAError(
            f"`{changed[0]}` belongs to another model, and describes `{others[0]}` too: name another folder"
        )
    weights = model_weights(folder)
    if changed and (weights or not is_ours(path)):
        raise MELoRAError(f"`{changed[0]}` already exists and belongs to another model: name another folder")
    if weights and any(not old.exists() for _, old in present if old.name == "config.json"):
        raise MELoRAError(f"`{weights[0]}` already exists and contains another model's weights: name another folder")


def publish(staging: Path, path: Path, keep: Collection[Path] = ()) -> None:
    """Moves the finished files of `staging` to the folder of `path`.

    Whenever the process is killed, either the old graph is there with its weights, or the new one with its own. The
    order ensures this: files that describe the old graph are removed; new files are moved in, among them the new
    weights under their own name; one rename replaces the graph; changed files, which describe the new graph, follow;
    finally the old weights and those that killed runs left are removed. So a description may be missing, but never
    belongs to another graph. Only one export at a time does this in a folder.

    Args:
        staging: a folder on the same disk, with the graph, its weights and its companion files.
        path: the graph's place.
        keep: files that must not be removed.
    """
    folder = path.parent
    with locked(folder):
        places = {file: folder / file.name for file in sorted(staging.iterdir()) if file.name != path.name}
        for place in (path, *places.values()):
            refuse_folder(place)
        earlier = {f"{path.name}.data"} if may_refer_to(path, f"{path.name}.data") else set()
        new = [file for file, place in places.items() if not place.exists() or is_data_name(file.name, path.name)]
        changed = [file for file in places if file not in new and not says_the_same(file, places[file])]
        of_graph = {report_path(path), *([folder / GENAI_CONFIG] if has_genai_config(path) else [])}
        outdated = [*(places[file] for file in changed), *(of_graph - set(places.values()))]
        for place in outdated:
            place.unlink(missing_ok=True)
        for file in new:
            os.replace(file, places[file])
        os.replace(staging / path.name, path)
        for file in changed:
            os.replace(file, places[file])
        _remove_old_weights(path, earlier, {*keep, *places.values()})


def _remove_old_weights(path: Path, earlier: Collection[str], keep: Collection[Path]) -> None:
    """Removes the weight files named after `path` that no other graph in the folder refers to.

    Args:
        path: the new graph.
        earlier: names that an earlier version of this package gave to the weights of the previous graph.
        keep: files that stay in any case, such as the new graph's weights.
    """
    kept = {file.resolve() for file in keep}
    weights = [
        file for file in path.parent.glob("*.data") if is_data_name(file.name, path.name) or file.name in earlier
    ]
    graphs = [file for file in path.parent.iterdir() if file != path and _may_be_graph(file)]
    for file in weights:
        if file.resolve() not in kept and not any(may_refer_to(graph, file.name) for graph in graphs):
            file.unlink(missing_ok=True)


def _may_be_graph(file: Path) -> bool:
    """Returns whether a file has the name of a graph, or of a backup of one, such as model.onnx.bak."""
    return ".onnx" in file.name and not file.name.endswith("data") and file.is_file()


def keep_failed(staging: Path, path: Path) -> Path:
    """Moves the files of a refused graph to the folder NAME.failed next to `path`, and returns that folder."""
    failed = path.with_suffix(".failed")
    with writing(failed):
        shutil.rmtree(failed, ignore_errors=True)
        os.replace(staging, failed)
    return failed
