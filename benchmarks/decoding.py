"""What does a token from an exported decoder with a key-value cache cost: merged, unmerged, swappable?

The graphs are compared with those of onnxruntime-genai's builder (the base, and a LoRA baked in as constants), with
Olive's, whose LoRA weights are optional inputs (the case of
https://github.com/microsoft/onnxruntime-genai/issues/1661, but in float32), and with torch. SmolLM2-135M, one CPU
thread, one text. A step is one run of a session that gets the cache of the previous tokens: one token after 64 and
after 512, and the first 64 and 512 at once. All outputs are computed, none is copied. An adapter is passed to its graph
as onnxruntime-genai does it, with `RunOptions.add_active_adapter`.

Each process loads all sides of a setting in an order of its own, after 2 GB of ballast, because a session's place in
memory changes its time by up to 20 %. It checks the logits of each side against torch, and times the sides in turn, in
an order drawn for every round. A ratio is a side's median over the reference's, as the median over the processes; p20
and p80 are taken over the processes too. Graphs and the results of each process are kept in --cache, so a stopped run
continues with the next process. Writes decoding.csv, decoding.md and decoding.png.

Olive can be installed in a separate environment: `--olive PYTHON` (pip install olive-ai requests).
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from melora_fx.versions import package_version

from .common.cases import Case, Row, run_cases
from .common.kept import MeasuringProcesses
from .common.needs import why_missing
from .common.ratios import ratios_of
from .deployment.decoding_cells import GOALS, REFERENCE, SIDES, Setting, Step, settings_and_steps
from .deployment.decoding_graphs import GENAI, OLIVE, Workshop
from .deployment.decoding_report import write_report

PROCESS_TIMEOUT_S = 900


def run(options: Namespace) -> int:
    settings, steps = settings_and_steps(options.quick)
    workshop = Workshop(options.cache, options.olive)
    said = f"seconds {options.seconds:g}, processes {options.processes}"
    said += "" if workshop.olive_version else ", no Olive"
    processes = MeasuringProcesses(options, "deployment.decoding_process", f"{said}, {steps}", PROCESS_TIMEOUT_S)

    @functools.cache
    def measured(setting: Setting) -> list[dict[str, Any]]:
        def job(index: int) -> dict[str, Any]:
            facts = {"setting": setting.name, "index": index, "sides": workshop.sides, "steps": steps}
            return workshop.prepare(setting, steps) | facts | {"seconds": options.seconds}

        return processes.measured(setting.file_name, job)

    cases = [
        Case(
            f"{setting.name}, {step.name}",
            functools.partial(rows_of, setting, step, measured, makers_of(workshop.olive_version)),
            "" if options.quick else why_missing(setting.model, options.cache),
        )
        for setting in settings
        for step in steps
    ]
    return run_cases(options, cases, settings=said, write_report=write_report)


def rows_of(
    setting: Setting,
    step: Step,
    measured: Callable[[Setting], Sequence[Mapping[str, Any]]],
    makers: Mapping[str, str],
) -> list[Row]:
    """Returns the rows of a case, one per side; `measured` returns what its processes printed."""
    found = measured(setting)
    times = [each["milliseconds"][step.name] for each in found]
    differences = [each["differences"][step.name] for each in found]
    facts = {name: getattr(setting, name) for name in ("model", "targets", "total_rank", "num_blocks", "rank")}
    facts |= {"past": step.past, "new": step.new, "processes": len(found)}
    sides = [side for side in SIDES if side.name in times[0]]
    return [
        {
            "side": side.name,
            **ratios_of(side.name, REFERENCE, times),
            "reference": REFERENCE,
            **facts,
            "goal": GOALS.get(side.name, {}).get(setting.targets, ""),
            "max_rel_difference": max(each[side.name] for each in differences),
            "made_by": makers[side.graph],
        }
        for side in sides
    ]


def makers_of(olive_version: str) -> dict[str, str]:
    """Returns what made the graphs of each kind; for ours, the columns `versions` and `source` say more."""
    builder = f"{GENAI} {package_version(GENAI)}"
    return dict.fromkeys(("fold", "keep", "swap"), "exporters") | {
        "builder": builder,
        "baked": builder,
        "olive": f"{OLIVE} {olive_version}",
        "torch": "transformers",
    }
