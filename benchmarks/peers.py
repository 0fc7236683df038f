"""How fast are exported graphs compared with those of optimum-onnx, ONNX Runtime's optimizer, Olive and transformers?

Each side's graph runs in a plain ONNX Runtime session with default options, on one CPU thread. The models are a
classifier on MiniLM-L6 and on MPNet-base (pretrained), a ViT-B/16, and a GPT-2 (124M, without a cache; both random).

The peers are optimum-onnx (the plain export and its levels O1 to O3), `onnxruntime.transformers.optimizer`, the result
of `olive optimize`, and transformers' own exporter (plain and with its fusions). Except for transformers' exporter they
run `peers_environment.py` in a separate environment in --cache, which is created once: optimum-onnx needs
transformers 4. Ours are merged and unmerged graphs, and swappable ones without an adapter.

Each process loads all sides in an order of its own, after 2 GB of ballast (see `decoding`). It checks their outputs
against ours, and times them in turn, in an order drawn for every round. `ratio` is a side's median over the fastest
peer's, as the median over the processes; `over_merged` is over our merged graph's, and has the goals of unmerged and
swappable graphs. The results of each process are kept in --cache. Writes peers.csv, peers.md and a picture for each
model.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .common.cases import Case, Row, run_cases
from .common.kept import MeasuringProcesses
from .common.needs import why_missing
from .common.ratios import ratios_of
from .deployment.peers_graphs import MERGED, OURS, PLAIN, QUICK, SETTINGS, Setting, Workshop
from .deployment.peers_report import write_report

PROCESS_TIMEOUT_S = 1800


def run(options: Namespace) -> int:
    settings = QUICK if options.quick else SETTINGS
    workshop = Workshop(options.cache, has_environment=not options.quick)
    said = f"seconds {options.seconds:g}, processes {options.processes}"
    processes = MeasuringProcesses(options, "deployment.peers_process", said, PROCESS_TIMEOUT_S)

    @functools.cache
    def measured(setting: Setting) -> list[dict[str, Any]]:
        def job(index: int) -> dict[str, Any]:
            graphs = {name: str(path) for name, path in workshop.graphs(setting).items()}
            shapes = [shape._asdict() for shape in setting.shapes]
            return {"graphs": graphs, "shapes": shapes, "seconds": options.seconds, "seed": index}

        return processes.measured(setting.model, job)

    cases = [
        Case(
            f"{setting.model}, {shape.name}",
            functools.partial(rows_of, setting, shape.name, measured, workshop.maker),
            "" if options.quick else why_missing(setting.model, options.cache),
        )
        for setting in settings
        for shape in setting.shapes
    ]
    return run_cases(options, cases, settings=said, write_report=write_report)


def rows_of(
    setting: Setting,
    shape: str,
    measured: Callable[[Setting], Sequence[Mapping[str, Any]]],
    maker: Callable[[str], str],
) -> list[Row]:
    """Returns the rows of a case, one per side; `ratio` is over the fastest peer, `over_merged` over our merged graph.

    Args:
        measured: returns what the processes of a setting printed.
        maker: returns what made the graph of a side.
    """
    found = measured(setting)
    times = [each["milliseconds"][shape] for each in found]
    differences = [each["differences"][shape] for each in found]
    peers = [side for side in times[0] if side not in OURS] or [MERGED]
    best = max(peers, key=lambda peer: ratios_of(MERGED, peer, times)["ratio"])
    plain = PLAIN if PLAIN in times[0] else best
    return [
        {
            "side": side,
            **ratios_of(side, best, times),
            "reference": best,
            "model": setting.model,
            "shape": shape,
            "over_merged": ratios_of(side, MERGED, times)["ratio"],
            "over_plain": ratios_of(side, plain, times)["ratio"],
            "max_rel_difference": max(each[side] for each in differences),
            "made_by": maker(side),
            "processes": len(found),
        }
        for side in times[0]
    ]
