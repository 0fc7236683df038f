"""What adapters learn, and what a user gets from the base model to a served graph."""

from collections.abc import Sequence

from benchmarks import glue_study, language_study
from benchmarks.deployment.end_to_end_cells import PEFT_SIDE, spread
from benchmarks.studies.comparisons import progress, seeds_of
from benchmarks.studies.report import conclusions, differences_table
from exporters.measuring.tables import markdown_table

from .block import Rows
from .words import by_case, machine, number, paragraph


def studies(rows: Rows) -> list[str]:
    """The differences between adapters, with what the intervals allow to say; `rows`: of either study."""
    study = next(
        each
        for each in (glue_study.STUDY, language_study.STUDY)
        if any(row["task"] in (*each.tasks, each.choice) for row in rows)
    )
    done, planned = progress(study, rows)
    if done < planned:
        return [f"*`python -m benchmarks {study.name}` is under way: {done} of {planned} trainings are there.*"]
    lead = {
        "glue_study": f"MiniLM-L6 on {len(study.tasks)} tasks of GLUE",
        "language_study": "SmolLM2-135M on documentation, the held-out loss of a token",
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
    """Points of a list, and the paragraph below, in the width of a page."""
    return [part for line in lines for part in (paragraph(line) if line and not line.startswith("*") else [line])]


def end_to_end(rows: Rows) -> list[str]:
    """One line a side, over PEFT and optimum-onnx, not compiled."""
    headings = [
        "",
        "side",
        "training",
        "peak memory",
        "adapter alone",
        "export",
        "1 × 32",
        "8 × 64",
        "quality",
    ]
    names = ("training_ratio", "peak_ratio", "adapter_alone_ratio", "export_ratio", "ratio_1x32", "ratio_8x64")
    lines = []
    for case, sides in by_case(rows).items():
        theirs = number(sides[PEFT_SIDE], "quality_mean")
        for side, row in sides.items():
            if side != PEFT_SIDE:
                cells = [spread(row, name) for name in names]
                quality = f"{row['quality']} {theirs:.3f} → {number(row, 'quality_mean'):.3f}"
                lines.append([case, side, *cells, quality])
    rounds = next(iter(rows))["rounds"]
    text = (
        "From the base model to a merged graph on ONNX Runtime, over PEFT's LoRA of rank 8, not compiled, with "
        f"optimum-onnx, which does not optimize its graph: the median of {rounds} rounds, the least and the largest "
        f"({machine(rows)}; [times, sizes, and what each column holds](benchmarks/results/end_to_end.md)). Two of our "
        "three sides train as many parameters as PEFT. Quality, from PEFT's to its own, is without an interval; of "
        "a loss, lower is better:"
    )
    return [*paragraph(text), "", *markdown_table(headings, lines, text_columns=2)]
