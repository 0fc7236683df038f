"""`python -m benchmarks` lists the benchmarks; with a name it runs that benchmark, with `all` each of them.

A benchmark is one file with a function `run(options)` that returns an exit status, and one entry of `BENCHMARKS`.
"""

import argparse
import functools
import importlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common.needs import CACHE, GENAI, MATPLOTLIB, MINILM, MPNET, ONNXRUNTIME, PEFT, SKLEARN, SMOLLM2, Need
from benchmarks.gpu import options as gpu

ROOT = Path(__file__).parents[1]
TEXT = ROOT.parent / "shared" / "data" / "tinystories_excerpt_30k.txt"


class Option(NamedTuple):
    """An option of one benchmark. `quick`: its default with --quick, if it is another."""

    name: str
    default: Any
    help: str
    quick: Any = None


class Benchmark(NamedTuple):
    """A benchmark. It needs all of `needs`. Cases whose `weights` are missing are left out; --quick needs none."""

    name: str
    question: str
    minutes: int
    weights: tuple[Need, ...] = ()
    options: tuple[Option, ...] = ()
    needs: tuple[Need, ...] = (ONNXRUNTIME, PEFT)


STORIES = Option("text", TEXT, "file of some 30 kB of English text, one story per line", quick=ROOT / "README.md")

DATA = ROOT.parent / "shared" / "data"

