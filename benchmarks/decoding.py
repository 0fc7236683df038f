"""What does a token cost from an exported decoder with a key-value cache: merged, unmerged, swappable?

Beside the graphs of onnxruntime-genai's own builder, of the base and with a LoRA baked in as constants; beside Olive's,
whose LoRA are optional inputs (the case of https://github.com/microsoft/onnxruntime-genai/issues/1661, but in float32);
beside torch. SmolLM2-135M, one thread of a CPU, one text. A step is one run of a session, given the cache of the tokens
before: one token after 64 and after 512, and the first 64 and 512 at once; all outputs are computed, none is copied. An
adapter is given to its graph as onnxruntime-genai does, by `RunOptions.add_active_adapter`.

Each process loads all sides of a setting in an order of its own, behind 2 GB of ballast, for a session's place in
memory shifts it by up to 20 %; checks the logits of each against torch; and times them in turn, in an order drawn for
every round. A ratio is the median over the processes of a side's median over the reference's; p20 and p80 are of the
processes too. Graphs are kept in --cache, and what a process has measured: a run that was stopped goes on with the next
process. Writes decoding.csv, decoding.md and decoding.png.

Olive may stand in an environment of its own: `--olive PYTHON` (pip install olive-ai requests).
"""

import functools
import hashlib
import json
import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporters.measuring.machine import origin_columns
from melora_fx.versions import package_version

from .cases import Case, Row, run_apart, run_cases
from .checkout import source_digest
from .decoding_cells import GOALS, REFERENCE, SIDES, Setting, Step, settings_and_steps
from .decoding_graphs import GENAI, OLIVE, Workshop
from .decoding_report import write_report
from .needs import why_missing

PROCESS_TIMEOUT_S = 900


def run(options: Namespace) -> int:
    settings, steps = settings_and_steps(options.quick)
    workshop = Workshop(options.cache, options.olive)
    said = f"seconds {options.seconds:g}, processes {options.processes}"
    said += "" if workshop.olive_version else ", no Olive"
    processes = Processes(options, workshop, steps, said)
    cases = [
        Case(
            f"{setting.name}, {step.name}",
            functools.partial(rows_of, setting, step, processes),
            "" if options.quick else why_missing(setting.model, options.cache),
        )
        for setting in settings
        for step in steps
    ]
    return run_cases(options, cases, settings=said, write_report=write_report)


class Processes:
    """What the processes of each setting have measured, on disk as soon as it is there."""

    def __init__(self, options: Namespace, workshop: Workshop, steps: Sequence[Step], settings: str) -> None:
        self._options = options
        self.workshop = workshop
        self._steps = steps
        origin = origin_columns("cpu", "peft")
        facts = [settings, source_digest(), origin["versions"], origin["device"], str(steps)]
        self._folder = options.cache / f"decoding-{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:12]}"
        if options.again and not options.report_only:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.of = functools.cache(self._of)

    def _of(self, setting: Setting) -> list[dict[str, Any]]:
        """What each process printed; those that have not run yet run now."""
        self._folder.mkdir(parents=True, exist_ok=True)
        files = [self._folder / f"{setting.file_name}-{index}.json" for index in range(self._options.processes)]
        for index, file in enumerate(files):
            if not file.is_file():
                job = self.workshop.prepare(setting, self._steps) | {
                    "setting": setting.name,
                    "index": index,
                    "sides": self.workshop.sides,
                    "steps": self._steps,
                    "seconds": self._options.seconds,
                }
                print(f"    process {index + 1} of {len(files)} …", flush=True)
                found = run_apart("decoding_process", json.dumps(job), timeout_s=PROCESS_TIMEOUT_S)
                partial = file.with_suffix(".partial")
                partial.write_text(json.dumps(found))
                partial.replace(file)
        return [json.loads(file.read_text()) for file in files]


def rows_of(setting: Setting, step: Step, processes: Processes) -> list[Row]:
    """The rows of a case, one a side."""
    found = processes.of(setting)
    times = [each["milliseconds"][step.name] for each in found]
    differences = [each["differences"][step.name] for each in found]
    makers = makers_of(processes.workshop.olive_version)
    facts = {name: getattr(setting, name) for name in ("model", "targets", "total_rank", "num_blocks", "rank")}
    facts |= {"past": step.past, "new": step.new, "processes": len(found)}
    sides = [side for side in SIDES if side.name in times[0]]
    return [
        {
            "side": side.name,
            **ratios_of(side.name, times),
            "reference": REFERENCE,
            **facts,
            "goal": GOALS.get(side.name, {}).get(setting.targets, ""),
            "max_rel_difference": max(each[side.name] for each in differences),
            "made_by": makers[side.graph],
        }
        for side in sides
    ]


def ratios_of(side: str, times: Sequence[Mapping[str, Sequence[float]]]) -> Row:
    """The columns of a side's times; `times`: of each process, by side."""
    medians = np.array([np.median(each[side]) for each in times])
    ratios = medians / np.array([np.median(each[REFERENCE]) for each in times])
    names = (("median_ms", "p20_ms", "p80_ms"), ("ratio", "ratio_p20", "ratio_p80"))
    columns: Row = {}
    for three, values in zip(names, (medians, ratios), strict=True):
        columns |= dict(zip(three, np.percentile(values, (50, 20, 80)).round(4).tolist(), strict=True))
    return columns | {"rounds": sum(len(each[side]) for each in times)}


def makers_of(olive_version: str) -> dict[str, str]:
    """What made the graph, by its kind; ours are of the columns `versions` and `source`."""
    builder = f"{GENAI} {package_version(GENAI)}"
    return dict.fromkeys(("fold", "keep", "swap"), "exporters") | {
        "builder": builder,
        "baked": builder,
        "olive": f"{OLIVE} {olive_version}",
        "torch": "transformers",
    }
