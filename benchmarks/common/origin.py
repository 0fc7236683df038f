"""Says when, on which machines, with which versions and at which commits the rows of a report were measured."""

from collections.abc import Mapping, Sequence

Rows = Sequence[Mapping[str, str]]


def written_by(benchmark: str, rows: Rows) -> str:
    """Returns the first sentence of a report, without its full stop."""
    return f"Written by `python -m benchmarks {benchmark}` from rows of {origin(rows)}"


def origin(rows: Rows) -> str:
    """Returns all days, machines, versions and commits that the rows name."""
    days = sorted({row["time"][:10] for row in rows if row["time"]})
    when = " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "an unknown day"
    made_on = ", and ".join(
        dict.fromkeys(f"{row['device'] or 'an unknown machine'}; {row['versions']}".rstrip("; ") for row in rows)
    )
    commits = sorted({row["commit"] or "unknown" for row in rows})
    return f"{when}: {made_on}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def beside_graphs_of(rows: Rows) -> str:
    """Returns the names and versions of the tools that made the graphs that are not ours."""
    return f"compared with graphs of {', '.join(sorted({row['made_by'] for row in rows} - {'exporters'}))}"