BENCHMARKS = (
    Benchmark(
        "glue_study",
        "Does MELoRA with 8 times fewer parameters understand language as well as LoRA (four tasks of GLUE)?",
        230,
        weights=(MINILM,),
        options=(
            Option(
                "glue", DATA / "glue", "folder with rte, mrpc, cola and stsb, each with train.tsv and validation.tsv"
            ),
            Option("snips", DATA / "snips", "folder with train_small.tsv and validation.tsv of SNIPS"),
            Option("seeds", 5, "seeds per arm and task", quick=2),
            Option("epochs", 4, "epochs of training", quick=1),
            Option("examples", 2500, "maximum number of training examples per task", quick=48),
            Option("processes", 2, "processes that train at the same time, one thread each"),
        ),
        needs=(PEFT, MATPLOTLIB, SKLEARN),
    ),
    Benchmark(
        "language_study",
        "Does MELoRA with 8 and 36 times fewer parameters learn a text as well as LoRA?",
        130,
        weights=(SMOLLM2,),
        options=(
            Option("text", "botocore", "file of English text, or `botocore` for the documentation in that package"),
            Option("seeds", 3, "seeds per arm", quick=2),
            Option("steps", 128, "training steps of 1024 tokens", quick=4),
            Option("choice-steps", 32, "steps of each training that serves to choose a learning rate", quick=2),
            Option("processes", 2, "processes that train at the same time, one thread each"),
        ),
        needs=(PEFT, MATPLOTLIB, SKLEARN),
    ),
    Benchmark(
        "end_to_end",
        "What does a user get on the way from the base model to a served graph, here and with PEFT and optimum-onnx?",
        100,
        weights=(MINILM, SMOLLM2),
        options=(
            Option("glue", DATA / "glue", "folder with mrpc, which has train.tsv and validation.tsv"),
            STORIES,
            Option("rounds", 3, "rounds of all sides", quick=1),
            Option("epochs", 2, "epochs on MRPC", quick=1),
            Option("seconds", 30.0, "seconds of timing per shape", quick=0.3),
        ),
        needs=(ONNXRUNTIME, PEFT, SKLEARN),
    ),
    Benchmark(
        "train_step",
        "What does a training step cost, relative to the frozen model's: here, in PEFT, in the authors' loop?",
        60,
        weights=(MINILM, SMOLLM2),
        options=(
            Option("rounds", 5, "pairs of steps per side", quick=1),
            Option("device", "cpu", "cpu or cuda"),
            Option("llama", "1024,2816,2,16", "hidden size, intermediate size, layers and heads of the random Llama"),
        ),
        needs=(ONNXRUNTIME, PEFT, MATPLOTLIB),
    ),
    Benchmark(
        "processes",
        "What do several processes send, store and wait for with adapters, here and in PEFT?",
        20,
        options=(
            Option("rounds", 15, "timed steps per side", quick=2),
            Option(
                "llama",
                "256,704,4,8",
                "hidden size, intermediate size, layers and heads of the random Llama",
                quick="64,128,2,8",
            ),
        ),
        needs=(PEFT,),
    ),
    Benchmark(
        "experts",
        "What does a training step with adapters in a mixture's experts cost?",
        3,
        options=(Option("rounds", 15, "timed steps per side", quick=2),),
    ),
    Benchmark(
        "rewrite_speed",
        "How long does rewriting a 7B model take, compared with PEFT's module swapping, and does matching scale?",
        1,
        options=(Option("rounds", 7, "rewrites per side", quick=1),),
    ),
    Benchmark(
        "site_speed",
        "What does a site in a custom forward cost, compared with the same product in a graph?",
        1,
        options=(Option("rounds", 200, "rounds of 50 forward passes per side", quick=3),),
    ),
    Benchmark(
        "swap_speed",
        "How long do swapping, reading and writing adapters take, compared with PEFT and safetensors?",
        3,
        weights=(MINILM, SMOLLM2),
        options=(Option("rounds", 25, "swaps per side", quick=2),),
    ),
    Benchmark(
        "fold_speed",
        "How fast is a fold, compared with PEFT's merge, on disk with a copy, in a graph with an export?",
        8,
        weights=(MINILM,),
        options=(
            Option("rounds", 7, "folds per side", quick=1),
            Option("threads", 1, "threads of torch"),
            Option("folder", Path(tempfile.gettempdir()) / "melora-fold-speed", "folder for the 7 GB of folds on disk"),
        ),
    ),
    Benchmark(
        "fold_rounding",
        "How much does a fold into bfloat16 round away, compared with PEFT's merge, and what does that cost in loss?",
        3,
        weights=(SMOLLM2,),
        options=(
            STORIES,
            Option("steps", 40, "training steps", quick=4),
        ),
    ),
    Benchmark(
        "latency",
        "What does an adapter cost at inference: merged, unmerged, swappable, and as an exported PEFT model?",
        25,
        weights=(MINILM, MPNET),
        options=(
            Option("seconds", 10.0, "seconds of timing per case, over three loads", quick=0.3),
            Option("providers", "cpu,torch eager,torch compile", "comma-separated; also cuda, cuda graph, tensorrt"),
            Option("device", "cpu", "device of the torch cases: cpu or cuda"),
        ),
        needs=(ONNXRUNTIME, PEFT, MATPLOTLIB),
    ),
    Benchmark(
        "peers",
        "How fast are exported graphs, compared with optimum-onnx, ONNX Runtime's optimizer, Olive and transformers?",
        90,
        weights=(MINILM, MPNET),
        options=(
            Option("processes", 5, "processes per model", quick=1),
            Option("seconds", 12.0, "seconds of timing per shape and process", quick=0.3),
        ),
        needs=(ONNXRUNTIME, PEFT, MATPLOTLIB),
    ),
    Benchmark(
        "decoding",
        "What does a token from an exported decoder with a key-value cache cost: merged, unmerged, swappable?",
        25,
        weights=(SMOLLM2,),
        options=(
            Option("processes", 5, "processes per adapter", quick=1),
            Option("seconds", 45.0, "seconds of timing per process", quick=1.0),
            Option("olive", sys.executable, "a Python with olive-ai; without it Olive's sides are left out"),
        ),
        needs=(ONNXRUNTIME, PEFT, MATPLOTLIB, GENAI),
    ),
    Benchmark(
        "generation",
        "Does an exported decoder generate the same text as torch, in our loop and in onnxruntime-genai?",
        7,
        weights=(SMOLLM2,),
        options=(
            STORIES,
            Option("steps", 40, "training steps", quick=8),
        ),
        needs=(ONNXRUNTIME, PEFT, GENAI),
    ),
    Benchmark(
        "adapter_forms",
        "Which form of an unmerged update is faster on ONNX Runtime's CPU: blocks, or a dense pair?",
        8,
        weights=(MINILM,),
        options=(Option("seconds", 12.0, "seconds of timing per shape, over three loads", quick=0.3),),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if a case failed, 2 for wrong arguments, 3 if something is missing."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    if options.benchmark in (None, "list"):
        list_benchmarks()
        return 0
    if options.benchmark == "all":
        return _status_of_all([_run_apart(benchmark, options) for benchmark in BENCHMARKS])
    if options.benchmark == "gpu":
        from benchmarks.gpu.schedule import run as run_on_gpu

        return run_on_gpu(options)
    return run(next(each for each in BENCHMARKS if each.name == options.benchmark), options)


def list_benchmarks() -> None:
    table = Table("benchmark", "question", "minutes", "needs", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, question, minutes, weights, _, needs in BENCHMARKS:
        needed = [
            f"[red]{need.name} (missing)[/]" if need.why_missing(CACHE) else need.name for need in (*needs, *weights)
        ]
        table.add_row(name, question, str(minutes), ", ".join(needed))
    table.add_row("gpu", gpu.QUESTION, "any", "a CUDA device; each part names what else it needs")
    console = Console()
    console.print(table)
    console.print("python -m benchmarks NAME --help shows options; --quick takes a minute at most.", markup=False)


def run(benchmark: Benchmark, options: argparse.Namespace) -> int:
    """Runs one benchmark, if nothing that it needs is missing; returns its exit status."""
    if reasons := list(filter(None, (need.why_missing(options.cache) for need in benchmark.needs))):
        print(f"{benchmark.name}: {'; '.join(reasons)}", file=sys.stderr)
        return 3
    from transformers.utils import logging

    from benchmarks.common.kept import digest

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    options.cache.mkdir(parents=True, exist_ok=True)
    measure = importlib.import_module(f"benchmarks.{benchmark.name}").run
    if options.report_only:
        return measure(options)
    path = (options.out / f"{benchmark.name}.csv").resolve()
    lock = Path(tempfile.gettempdir()) / f"melora_fx-{digest(str(path))}.lock"
    try:
        with FileLock(lock, timeout=0):
            return measure(options)
    except Timeout:
        print(f"{benchmark.name}: another process writes {path}: wait for it, or pass another --out", file=sys.stderr)
        return 2


def _run_apart(benchmark: Benchmark, options: argparse.Namespace) -> int:
    """Runs one benchmark in its own process, so that it can neither slow nor end another."""
    flags = [f"--{name.replace('_', '-')}" for name in ("quick", "again", "report_only") if getattr(options, name)]
    command = [sys.executable, "-m", "benchmarks", benchmark.name, *flags]
    command += ["--out", str(options.out), "--cache", str(options.cache), f"--only={options.only}"]
    print(f"\n{benchmark.name}: {benchmark.question}", flush=True)
    return subprocess.run(command, cwd=ROOT).returncode


def _status_of_all(statuses: Sequence[int]) -> int:
    """Returns 1 if any failed, else 3 if anything is missing; 2 (`--only` matches no case) only if all returned 2."""
    found = set(statuses) - {2} or {2}
    return 1 if found - {0, 2, 3} else max(found)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    is_quick = "--quick" in arguments
    out = ROOT / "benchmark-output" if is_quick else ROOT / "benchmarks" / "results"
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="small models and few rounds, to try whether it works")
    common.add_argument("--out", type=_path, default=out, help="folder of the results (%(default)s)")
    common.add_argument("--only", default="", help="only cases whose name contains this")
    common.add_argument("--again", action="store_true", help="measure again what has been measured")
    common.add_argument("--report-only", action="store_true", help="only write the report of the existing rows")
    common.add_argument("--cache", type=_path, default=CACHE, help="folder of models and exports (%(default)s)")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures what the code costs.")
    commands = parser.add_subparsers(dest="benchmark", metavar="NAME")
    commands.add_parser("list", help="every benchmark, what it needs and how long it takes")
    for name, question in (("all", "Runs all of them."), *((each.name, each.question) for each in BENCHMARKS)):
        commands.add_parser(name, help=question, description=question, parents=[common], allow_abbrev=False)
    gpu.add_options(commands.add_parser("gpu", help=gpu.QUESTION, description=gpu.DESCRIPTION, allow_abbrev=False))
    for benchmark in BENCHMARKS:
        for option in benchmark.options:
            default = option.quick if is_quick and option.quick is not None else option.default
            commands.choices[benchmark.name].add_argument(
                f"--{option.name}",
                type=_type_of(default),
                default=default,
                help=f"{option.help} (%(default)s)",
            )
    return parser.parse_args(arguments)


def _type_of(default: Any) -> Callable[[str], Any]:
    if isinstance(default, Path):
        return _path
    return functools.partial(_above_zero, type(default)) if isinstance(default, int | float) else type(default)


def _above_zero(kind: Callable[[str], Any], text: str) -> Any:
    try:
        number = kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}") from error
    if not number > 0:
        raise argparse.ArgumentTypeError(f"`{text}` must be above zero")
    return number


def _path(text: str) -> Path:
    return Path(text).resolve()


if __name__ == "__main__":
    sys.exit(main())
