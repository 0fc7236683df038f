"""How an export's files come to their place: one rename decides which graph is there, and each has its own weights."""

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
    """The .onnx file that `path` means: itself, or model.onnx in a folder."""
    path = Path(path)
    return path if path.suffix == ".onnx" else path / "model.onnx"


def report_path(path: Path) -> Path:
    """Where the report on the graph `path` stands."""
    return path.with_name(f"{path.stem}.export.json")


def refuse_folder(path: Path) -> None:
    """Raises a MELoRAError for a path that is a folder, or too long to be a file."""
    with writing(path):
        if path.parent.exists() and not path.parent.is_dir():
            raise MELoRAError(
                f"`{path}` cannot be written: `{path.parent}` is a file, and no .onnx file: name one, or a folder"
            )
        if path.is_dir():
            raise MELoRAError(f"`{path}` is a folder: it cannot be written as a file")


def refuse_other_model(companions: Path, path: Path) -> None:
    """Raises where an export to `path` would overwrite, or mix, what belongs to another model.

    Args:
        companions: a folder with what will be written beside the graph: the configuration and the tokenizer's files.
        path: where the graph will be. What stands beside a graph of ours that is alone in its folder is ours too.

    Raises:
        MELoRAError: where `path` is another tool's graph; where a companion would change one that belongs to other
            graphs, to a Hugging Face model, or to nobody known; where it would come to the weights of another model.
    """
    folder = path.parent
    if is_foreign(path):
        raise MELoRAError(f"`{path}` is a graph that `export_onnx` has not written: remove it, or name another file")
    present = [(file, folder / file.name) for file in sorted(companions.iterdir())]
    changed = [old for new, old in present if old.is_file() and not is_of_one_model(new, old)]
    if changed and (others := sorted(file.name for file in folder.glob("*.onnx") if file != path)):
        raise MELoRAError(f"`{changed[0]}` describes `{others[0]}` too, and is another model's: name another folder")
    weights = model_weights(folder)
    if changed and (weights or not is_ours(path)):
        raise MELoRAError(f"`{changed[0]}` is there already, and another model's: name another folder")
    if weights and any(not old.exists() for _, old in present if old.name == "config.json"):
        raise MELoRAError(f"`{weights[0]}` is there already, the weights of another model: name another folder")


def publish(staging: Path, path: Path, keep: Collection[Path] = ()) -> None:
    """Moves the finished files of `staging` beside `path`.

    Wherever the process is killed, the old graph is there with its weights, or the new one with its own. First goes
    what describes the old graph; the new weights come, under a name of their own, with all else that is new; the
    graph's rename decides; what describes the new graph follows, and at last the old weights go, and those that killed
    runs have left. A description is missing rather than another graph's. One export at a time does this in a folder.

    Args:
        staging: a folder on the same disk, with the graph, its weights, and what belongs beside it.
        path: the graph's place.
        keep: files that are not to be removed.
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
    """Removes weights of graphs called like `path` that no graph in the folder refers to.

    Args:
        path: the new graph.
        earlier: how an earlier version called the weights of the graph that was there before.
        keep: files that stay in any case.
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
    """Whether this is a graph by its name, or one that was put aside, such as model.onnx.bak."""
    return ".onnx" in file.name and not file.name.endswith("data") and file.is_file()


def keep_failed(staging: Path, path: Path) -> Path:
    """Moves the files of a refused graph into the folder NAME.failed beside `path`, for inspection."""
    failed = path.with_suffix(".failed")
    with writing(failed):
        shutil.rmtree(failed, ignore_errors=True)
        os.replace(staging, failed)
    return failed
