"""Writes tables and pictures of the results: `python -m benchmarks gpu --report FOLDER`.

The lines of FOLDER are added to the existing ones; the last line of each case on each device stays.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.checkout import DONE, MISUSED
from benchmarks.deployment.latency_report import latency_table, table_of
from benchmarks.training.train_report import plot_steps, steps_table
from exporters.measuring.plots import format_ms, plot_latency
from exporters.measuring.tables import markdown_table
from melora_fx.files import write_atomically
from melora_fx.versions import source_commit

from .parts import PARTS, Part, part_named
from .rows import BEGUN, PASSED, Line, append, read

Row = dict[str, str]
_INTRODUCTION = """\
Written by `python -m benchmarks gpu --report FOLDER` from the results of `python -m benchmarks gpu`: the JSON lines
next to this page, one per case. All models are random ones in the shapes of known models."""


def write_report(folder: Path, out: Path) -> int:
    """Writes gpu.md, pictures and the lines into `out`; returns an exit status."""
    found = {part: _joined(part, folder, out) for part in PARTS}
    if not any(found.values()):
        print(f"no results in `{folder}`: run `python -m benchmarks gpu --out {folder}` first")
        return MISUSED
    out.mkdir(parents=True, exist_ok=True)
    for part, lines in found.items():
        if lines:
            _write_lines(lines, part.file(out))
    devices = dict.fromkeys(line["device"] for lines in found.values() for line in lines)
    text = ["# On a GPU", "", _INTRODUCTION]
    for device in devices:
        of_device = {part: [line for line in lines if line["device"] == device] for part, lines in found.items()}
        text += ["", f"## {device}", *_origins(of_device.values())]
        for part, lines in of_device.items():
            if lines:
                text += ["", f"### {part.name}", "", part.question, "", *_section(part, lines, out)]
    (out / "gpu.md").write_text("\n".join(text) + "\n")
    print(f"see {out / 'gpu.md'}")
    return DONE


def _joined(part: Part, folder: Path, out: Path) -> list[Line]:
    """Returns, for each case on each device, the last line that says how it ended."""
    lines = [*read(part.file(out)), *(read(part.file(folder)) if folder != out else ())]
    return list({(line["case"], line["device"]): line for line in lines if line["outcome"] != BEGUN}.values())


def _write_lines(lines: Iterable[Line], path: Path) -> None:
    def write(temporary: Path) -> None:
        for line in lines:
            append(temporary, line | {"commit": line["commit"] or _commit_of(line)})

    write_atomically(path, write)


def _commit_of(line: Line) -> str:
    """Returns the commit of a line that was written without a repository: this one's if the code is the same."""
    return source_commit() if line["source"] == part_named(line["part"]).digest else ""


def _origins(found: Iterable[Sequence[Line]]) -> Iterator[str]:
    """Yields the origins of the lines, each once with its number of cases."""
    kinds = Counter(
        "; ".join([line["time"][:10], f"driver {line['driver']}", line["versions"], _where(line)])
        + (", a dry run: nothing is timed" if line["settings"] else "")
        for lines in found
        for line in lines
    )
    yield ""
    yield from (f"* {count} cases: {kind}" for kind, count in kinds.items())


def _where(line: Line) -> str:
    return f"commit {line['commit']}" if line["commit"] else f"source {line['source']}"


def _section(part: Part, lines: Sequence[Line], out: Path) -> Iterator[str]:
    """Yields the results of a part: the number of cases, those that did not pass, and its tables."""
    counts = Counter(line["outcome"] for line in lines)
    yield ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + "."
    if others := [(line["case"], line["outcome"], line.get("reason", "")) for line in lines if _has_not_passed(line)]:
        yield from ["", *markdown_table(("case", "outcome", "why"), map(_escaped, others), text_columns=3)]
    groups = {line["case"]: _rows(line) for line in lines if line.get("sides")}
    timed = {case: rows for case, rows in groups.items() if rows and rows[0].get("median_ms")}
    slug = re.sub(r"[^a-z0-9]+", "-", lines[0]["device"].partition(",")[0].lower()).strip("-")
    if part.name == "sessions" and groups:
        yield from ["", *_differences(groups)]
    elif part.name == "train" and timed:
        plot_steps(timed, out / f"train-{slug}.png")
        yield from ["", f"![steps](train-{slug}.png)", "", *steps_table(timed)]
    elif part.name == "latency" and timed:
        panels = {case: table_of(rows) for case, rows in timed.items()}
        plot_latency(panels, f"float16, n = 8 and r = 8 ({lines[0]['device']})", out / f"latency-{slug}.png")
        yield from ["", f"![latencies](latency-{slug}.png)", "", *latency_table(timed)]
    elif part.name == "fold" and timed:
        yield from ["", *_folds(timed)]


def _has_not_passed(line: Line) -> bool:
    return line["outcome"] != PASSED


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]


def _rows(line: Line) -> list[Row]:
    """Returns the sides of a case that have not failed, as if read from a CSV file."""
    sides = [side for side in line["sides"] if "reason" not in side]
    return [{"case": line["case"]} | {name: _text(value) for name, value in side.items()} for side in sides]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _differences(groups: Mapping[str, Sequence[Row]]) -> list[str]:
    lines = [
        (case, row["side"], f"{float(row['difference']):.1e}", f"{float(row['tolerance']):g}")
        for case, rows in groups.items()
        for row in rows
    ]
    return markdown_table(("graph", "what", "difference", "at most"), lines, text_columns=2)


def _folds(groups: Mapping[str, Sequence[Row]]) -> list[str]:
    lines = [
        (
            case,
            row["side"],
            format_ms(float(row["median_ms"])),
            f"{format_ms(float(row['p20_ms']))}–{format_ms(float(row['p80_ms']))}",
            f"{float(row['ratio']):.3f}",
            row["gib_per_s"],
        )
        for case, rows in groups.items()
        for row in rows
    ]
    return markdown_table(("case", "side", "ms", "p20–p80", "over PEFT's", "GiB/s"), lines, text_columns=2)
