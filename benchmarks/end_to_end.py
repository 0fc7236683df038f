"""What does a user get on the way from the base model to a served, merged graph: here, and with PEFT and optimum-onnx?

MRPC on MiniLM-L6 (`query` and `value`, two epochs), and stories on SmolLM2-135M (`q_proj` and `v_proj`). Each side
trains in its own process, in the same loop with the same batches. It then exports with the command that its users type,
with the command's default checks: `optimum-cli export onnx` of PEFT's merged model, in a separate environment (see
`peers`), or `melora-fx export`. Each round does so for every side, in another order and with another seed. Ratios are
taken within a round, and their median is shown. Finally ONNX Runtime runs the graphs of the last round in turn, in one
process, in plain sessions with one thread.

The results of each complete round are kept in --cache, so a stopped run continues with the next round. Writes
end_to_end.csv and end_to_end.md. --quick uses two sides, tiny models, and transformers' exporter instead of
optimum-onnx.
"""

import functools
import json
import re
import shutil
import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import BertModel, LlamaForCausalLM

from exporters.measuring.machine import origin_columns
from exporters.measuring.tables import markdown_table
from melora_fx.files import write_atomically

from .common.cases import Case, Row, run_apart, run_cases
from .common.checkout import digest_of
from .common.kept import digest, digest_of_files, once
from .common.models import load_smollm2, minilm_folder
from .common.needs import MINILM, SMOLLM2
from .common.random_models import llama_config
from .common.stories import why_no_text
from .deployment.end_to_end_cells import PEFT_SIDE, QUICK_SIDES, SHAPES, SIDES, STORIES, Side, Story, spread
from .deployment.end_to_end_graphs import (
    LOADS,
    check,
    export,
    graph_of,
    latencies_of,
    prepare,
    quality_of,
    rotated,
)
from .studies.glue import TASKS, load
from .studies.runs import ONE_THREAD

TRAINING_TIMEOUT_S = 3600


def run(options: Namespace) -> int:
    torch.set_num_threads(1)
    why = {
        "MRPC": _why_no_mrpc(options.glue) or ("" if options.quick else MINILM.why_missing(options.cache)),
        "stories": why_no_text(options.text) or ("" if options.quick else SMOLLM2.why_missing(options.cache)),
    }
    cases = [
        Case(
            f"{story.name}, {'tiny' if options.quick else story.model}",
            functools.partial(measure, options, story),
            why[story.name],
        )
        for story in STORIES
    ]
    return run_cases(options, cases, settings=settings_of(options), write_report=write_report)


def settings_of(options: Namespace) -> str:
    files = [path for path in (*_mrpc_files(options.glue), options.text) if path.is_file()]
    timing = f"{options.seconds:g} s of timing a shape"
    return f"rounds {options.rounds}, epochs {options.epochs}, {timing}, texts of sha256 {digest_of_files(files)}"


def _where(made_by: str) -> list[str]:
    """Returns what the times depend on besides the code: the device, the versions, and what makes PEFT's graphs."""
    found = origin_columns("cpu", "peft")
    return [found["device"], found["versions"], made_by]


def _mrpc_files(glue: Path) -> list[Path]:
    return [glue / "mrpc" / name for name in TASKS["MRPC"].files]


def _why_no_mrpc(glue: Path) -> str:
    missing = [path for path in _mrpc_files(glue) if not path.is_file()]
    return f"`{missing[0]}` is missing: pass --glue a folder with GLUE's mrpc" if missing else ""


def measure(options: Namespace, story: Story) -> list[Row]:
    """Measures a story and returns its rows, one per side."""
    made_by = prepare(options)
    code = digest_of("melora_fx", "exporters", "benchmarks/deployment", "benchmarks/studies")
    work = options.cache / f"end-to-end-{digest(story.name, settings_of(options), code, *_where(made_by))}"
    if options.again:
        shutil.rmtree(work, ignore_errors=True)
    base = _base(options, story)
    sides = QUICK_SIDES if options.quick else SIDES
    rounds = [_round(options, story, sides, index, base, work) for index in range(options.rounds)]
    last = {side.name: graph_of(_folder(work, side, options.rounds - 1) / "graph") for side in sides}
    latencies = {name: latencies_of(last, shape, options.seconds) for name, shape in SHAPES.items()}
    return [_row(story, side.name, rounds, latencies) | {"theirs_by": made_by} for side in sides]


