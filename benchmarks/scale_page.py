"""The generated tables of docs/SCALE.md: `python -m benchmarks.scale_page` writes them anew."""

from collections.abc import Mapping, Sequence

from exporters.measuring.tables import read_csv

from .checkout import ROOT
from .processes import processes_table
from .scale_model import scale_table

PAGE = ROOT / "docs" / "SCALE.md"
_END = "<!-- end -->"


def tables(rows: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The lines of each, by how the comment before it begins; `rows`: of processes.csv."""
    return {"<!-- measured": processes_table(rows), "<!-- on paper": scale_table()}


def with_tables(page: str, found: Mapping[str, Sequence[str]]) -> str:
    """The text of a page with these tables."""
    for start, lines in found.items():
        head, begin, rest = page.partition(start)
        first, _, tail = rest.partition("\n")
        _, end, behind = tail.partition(_END)
        page = f"{head}{begin}{first}\n" + "\n".join(lines) + f"\n{end}{behind}"
    return page


if __name__ == "__main__":
    rows = read_csv(ROOT / "benchmarks" / "results" / "processes.csv")
    PAGE.write_text(with_tables(PAGE.read_text(), tables(rows)))
