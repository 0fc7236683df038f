"""Formats rows as lines with aligned columns, for the texts of reports."""

from collections.abc import Collection, Sequence


def table(rows: Sequence[Sequence[str]], right: Collection[int] = (), max_width: int | None = None) -> list[str]:
    """Returns one line per row, without trailing spaces.

    Args:
        rows: the cells; all rows have the same number of cells.
        right: the indices of the columns that are right-aligned, as for numbers.
        max_width: the largest width of a line, in characters. Long cells of the first column lose their beginning.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if max_width is not None:
        widths[0] = min(widths[0], max_width - sum(widths[1:]) - 2 * (len(widths) - 1))
    rows = [(name if len(name) <= widths[0] else "…" + name[1 - widths[0] :], *rest) for name, *rest in rows]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
