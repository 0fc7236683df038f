"""Blocks about what adapters learn, and about the way from the base model to a served graph."""

from collections.abc import Sequence

from benchmarks import glue_study, language_study
from benchmarks.deployment.end_to_end_cells import PEFT_SIDE, spread
from benchmarks.studies.comparisons import progress, seeds_of
from benchmarks.studies.report import conclusions, differences_table
from exporters.measuring.tables import markdown_table

from .block import Rows
from .words import by_case, machine, number, paragraph


def studies(rows: Rows) -> list[str]:
    """Returns the differences between adapters, and the conclusions from them. `rows`: those of either study."""
    study = next(
        each
        for each in (glue_study.STUDY, language_study.STUDY)
        if any(row["task"] in (*each.tasks, each.choice) for row in rows)
    )
    done, planned = progress(study, rows)
    if done < planned:
        return [f"*`python -m benchmarks {study.name}` is in progress: {done} of {planned} trainings are done.*"]
    lead = {
        "glue_study": f"MiniLM-L6 on {len(study.tasks)} tasks of GLUE",
        "language_study": "SmolLM2-135M on documentation, held-out loss per token",
    }
    text = f"{lead[study.name]}, {seeds_of(study, rows)}: mean difference (95 % interval), in {study.unit}."
    short = study._replace(comparisons=[each for each in study.comparisons if each.is_drawn])
    return [
        *paragraph(f"{text} {study.beside}"),
        "",
        *differences_table(short, rows),
        "",
        *_wrapped(conclusions(short, rows)),
    ]


def _wrapped(lines: Sequence[str]) -> list[str]:
    """Returns the points of a list unchanged, and the paragraph below them in the width of a page."""
    return [part for line in lines for part in (paragraph(line) if line and not line.startswith("*") else [line])]


def end_to_end(rows: Rows) -> list[str]:
    """Returns one line per side, relative to PEFT, not compiled, with optimum-onnx."""
    headings = [
        "",
        "side",
        "quality",
        "training",
        "peak memory",
        "adapter alone",
        "export",
        "1 × 32",
        "8 × 64",
    ]
    names = ("training_ratio", "peak_ratio", "adapter_alone_ratio", "export_ratio", "ratio_1x32", "ratio_8x64")
    lines = []
    for case, sides in by_case(rows).items():
        theirs = number(sides[PEFT_SIDE], "quality_mean")
        for side, row in sides.items():
            if side != PEFT_SIDE:
                cells = [spread(row, name) for name in names]
                quality = f"{theirs:.3f} → {number(row, 'quality_mean'):.3f}"
                lines.append([f"{case}, {row['quality']}", side, quality, *cells])
    rounds = next(iter(rows))["rounds"]
    text = (
        "From the base model to a merged graph on ONNX Runtime, relative to PEFT's LoRA of rank 8, not compiled, with "
        f"optimum-onnx, which does not optimize its graph: median, smallest and largest ratio of {rounds} rounds "
        f"({machine(rows)}; [times, sizes, and the meaning of the columns](../benchmarks/results/end_to_end.md)). Two "
        "of our three sides train as many parameters as PEFT. Quality is shown as PEFT's → the side's, without an "
        "interval; a lower loss is better:"
    )
    return [*paragraph(text), "", *markdown_table(headings, lines, text_columns=2)]
