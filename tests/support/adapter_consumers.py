"""All functions that read an adapter folder, on one small base in every form: a model, a checkpoint, two graphs."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
from safetensors.torch import save_file

import melora_fx
from exporters import OrtRunner, fold_onnx, write_ort_adapter
from support.exports import Exports
from support.models import adapted_kept_tower, kept_tower, randn

INPUTS = {"x": randn(2, 24)}


@dataclass(frozen=True)
class Bases:
    """The base in every form: a checkpoint's folder, its graph, and a graph with swappable adapters."""

    checkpoint: Path
    base: Path
    swap: Path

    @classmethod
    def write(cls, folder: Path, exports: Exports) -> "Bases":
        save_file(kept_tower().state_dict(), folder / "model.safetensors", {"format": "pt"})
        base, swap = exports("kept tower"), exports("adapted kept tower", adapter="swap")
        return cls(folder, Path(base.path), Path(swap.path))

    def copied(self, folder: Path) -> "Bases":
        """Returns the bases with copies of the graphs, which can be changed."""
        graphs = [folder / graph.parent.name / graph.name for graph in (self.base, self.swap)]
        for graph, copy in zip((self.base, self.swap), graphs, strict=True):
            shutil.copytree(graph.parent, copy.parent)
        return Bases(self.checkpoint, *graphs)


def _load_into_plain(bases: Bases, adapter: Path, out: Path) -> None:
    melora_fx.load_adapter(kept_tower(), adapter)


def _load_into_rewritten(bases: Bases, adapter: Path, out: Path) -> None:
    melora_fx.load_adapter(adapted_kept_tower(1), adapter)


def _fold_checkpoint(bases: Bases, adapter: Path, out: Path) -> None:
    melora_fx.fold_checkpoint(bases.checkpoint, adapter, out / "folded")


def _fold_onnx(bases: Bases, adapter: Path, out: Path) -> None:
    fold_onnx(bases.base, adapter, out / "folded.onnx")


def _swap(bases: Bases, adapter: Path, out: Path) -> None:
    OrtRunner(bases.swap).run(INPUTS, adapter=adapter)


def _write_ort_adapter(bases: Bases, adapter: Path, out: Path) -> None:
    write_ort_adapter(adapter, bases.swap, out / "written.onnx_adapter")


CONSUMERS: dict[str, Callable[[Bases, Path, Path], None]] = {
    "load_adapter": _load_into_plain,
    "load_adapter, rewritten": _load_into_rewritten,
    "fold_checkpoint": _fold_checkpoint,
    "fold_onnx": _fold_onnx,
    "OrtRunner": _swap,
    "write_ort_adapter": _write_ort_adapter,
}
"""Maps a name to a function that reads the adapter in a folder and writes its output, if any, to another folder."""


def set_description(graph: Path, text: str) -> None:
    """Rewrites the graph's file with another description, its metadata `melora`."""
    model = onnx.load(graph, load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == "melora":
            entry.value = text
    onnx.save(model, graph)


def description(graph: Path) -> str:
    model = onnx.load(graph, load_external_data=False)
    return next(entry.value for entry in model.metadata_props if entry.key == "melora")
