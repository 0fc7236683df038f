"""`fold_checkpoint`: an adapter merged into a checkpoint on disk, at about the speed of copying it.

No model is loaded. Each weight file is copied, and the weights that the adapter changes are changed on the way.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .adapter_file import Adapter, read_adapter, refuse_non_finite
from .checkpoint import (
    CONFIG_FILE,
    DTYPES,
    INDEX_FILE,
    Checkpoint,
    Entry,
    KeyMap,
    StoredTensor,
    make_header,
    map_keys,
    open_checkpoint,
    serialise,
)
from .edited_copy import Stretch, write_edited
from .errors import MELoRAError
from .files import staging_folder, writing
from .fold_report import FoldReport, SiteFold, make_report, measure_update
from .state import check_fingerprints, check_shapes
from .targets import nearest
from .update import Scratch

METADATA_KEY = "melora"
"""Key in the metadata of a folded safetensors file: JSON that says which adapter it holds."""

_OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot",
)  # fmt: skip
_OTHER_FOLDERS = ("onnx", "openvino", "original", "coreml")
"""Suffixes in the checkpoint's own folder, and folders in it, that hold the base's weights in other forms."""


def fold_checkpoint(
    base_dir: str | os.PathLike[str], adapter_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]
) -> FoldReport:
    """Merges an adapter into a Hugging Face checkpoint on disk; the base is not changed.

    The base is one safetensors file or several with an index. All other files are copied, but those that hold the
    base's weights in other forms. A trained head goes into the weights and config.json. A process that is killed
    leaves no `out_dir`, only a hidden folder beside it that the next fold to this place removes. There is no way back
    from a folded checkpoint: keep the base.

    Peak memory is that of a few of the largest weights that the adapter changes.

    Args:
        base_dir: the checkpoint that the adapter was trained on, in any floating dtype.
        adapter_dir: a folder written by `save_adapter`.
        out_dir: the folder to write; it must be empty, or not there.

    Returns:
        what the rounding to the checkpoint's dtype has taken, site by site. Warns where it is much.

    Raises:
        MELoRAError: where the checkpoint or the adapter cannot be read, belong to different models, the checkpoint
            holds an adapter already, or a weight is tied, quantised or stored in another form; where the adapter is not
            finite, or `out_dir` cannot be written. Nothing is written then.
    """
    base, out = Path(base_dir), Path(out_dir)
    adapter = read_adapter(adapter_dir)
    checkpoint = open_checkpoint(base)
    _refuse_folded(checkpoint)
    _refuse_place(base, out)
    names = map_keys(checkpoint, adapter.model.get("class"), adapter.model.get("num_labels"))
    stored = _find_weights(checkpoint, adapter, names)
    _check_values(adapter, stored)
    heads = _find_heads(checkpoint, adapter, names)
    copied, notes = _other_files(checkpoint)
    measured: list[SiteFold] = []
    scratch = Scratch()
    changes = {
        tensor.key: partial(_fold_stored, name, adapter, tensor, scratch, measured) for name, tensor in stored.items()
    }
    total = sum(file.stat().st_size for file in (base / name for name in checkpoint.files))
    sha256 = adapter.sha256
    with staging_folder(out) as staging, writing(out), _progress(f"folding {out.name}", total) as advance:
        made = staging / "folder"  # not the staging folder itself, which only its owner may read
        made.mkdir()
        for name in copied:
            _copy_file(base / name, made / name)
        written = _write_weights(checkpoint, made, changes, heads, sha256, advance)
        _write_index(checkpoint, made, written, sha256)
        _write_config(checkpoint, made, adapter)
        os.replace(made, out)
    return make_report(measured, sha256, notes)


def _refuse_folded(checkpoint: Checkpoint) -> None:
    for name, metadata in checkpoint.files.items():
        if METADATA_KEY in metadata:
            sha256 = re.search(r"[0-9a-f]{12}", metadata[METADATA_KEY])
            which = f" (sha256 {sha256[0]}…)" if sha256 else ""
            raise MELoRAError(
                f"`{checkpoint.directory / name}` holds an adapter already{which}: fold into the base that it was made "
                "from"
            )


def _refuse_place(base: Path, out: Path) -> None:
    with writing(out):  # the system may refuse the very name
        occupied = out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))
    if out.resolve() == base.resolve() or base.resolve() in out.resolve().parents:
        raise MELoRAError(
            f"`{out}` is the base's own folder, or in it: a fold needs one of its own, and keeps the base"
        )
    if occupied:
        raise MELoRAError(f"`{out}` exists already: remove it, or name another folder")


def _find_weights(checkpoint: Checkpoint, adapter: Adapter, names: KeyMap) -> dict[str, StoredTensor]:
    """Where each site's weight is stored."""
    stored, lines = dict[str, StoredTensor](), []
    quantised = (checkpoint.config or {}).get("quantization_config")
    for site in adapter.configs:
        parameter = f"{site}.weight" if f"{site}.weight" in names.keys or site not in names.keys else site
        key = names.keys.get(parameter)
        others = names.tied.get(parameter, ())
        if others:
            lines.append(
                f"`{site}` shares its weight with {', '.join(map(repr, others))}: fold in memory, "
                "`fold(model, untie=True)`, and save"
            )
        elif key is None and parameter in names.converted:
            lines.append(f"`{site}`: the checkpoint stores its weight in another form: fold in memory, and save")
        elif key is None:
            lines.append(f"`{site}`: the checkpoint has no such weight; nearest: {nearest(site, list(names.keys))}")
        elif quantised or checkpoint.tensors[key].dtype not in DTYPES:
            lines.append(
                f"`{site}`: its weight is quantised ({checkpoint.tensors[key].dtype}): dequantise the base, fold, and "
                "quantise again"
            )
        else:
            stored[site] = checkpoint.tensors[key]
    if lines:
        raise MELoRAError(f"`{adapter.directory}` cannot be folded into `{checkpoint.directory}`:\n" + "\n".join(lines))
    return stored


