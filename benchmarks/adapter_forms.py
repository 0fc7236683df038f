"""Which form of an unmerged update is faster on ONNX Runtime's CPU: blocks, or a dense pair of block-diagonal matrices?

MiniLM-L6, adapters in every linear, one thread; the base graph and both forms run in turn. Writes adapter_forms.csv, on
which the rule in `exporters.graph.forms.choose_form` is based. Prints the form that the rule chooses, and what the
better form would have saved.
"""

import functools
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from exporters import OrtRunner, export_onnx
from exporters.graph.forms import choose_form
from exporters.measuring.measure import Contender, measure
from exporters.runtime.graph_inputs import make_inputs

from .common.cases import Case, Row, measured_rows, run_cases
from .common.models import EXAMPLE, build
from .common.needs import why_missing

BLOCKS_AND_RANKS = ((8, 1), (8, 2), (4, 4), (8, 4), (4, 8), (8, 8), (16, 4))
SHAPES = ((1, 16), (8, 16), (8, 64))


def run(options: Namespace) -> int:
    model = "Tiny" if options.quick else "MiniLM-L6"
    with tempfile.TemporaryDirectory() as folder:
        export = functools.lru_cache(maxsize=1)(functools.partial(export_forms, model, Path(folder)))
        cases = [
            Case(
                f"n = {num_blocks}, r = {rank}, {batch} × {sequence}",
                functools.partial(measure_shape, model, export, (num_blocks, rank), (batch, sequence), options.seconds),
                why_missing(model, options.cache),
            )
            for num_blocks, rank in (BLOCKS_AND_RANKS[4:5] if options.quick else BLOCKS_AND_RANKS)
            for batch, sequence in (SHAPES[:1] if options.quick else SHAPES)
        ]
        return run_cases(options, cases, settings=f"seconds {options.seconds:g}", write_report=print_rule)


def export_forms(model: str, folder: Path, num_blocks: int, rank: int) -> dict[str, Path]:
    """Exports the base graph and the unmerged graph in both forms; returns their paths."""
    paths = {form: folder / f"{form}.onnx" for form in ("base", "block", "dense")}
    if not paths["base"].is_file():
        export_onnx(build(model, "base", folder, "", 0, 0), EXAMPLE, paths["base"])
    unmerged = build(model, "unmerged", folder, "all-linear", num_blocks, rank)
    for form in ("block", "dense"):
        export_onnx(unmerged, EXAMPLE, paths[form], adapter="keep", form=form)
    return paths


def measure_shape(
    model: str,
    export: Callable[[int, int], dict[str, Path]],
    adapter: tuple[int, int],
    shape: tuple[int, int],
    seconds: float,
) -> list[Row]:
    """Returns one row for each graph."""
    paths = export(*adapter)

    def load(index: int) -> Sequence[Contender]:
        order = [*paths][index:] + [*paths][:index]
        loaded = {form: Contender(form, OrtRunner(paths[form], threads=1), paths[form]) for form in order}
        return [loaded[form] for form in paths]

    measured = measure(
        load,
        make_inputs(OrtRunner(paths["base"]), *shape),
        provider="cpu",
        model=model,
        batch=shape[0],
        sequence=shape[1],
        rounds=300,
        max_seconds=seconds,
    )
    return measured_rows(measured, {"num_blocks": adapter[0], "rank": adapter[1]})


def print_rule(rows: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Prints the rule's choice for each case, and how much slower it is than the better form."""
    for name in dict.fromkeys(row["case"] for row in rows):
        found = [row for row in rows if row["case"] == name]
        ratios = {row["side"]: float(row["ratio"]) for row in found if row["side"] != "base"}
        facts = {key: int(found[0][key]) for key in ("num_blocks", "rank", "batch", "sequence")}
        pick = choose_form(facts["num_blocks"], facts["rank"], facts["batch"] * facts["sequence"])
        excess = ratios[pick] / min(ratios.values()) - 1
        print(
            f"{name}: block {ratios['block']:.2f}, dense {ratios['dense']:.2f}; the rule chooses {pick}"
            + (f", {excess:.0%} slower" if excess > 0.005 else "")
        )
