"""`fold_checkpoint`: merges an adapter into a checkpoint on disk, at about the speed of copying it.

No model is loaded. Each weight file is copied, and the weights that the adapter changes are changed on the way.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from melora_fx.adapter.update import Scratch
from melora_fx.files import new_folder, output_path, refuse_occupied, refuse_source
from melora_fx.names import default_labels
from melora_fx.progress import show_progress
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import read_adapter
from melora_fx.saving.tensor_file import Entry, make_header, serialise

from .checkpoint import CONFIG_FILE, FOLDED_KEY, INDEX_FILE, Checkpoint, StoredTensor, open_checkpoint
from .checkpoint_plan import plan_fold
from .edited_copy import Stretch, write_edited
from .measured_fold import fold_and_measure
from .other_files import copy_file, find_other_files
from .report import FoldReport, SiteFold, make_report


def fold_checkpoint(
    base_dir: str | os.PathLike[str], adapter_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]
) -> FoldReport:
    """Merges an adapter into a Hugging Face checkpoint on disk, and writes a new folder; the base is not changed.

    The base is one safetensors file, or several with an index. All other files are copied, except files with the base's
    weights in other forms, hidden files, and links to folders above them; the report names those. A trained head is
    written into the weights and config.json. A process that is killed leaves no `out_dir`, only a hidden folder next to
    it, which the next fold to this place removes. A folded checkpoint cannot be unfolded: keep the base.

    Peak memory is that of a few of the largest weights that the adapter changes.

    Args:
        base_dir: the checkpoint that the adapter was trained on, in any floating-point dtype.
        adapter_dir: a folder written by `save_adapter`.
        out_dir: the folder to write; it must be empty or missing.

    Returns:
        What was lost to rounding to the checkpoint's dtype, site by site. Warns if a site loses more than a quarter of
        its adapter.

    Raises:
        MELoRAError: if the checkpoint or the adapter cannot be read, they belong to different models, the checkpoint
            already contains an adapter, a weight is tied, quantised or stored in another form, the adapter or a sum is
            not finite, or `out_dir` cannot be written. Nothing is written then.
        ValueError: if `out_dir` is "".
    """
    base = Path(base_dir)
    out = output_path(out_dir)
    adapter = read_adapter(adapter_dir)
    checkpoint = open_checkpoint(base)
    refuse_source(out, base)
    refuse_occupied(out)
    plan = plan_fold(checkpoint, adapter)
    copied, notes = find_other_files(checkpoint)
    measured: list[SiteFold] = []
    scratch = Scratch()
    changes = {
        tensor.key: partial(_fold_bytes, name, adapter, tensor, scratch, measured)
        for name, tensor in plan.weights.items()
    }
    total = sum(file.stat().st_size for file in (base / name for name in checkpoint.files))
    sha256 = adapter.sha256
    with new_folder(out) as made, show_progress(f"folding {out.name}", total, in_bytes=True) as show:
        for name in copied:
            copy_file(base / name, made / name)
        written = _write_weights(checkpoint, made, changes, plan.heads, sha256, lambda count: show(advance=count))
        _write_index(checkpoint, made, written, sha256)
        _write_config(checkpoint, made, adapter)
    return make_report(measured, sha256, notes)


def _fold_bytes(
    site: str, adapter: Adapter, tensor: StoredTensor, scratch: Scratch, measured: list[SiteFold], data: memoryview
) -> None:
    """Folds the weight in `data` in place, and appends what that did to `measured`."""
    measured.append(fold_and_measure(site, adapter, tensor.view(data), scratch))


def _write_weights(
    checkpoint: Checkpoint,
    made: Path,
    changes: Mapping[str, Callable[[memoryview], None]],
    heads: Mapping[str, torch.Tensor],
    adapter_sha256: str,
    advance: Callable[[int], object],
) -> dict[str, dict[str, Entry]]:
    """Writes the weight files, and returns the entries of each. New tensors go into the last file."""
    written: dict[str, dict[str, Entry]] = {}
    files: dict[Path, list[Stretch | bytes]] = {}
    new_keys = [key for key in heads if key not in checkpoint.tensors]
    last_file = max(checkpoint.files)
    for file, metadata in checkpoint.files.items():
        held = [tensor for tensor in checkpoint.tensors.values() if tensor.file.name == file]
        keys = [tensor.key for tensor in held if tensor.key in heads]
        if file == last_file:
            keys += new_keys
        own_heads = {key: heads[key] for key in keys}
        entries, pieces = _lay_out([tensor for tensor in held if tensor.key not in heads], changes, own_heads)
        facts = {"format": "pt"} | metadata | {FOLDED_KEY: json.dumps({"adapter_sha256": adapter_sha256})}
        files[made / file] = [make_header(entries, facts), *pieces]
        written[file] = entries
    with _a_core_for_the_writer():
        write_edited(files, advance)
    return written


@contextmanager
def _a_core_for_the_writer() -> Iterator[None]:
    """Leaves one core to the thread that writes. Torch's threads wait for each other at every tile, so a thread that
    shares its core with the writer delays all of them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _lay_out(
    stored: Sequence[StoredTensor],
    changes: Mapping[str, Callable[[memoryview], None]],
    heads: Mapping[str, torch.Tensor],
) -> tuple[dict[str, Entry], list[Stretch | bytes]]:
    """Returns the entries and pieces of one file: tensors of the base, changed or unchanged, and heads after them."""
    entries: dict[str, Entry] = {}
    pieces: list[Stretch | bytes] = []
    for tensor in stored:
        entries[tensor.key] = Entry(tensor.dtype, tensor.shape, tensor.stop - tensor.start)
        _append(pieces, Stretch(tensor.file, tensor.start, tensor.stop, changes.get(tensor.key)))
    for key, head in heads.items():
        entries[key], data = serialise(head)
        pieces.append(data)
    return entries, pieces


def _append(pieces: list[Stretch | bytes], stretch: Stretch) -> None:
    """Adds a byte range; one that continues the last one is merged with it if neither changes."""
    last = pieces[-1] if pieces else None
    if isinstance(last, Stretch) and not last.change and not stretch.change and last.stop == stretch.start:
        pieces[-1] = Stretch(last.source, last.start, stretch.stop)
    else:
        pieces.append(stretch)


def _write_index(
    checkpoint: Checkpoint, made: Path, written: Mapping[str, Mapping[str, Entry]], adapter_sha256: str
) -> None:
    """Writes the index if the checkpoint has one."""
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
    """Copies config.json with the labels, the padding token and, for a trained head, the model class of the adapter."""
    if checkpoint.config is None:
        return
    class_name = adapter.model.get("class")
    num_labels = adapter.model.get("num_labels")
    pad_token_id = adapter.model.get("pad_token_id")
    config = dict(checkpoint.config)
    labels = adapter.model.get("labels") or []
    if adapter.kept and class_name:
        config["architectures"] = [class_name]
        if num_labels and num_labels != len(config.get("id2label") or ("", "")):  # by default there are two labels
            labels = labels or default_labels(num_labels)
    names = {str(index): label for index, label in enumerate(labels)}
    if labels and names != config.get("id2label"):
        config |= {"id2label": names, "label2id": {label: index for index, label in enumerate(labels)}}
    if pad_token_id is not None and pad_token_id != config.get("pad_token_id"):
        config["pad_token_id"] = pad_token_id
    if config == checkpoint.config:
        copy_file(checkpoint.directory / CONFIG_FILE, made / CONFIG_FILE)
    else:
        _write_json(made / CONFIG_FILE, config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