def _find_heads(checkpoint: Checkpoint, adapter: Adapter, names: KeyMap) -> dict[str, torch.Tensor]:
    """The tensors that were kept trainable, by key: a tied one under all keys that it has, a new one by its name."""
    heads, lines = dict[str, torch.Tensor](), []
    for name, tensor in adapter.kept_tensors().items():
        if name in names.converted:
            lines.append(f"`{name}`: the checkpoint stores it in another form: fold in memory, and save")
        keys = [names.keys[own] for own in (name, *names.tied.get(name, ())) if own in names.keys]
        heads |= dict.fromkeys(keys or [name], tensor)
    if lines:
        raise MELoRAError(f"`{adapter.directory}` cannot be folded into `{checkpoint.directory}`:\n" + "\n".join(lines))
    return heads


def _check_values(adapter: Adapter, stored: Mapping[str, StoredTensor]) -> None:
    """Refuses an adapter of another base, or values that are not finite; reads a few values of each weight."""
    flat = [
        f"`{site}`: its weight has shape {tensor.shape}" for site, tensor in stored.items() if len(tensor.shape) != 2
    ]
    if flat:
        raise MELoRAError(f"`{adapter.directory}` is for matrices:\n" + "\n".join(flat))
    shapes = {site: torch.empty(tensor.shape, device="meta") for site, tensor in stored.items()}
    check_shapes(adapter, shapes)
    for site, shape in shapes.items():
        adapter.oriented(site, shape)
    check_fingerprints(adapter, {site: tensor.fingerprint() for site, tensor in stored.items()})
    refuse_non_finite(adapter)


