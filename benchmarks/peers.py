"""How fast are exported graphs beside those of others: optimum-onnx, ONNX Runtime's optimizer, Olive, transformers?

Each side's graph runs in a plain session of ONNX Runtime with its default options, on one thread of a CPU. A classifier
on MiniLM-L6 and on MPNet-base (pretrained), a ViT-B/16 and a GPT-2 (124M, without a cache; both random). The peers make
their graphs in an environment of their own in --cache, since optimum-onnx needs transformers 4: `peers_environment.py`
runs there, and installs nothing where it is there already. Of optimum-onnx there is the plain export and its levels O1
to O3; of ONNX Runtime `onnxruntime.transformers.optimizer`; of Olive what `olive optimize` gives; of transformers its
own exporter, plain and with its fusions. Ours are merged, unmerged and swappable ones without an adapter.

Each process loads all sides in an order of its own, behind 2 GB of ballast (see `decoding`), checks their outputs
against ours, and times them in turn, in an order drawn for every round. A ratio is the median over the processes of a
side's median over the fastest peer's; those of unmerged and swappable graphs are over our merged one's. What a process
has measured is kept in --cache. Writes peers.csv, peers.md and a picture for each model.
"""

import functools
import hashlib
import json
import shutil
from argparse import Namespace
from typing import Any

import numpy as np

from exporters.measuring.machine import origin_columns

from .cases import Case, Row, run_apart, run_cases
from .checkout import source_digest
from .needs import why_missing
from .peers_graphs import MERGED, OURS, PLAIN, QUICK, SETTINGS, Setting, Workshop
from .peers_report import write_report

PROCESS_TIMEOUT_S = 1800


def run(options: Namespace) -> int:
    settings = QUICK if options.quick else SETTINGS
    workshop = Workshop(options.cache, has_environment=not options.quick)
    said = f"seconds {options.seconds:g}, processes {options.processes}"
    processes = Processes(options, workshop, said)
    cases = [
        Case(
            f"{setting.model}, {shape.name}",
            functools.partial(rows_of, setting, shape.name, processes),
            "" if options.quick else why_missing(setting.model, options.cache),
        )
        for setting in settings
        for shape in setting.shapes
    ]
    return run_cases(options, cases, settings=said, write_report=write_report)


class Processes:
    """What the processes of each model have measured, on disk as soon as it is there."""

    def __init__(self, options: Namespace, workshop: Workshop, settings: str) -> None:
        self._options = options
        self.workshop = workshop
        origin = origin_columns("cpu", "peft")
        facts = [settings, source_digest(), origin["versions"], origin["device"]]
        self._folder = options.cache / f"peers-{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:12]}"
        if options.again and not options.report_only:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.of = functools.cache(self._of)

    def _of(self, setting: Setting) -> list[dict[str, Any]]:
        """What each process printed; those that have not run yet run now."""
        self._folder.mkdir(parents=True, exist_ok=True)
        files = [self._folder / f"{setting.model}-{index}.json" for index in range(self._options.processes)]
        for index, file in enumerate(files):
            if not file.is_file():
                job = {
                    "graphs": {name: str(path) for name, path in self.workshop.graphs(setting).items()},
                    "shapes": [shape._asdict() for shape in setting.shapes],
                    "seconds": self._options.seconds,
                    "seed": index,
                }
                print(f"    process {index + 1} of {len(files)} …", flush=True)
                found = run_apart("peers_process", json.dumps(job), timeout_s=PROCESS_TIMEOUT_S)
                partial = file.with_suffix(".partial")
                partial.write_text(json.dumps(found))
                partial.replace(file)
        return [json.loads(file.read_text()) for file in files]


def rows_of(setting: Setting, shape: str, processes: Processes) -> list[Row]:
    """The rows of a case, one a side; `ratio` is over the fastest peer, `over_merged` over our merged graph."""
    found = processes.of(setting)
    times = [each["milliseconds"][shape] for each in found]
    differences = [each["differences"][shape] for each in found]
    medians = {side: np.array([np.median(each[side]) for each in times]) for side in times[0]}
    peers = [side for side in medians if side not in OURS] or [MERGED]
    ratios = {side: {peer: np.median(medians[side] / medians[peer]) for peer in peers} for side in medians}
    best = max(peers, key=lambda peer: ratios[MERGED][peer])
    return [
        {
            "side": side,
            "median_ms": round(float(np.median(values)), 4),
            "p20_ms": round(float(np.percentile(values, 20)), 4),
            "p80_ms": round(float(np.percentile(values, 80)), 4),
            "ratio": round(float(ratios[side][best]), 4),
            "reference": best,
            "rounds": sum(len(each[side]) for each in times),
            "model": setting.model,
            "shape": shape,
            "over_merged": round(float(np.median(values / medians[MERGED])), 4),
            "over_plain": round(float(ratios[side].get(PLAIN, ratios[side][best])), 4),
            "max_rel_difference": max(each[side] for each in differences),
            "made_by": processes.workshop.maker(side),
            "processes": len(found),
        }
        for side, values in medians.items()
    ]
