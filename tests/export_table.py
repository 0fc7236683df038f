"""The table in docs/EXPORT.md from exports that have been compared with torch: `python tests/export_table.py`."""

import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
import transformers
from support import fill
from zoo import ZOO, build

import melora_fx
from exporters import export_onnx
from melora_fx import MELoRAConfig, MELoRAError

PAGE = Path(__file__).parent.parent / "docs" / "EXPORT.md"
CONFIG = MELoRAConfig(rank=2, num_blocks=3, alpha=2)
MODELS = ("BERT", "MPNet", "GPT-2", "Llama", "T5", "ViT", "nn.TransformerEncoder")
WITH_UNMERGED = ("BERT", "Llama")
VARIANTS = (
    ("portable", "fp32"), ("ort-cpu", "fp32"), ("ort-cuda", "fp16"), ("tensorrt", "fp32"), ("tensorrt", "fp16"),
)  # fmt: skip
_START, _END = "<!-- table -->", "<!-- end of table -->"
_COLUMNS = ("model", "target", "precision", "adapter", "nodes", "ONNX Runtime's own operators", "error")


@dataclass(frozen=True)
class Case:
    """One export: `adapter` as for `export_onnx`."""

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
    """What came out: the number of nodes, ONNX Runtime's own operators among them, and the error against torch.

    `as_base`: a merged graph has the operators of the base's export, one for one.
    """

    nodes: int
    runtime_ops: tuple[str, ...]
    error: float
    as_base: bool


def cases() -> list[Case]:
    """Every model merged for every target; some unmerged and swappable, too."""
    adapters = {name: ("fold", "keep", "swap") if name in WITH_UNMERGED else ("fold",) for name in MODELS}
    return [
        Case(model, target, precision, adapter)
        for model in MODELS
        for target, precision in VARIANTS
        for adapter in adapters[model]
        if (target, adapter) != ("tensorrt", "swap")
    ]


def measure(case: Case, folder: Path) -> Row | str:
    """Exports, with the comparison at several sizes; the first line of the refusal where it is refused."""
    model, inputs = build(case.model)
    options = {"target": case.target, "precision": case.precision}
    try:
        base = export_onnx(model, inputs, folder / "base.onnx", **options, verify=False)
        whole = ZOO[case.model].in_place == 0
        model = melora_fx.rewrite(model, "all-linear", CONFIG, example_inputs=inputs if whole else None)
        report = export_onnx(fill(model), inputs, folder / "out.onnx", adapter=case.adapter, **options)
    except MELoRAError as error:
        return str(error).splitlines()[0]
    graph = onnx.load(report.path, load_external_data=False).graph
    own = {node.op_type for node in graph.node if node.domain or node.op_type.startswith("Simplified")}
    assert report.max_rel_error is not None
    as_base = case.adapter == "fold" and report.op_counts == base.op_counts
    return Row(report.num_nodes, tuple(sorted(own)), report.max_rel_error, as_base)


def line(case: Case, row: Row | str) -> str:
    """The table's line."""
    cells = [f"`{case.model}`", *case.key[1:]]
    if isinstance(row, str):
        return f"| {' | '.join([*cells, '', 'refused', row])} |"
    nodes = f"{row.nodes}, as the base" if row.as_base else str(row.nodes)
    return f"| {' | '.join([*cells, nodes, ', '.join(row.runtime_ops) or '–', f'{row.error:.0e}'])} |"


def documented() -> dict[tuple[str, ...], list[str]]:
    """(model, target, precision, adapter) → the other cells, as the page has them."""
    rows = [row.split("|")[1:-1] for row in PAGE.read_text().split(_START)[1].splitlines() if row.startswith("| `")]
    cells = [[cell.strip().strip("`") for cell in row] for row in rows]
    return {tuple(row[:4]): row[4:] for row in cells}


def main() -> None:
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for case in cases():
        with tempfile.TemporaryDirectory() as folder:
            lines.append(line(case, measure(case, Path(folder))))
        print(lines[-1], file=sys.stderr, flush=True)
    before, _, rest = PAGE.read_text().partition(_START)
    PAGE.write_text("\n".join([before + _START, *lines, _END]) + rest.partition(_END)[2])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main()