def _base(options: Namespace, story: Story) -> Path:
    """Returns the folder of the base model, and writes it if it is missing."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        if not options.quick:
            model, tokenizer = load_smollm2()
            tokenizer.save_pretrained(folder)
        elif story.name == "MRPC":
            model = BertModel(load(2, quick=True)[0].config)
        else:
            model = LlamaForCausalLM(llama_config(64, 128, 2, 4, vocab_size=256))
        model.save_pretrained(folder)

    if story.name == "MRPC" and not options.quick:
        return minilm_folder()
    return once(options.cache / f"end-to-end-{'tiny' if options.quick else 'smollm2'}-{story.name}", make)


def _folder(work: Path, side: Side, index: int) -> Path:
    return work / f"{re.sub(r'[^a-z0-9]+', '-', side.name.lower())}-{index}"


def _round(
    options: Namespace, story: Story, sides: Sequence[Side], index: int, base: Path, work: Path
) -> dict[str, dict[str, float]]:
    """Returns what was measured of each side and its graph; read from disk if an earlier run completed the round."""
    path = work / f"round-{index}.json"
    if not path.is_file():
        order = rotated(sides, 2 * index)
        found = {side.name: _side(options, story, side, index, base, work) for side in order}
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(found)))
    return json.loads(path.read_text())


def _side(options: Namespace, story: Story, side: Side, index: int, base: Path, work: Path) -> dict[str, float]:
    folder = _folder(work, side, index)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"    round {index + 1}: {side.name} …", flush=True)
    job = {
        **{"case": story.name, "arm": list(side.arm), "compiled": side.compiled, "seed": index, "model": str(base)},
        **{"targets": story.targets, "learning_rate": story.learning_rate, "out": str(folder), "quick": options.quick},
        **{"data": str(options.glue / "mrpc" if story.name == "MRPC" else options.text), "epochs": options.epochs},
        "size": min(story.size, 32 if story.name == "MRPC" else 4) if options.quick else story.size,
    }
    with TemporaryDirectory() as compiled:  # Inductor's compiler fails if the folder's name contains a blank
        compiler = {"TORCHINDUCTOR_CACHE_DIR": compiled, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment = ONE_THREAD | compiler
        script = "deployment.end_to_end_process"
        found = run_apart(script, json.dumps(job), timeout_s=TRAINING_TIMEOUT_S, environment=environment)
    found["export_s"] = found.pop("saving_s") + export(options, story, side, base, folder)
    check(folder)
    found["total_s"] = found["training_s"] + found["export_s"]
    found["quality"] = quality_of(options, story, base, graph_of(folder / "graph"))
    return found


MEASURES = ("training_s", "first_step_s", "peak_mib", "adapter_kib", "adapter_alone_kib", "export_s")


def _row(
    story: Story, side: str, rounds: Sequence[Mapping[str, Row]], latencies: Mapping[str, Mapping[str, list[float]]]
) -> Row:
    """Returns medians over rounds or loads of a graph, with the median ratios to PEFT's of the same round or load."""
    totals = np.array([found[side]["total_s"] for found in rounds]) * 1e3
    median, p20, p80 = np.percentile(totals, (50, 20, 80)).round(1).tolist()
    row: Row = {"side": side, "median_ms": median, "p20_ms": p20, "p80_ms": p80, "reference": PEFT_SIDE}
    row |= {"ratio": round(_ratio(rounds, side, "total_s"), 4), "rounds": len(rounds)}
    for measure in MEASURES:
        name = measure.rpartition("_")[0]
        row[measure] = round(statistics.median(found[side][measure] for found in rounds), 2)
        row |= _ratios(f"{name}_ratio", [found[side][measure] / found[PEFT_SIDE][measure] for found in rounds])
    for shape, found in latencies.items():
        name = shape.replace(" × ", "x")
        ratios = [own / theirs for own, theirs in zip(found[side], found[PEFT_SIDE], strict=True)]
        row[f"ms_{name}"] = round(statistics.median(found[side]), 3)
        row |= _ratios(f"ratio_{name}", ratios)
    row["quality"] = story.quality
    row["quality_mean"] = round(statistics.fmean(found[side]["quality"] for found in rounds), 4)
    row["quality_of_rounds"] = " ".join(f"{found[side]['quality']:.4f}" for found in rounds)
    return row


