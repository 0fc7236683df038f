"""Which form of an unmerged update is faster on ONNX Runtime's CPU: blocks, or a dense pair of block-diagonal matrices?

    python benchmarks/adapter_forms.py [--seconds 12]

MiniLM-L6, adapters in every linear, one thread; the base graph and both forms run in turn. Writes
benchmarks/results/adapter_forms.csv, which the rule in `exporters.graph.forms.choose_form` stands on, and prints what
that rule picks and what the better pick would have saved.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latency_models import EXAMPLE, build

from exporters import OrtRunner, export_onnx
from exporters.graph.forms import choose_form
from exporters.measuring.measure import Contender, Measurement, measure
from exporters.measuring.tables import write_csv
from exporters.runtime.graph_inputs import make_inputs

RESULTS = Path(__file__).parent / "results" / "adapter_forms.csv"
BLOCKS_AND_RANKS = ((8, 1), (8, 2), (4, 4), (8, 4), (4, 8), (8, 8), (16, 4))
SHAPES = ((1, 16), (8, 16), (8, 64))
COLUMNS = ["num_blocks", "rank", *Measurement.__dataclass_fields__]


def export_forms(folder: Path, num_blocks: int, rank: int) -> dict[str, Path]:
    """The base graph and the two forms of an unmerged one."""
    paths = {form: folder / f"{form}.onnx" for form in ("base", "block", "dense")}
    if not paths["base"].is_file():
        export_onnx(build("MiniLM-L6", "base", folder, "", 0, 0), EXAMPLE, paths["base"], verify=False)
    model = build("MiniLM-L6", "unmerged", folder, "all-linear", num_blocks, rank)
    for form in ("block", "dense"):
        export_onnx(model, EXAMPLE, paths[form], adapter="keep", form=form, verify=False)
    return paths


def measure_shape(paths: dict[str, Path], batch: int, sequence: int, seconds: float) -> list[Measurement]:
    """One row for each graph."""

    def load(index: int) -> Sequence[Contender]:
        order = [*paths][index:] + [*paths][:index]
        loaded = {form: Contender(form, OrtRunner(paths[form], threads=1), paths[form]) for form in order}
        return [loaded[form] for form in paths]

    return measure(
        load,
        make_inputs(OrtRunner(paths["base"]), batch, sequence),
        provider="cpu",
        model="MiniLM-L6",
        batch=batch,
        sequence=sequence,
        rounds=300,
        max_seconds=seconds,
    )


def print_rule(num_blocks: int, rank: int, block: Measurement, dense: Measurement) -> None:
    """The rule's pick for a measurement, and the excess of its time over the better form's."""
    ratios = {"block": block.ratio, "dense": dense.ratio}
    pick = choose_form(num_blocks, rank, block.batch * block.sequence)
    excess = ratios[pick] / min(ratios.values()) - 1
    print(
        f"n = {num_blocks:2}, r = {rank}, {block.batch} × {block.sequence:3}: "
        f"block {block.ratio:.2f}, dense {dense.ratio:.2f}; the rule takes {pick}"
        + (f", {excess:.0%} slower" if excess > 0.005 else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=12.0, help="timing of one shape, of three loads")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for num_blocks, rank in BLOCKS_AND_RANKS:
            paths = export_forms(Path(folder), num_blocks, rank)
            for batch, sequence in SHAPES:
                measured = measure_shape(paths, batch, sequence, arguments.seconds)
                rows += [{"num_blocks": num_blocks, "rank": rank} | asdict(row) for row in measured]
                write_csv(rows, COLUMNS, RESULTS)
                print_rule(num_blocks, rank, *measured[1:])


if __name__ == "__main__":
    main()