def _factors(adapter: Adapter, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    return adapter.tensors[f"{site}.lora_a"], adapter.tensors[f"{site}.lora_b"]


def _fold_stored(
    site: str, adapter: Adapter, tensor: StoredTensor, scratch: Scratch, measured: list[SiteFold], data: memoryview
) -> None:
    """Folds the weight in `data`, and notes what that did."""
    weight = adapter.oriented(site, tensor.view(data))
    factors = _factors(adapter, site)
    measured.append(measure_update(site, adapter.configs[site], weight, *factors, scratch, write=True))


def _write_weights(
    checkpoint: Checkpoint,
    made: Path,
    changes: Mapping[str, Callable[[memoryview], None]],
    heads: Mapping[str, torch.Tensor],
    adapter_sha256: str,
    advance: Callable[[int], object],
) -> dict[str, dict[str, Entry]]:
    """Writes the weight files; returns what each holds. New tensors go into the last file."""
    written: dict[str, dict[str, Entry]] = {}
    files: dict[Path, list[Stretch | bytes]] = {}
    added = [key for key in heads if key not in checkpoint.tensors]
    for file, metadata in checkpoint.files.items():
        entries: dict[str, Entry] = {}
        pieces: list[Stretch | bytes] = []
        held = [tensor for tensor in checkpoint.tensors.values() if tensor.file.name == file]
        for tensor in held:
            if tensor.key not in heads:
                entries[tensor.key] = Entry(tensor.dtype, tensor.shape, tensor.stop - tensor.start)
                _append(pieces, Stretch(tensor.file, tensor.start, tensor.stop, changes.get(tensor.key)))
        for key in [tensor.key for tensor in held if tensor.key in heads] + (
            added if file == max(checkpoint.files) else []
        ):
            entries[key], data = serialise(heads[key])
            pieces.append(data)
        facts = {"format": "pt"} | metadata | {METADATA_KEY: json.dumps({"adapter_sha256": adapter_sha256})}
        files[made / file] = [make_header(entries, facts), *pieces]
        written[file] = entries
    write_edited(files, advance)
    return written


def _append(pieces: list[Stretch | bytes], stretch: Stretch) -> None:
    """Adds a stretch; one that only continues the last one makes it longer."""
    last = pieces[-1] if pieces else None
    if isinstance(last, Stretch) and not last.change and not stretch.change and last.stop == stretch.start:
        pieces[-1] = Stretch(last.source, last.start, stretch.stop)
    else:
        pieces.append(stretch)


def _write_index(
    checkpoint: Checkpoint, made: Path, written: Mapping[str, Mapping[str, Entry]], adapter_sha256: str
) -> None:
    if checkpoint.index is None:
        return
    entries = [entry for held in written.values() for entry in held.values()]
    metadata = checkpoint.index.get("metadata", {}) | {"total_size": sum(entry.size for entry in entries)}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(entry.shape) for entry in entries)
    metadata["melora_adapter_sha256"] = adapter_sha256
    weight_map = {key: file for file, held in written.items() for key in held}
    index = checkpoint.index | {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(made / INDEX_FILE, index)


def _write_config(checkpoint: Checkpoint, made: Path, adapter: Adapter) -> None:
    """Copies config.json; with a trained head, the class that has it and its number of labels stand there."""
    class_name, num_labels = adapter.model.get("class"), adapter.model.get("num_labels")
    if checkpoint.config is None:
        return
    config = dict(checkpoint.config)
    if adapter.kept and class_name:
        config["architectures"] = [class_name]
        if num_labels and num_labels != len(config.get("id2label") or ("", "")):  # two labels where nothing is said
            labels = {index: f"LABEL_{index}" for index in range(num_labels)}
            config |= {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}
    if config == checkpoint.config:
        _copy_file(checkpoint.directory / CONFIG_FILE, made / CONFIG_FILE)
    else:
        _write_json(made / CONFIG_FILE, config)


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = source.open("rb")
    except OSError as error:
        raise MELoRAError(f"`{source}` cannot be read: {error.strerror}") from error
    with file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _other_files(checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """The files to copy as they are, by their paths in the folder, and notes that name the others."""
    copied, weights, hidden = [], [], []
    ours = {*checkpoint.files, CONFIG_FILE, *([INDEX_FILE] if checkpoint.index else [])}
    for path in sorted(checkpoint.directory.iterdir()):
        if path.name in ours:
            continue
        if path.name.startswith("."):
            hidden.append(path.name)
        elif path.is_dir() and path.name not in _OTHER_FOLDERS:
            below = (Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names)
            copied += sorted(file.relative_to(checkpoint.directory) for file in below)
        elif path.is_dir() or path.suffix in _OTHER_WEIGHTS or path.name.endswith(".index.json"):
            weights.append(path.name)
        else:
            copied.append(path.relative_to(checkpoint.directory))
    reasons = {"they hold the base's weights": weights, "they are hidden": hidden}
    return copied, [f"not copied, as {reason}: {', '.join(names)}" for reason, names in reasons.items() if names]


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar on the terminal that is told how many bytes have been written; nothing where there is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield partial(progress.advance, task)