def _ratios(name: str, ratios: Sequence[float]) -> Row:
    """Returns the median, the smallest and the largest of `ratios` as columns."""
    ends = {name: statistics.median(ratios), f"{name}_least": min(ratios), f"{name}_most": max(ratios)}
    return {column: round(ratio, 4) for column, ratio in ends.items()}


def _ratio(rounds: Sequence[Mapping[str, Row]], side: str, measure: str) -> float:
    return statistics.median(found[side][measure] / found[PEFT_SIDE][measure] for found in rounds)


def write_report(rows: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Writes end_to_end.md."""
    origins: dict[str, dict[str, None]] = {}
    for row in rows:
        origin = (
            f"{row['time'][:10]}: {row['device']}; {row['versions']}; PEFT's graphs by {row['theirs_by']}; "
            f"commit {row['commit'] or 'unknown'}; {row['rounds']} rounds"
        )
        origins.setdefault(origin, {})[row["case"]] = None
    measured = " ".join(f"{' and '.join(cases)} on {origin}." for origin, cases in origins.items())
    lines = [
        "# From the base model to a served graph",
        "",
        f"Written by `python -m benchmarks end_to_end`. {measured}",
        "",
        "Medians over the rounds. In brackets: the ratio to PEFT's value of the same round, as median, smallest and "
        "largest.",
        "",
        "* **Training** uses one thread. It starts with the loaded model. The first step includes compiling, with an "
        f"empty compiler cache. MRPC: {_length(STORIES[0])}; stories: {_length(STORIES[1])}. The more steps, the less "
        "the first one counts.",
        "* **Peak** is the memory that loading and training add to a process after its imports. It includes the model, "
        "but not the export.",
        "* **Adapter** is the size of its file, for MRPC with the trained head; *alone* is without the head.",
        "* **Export** is the time from the trained model to the checked graph, with the start of each command: saving, "
        "merging and `optimum-cli export onnx`, which does not optimize, or saving and `melora-fx export --target "
        "ort-cpu`, which merges. PEFT's merged SmolLM2 is written by transformers 5, and optimum-onnx reads it with "
        "transformers 4, which does not find the base of the rotary embedding and uses another. The benchmark writes "
        "the base where transformers 4 looks for it.",
        f"* **Latencies** are those of the last round's graphs on one thread. One process loads all of them {LOADS} "
        "times and runs them in turn.",
        "* **Quality** is that of the graph, as the mean over the rounds: accuracy, or the held-out loss (lower is "
        "better). So few rounds do not distinguish the sides; the studies do. Each graph was compared with its torch "
        "model.",
        "",
        *table(rows),
        "",
    ]
    (folder / "end_to_end.md").write_text("\n".join(lines))


def _length(story: Story) -> str:
    return f"{story.size} steps" if story.name == "stories" else f"epochs of {story.size} examples"


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the lines of a Markdown table, one row per side of each story."""
    headings = [
        "story",
        "side",
        "training, s",
        "first step, s",
        "peak, MiB",
        "adapter, KiB",
        "alone, KiB",
        "export, s",
        *(f"{name}, ms" for name in SHAPES),
        "quality",
    ]
    lines = []
    for row in rows:
        cells = [f"{float(row[name]):.4g} ({spread(row, name.rpartition('_')[0] + '_ratio')})" for name in MEASURES]
        for shape in SHAPES:
            name = shape.replace(" × ", "x")
            cells.append(f"{float(row[f'ms_{name}']):.3g} ({spread(row, f'ratio_{name}')})")
        lines.append([row["case"], row["side"], *cells, f"{row['quality']} {float(row['quality_mean']):.3f}"])
    return markdown_table(headings, lines, text_columns=2)
