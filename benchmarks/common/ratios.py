"""Times of several processes relative to a reference: as columns of a CSV file, and as the table of a picture."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from exporters import Latency, LatencyTable

from .cases import Row


def ratios_of(side: str, reference: str, times: Sequence[Mapping[str, Sequence[float]]]) -> Row:
    """Returns the columns of a side's times, all computed from the medians of the processes.

    `times`: for each process, the milliseconds by side.
    """
    medians = np.array([np.median(each[side]) for each in times])
    ratios = medians / np.array([np.median(each[reference]) for each in times])
    names = (("median_ms", "p20_ms", "p80_ms"), ("ratio", "ratio_p20", "ratio_p80"))
    columns: Row = {}
    for three, values in zip(names, (medians, ratios), strict=True):
        columns |= dict(zip(three, np.percentile(values, (50, 20, 80)).round(4).tolist(), strict=True))
    return columns | {"rounds": sum(len(each[side]) for each in times)}


def ratio_table(rows: Mapping[str, Mapping[str, str]], sides: Iterable[str]) -> LatencyTable:
    """Returns some sides of a case as `plot_latency` accepts them, with bars for p20 and p80 of the ratios.

    `rows`: those of the case by side, as read from a CSV file.
    """
    reference = next(iter(rows.values()))["reference"]
    base = float(rows[reference]["median_ms"])
    return LatencyTable(
        tuple(
            Latency(
                name=side,
                median_ms=base * float(rows[side]["ratio"]),
                p20_ms=base * float(rows[side]["ratio_p20"]),
                p80_ms=base * float(rows[side]["ratio_p80"]),
                ratio=float(rows[side]["ratio"]),
                rounds=int(rows[side]["rounds"]),
                threads=1,
            )
            for side in sides
        )
    )
