"""Does MELoRA with 8 and with 36 times fewer parameters learn a text as well as LoRA? SmolLM2-135M on documentation.

Tests the second claim of the MELoRA paper (P. Ren et al., ACL 2024), which is about instructions and models of 7B
parameters, at a scale that two cores can train: the loss on held-out documents, after the same number of tokens. Every
arm has the same seeds and sees the same windows. Each adapter has one learning rate, chosen beforehand on separate
documents. Adapters are on `q_proj` and `o_proj`, the projections whose features are divisible by 36. Writes
language_study.csv row by row (a stopped run continues), language_study.md and language_study.png.
"""

import functools
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from exporters.measuring.tables import read_csv

from .common.checkout import DONE, LEFT_OUT, MISUSED
from .common.kept import digest, once
from .common.models import load_smollm2
from .common.needs import BOTOCORE as BOTOCORE_PACKAGE
from .common.needs import SMOLLM2
from .common.random_models import llama_config
from .studies.language import AUTOCAST, BATCH
from .studies.report import Comparison, Study, write_report
from .studies.runs import Arm, Run, for_choice, is_misused, train_all, values_by_rate
from .studies.texts import BOTOCORE, HELD_OUT_SHARE, NUM_HELD_OUT, WINDOW, read_documents, windows
from .studies.training import ALPHA

ARMS = (
    Arm("LoRA 36", "LoRA", 36),
    Arm("MELoRA 36×1", "MELoRA", 1, 36),
    Arm("LoRA 8", "LoRA", 8),
    Arm("MELoRA 8×1", "MELoRA", 1, 8),
    Arm("LoRA 1", "LoRA", 1),
)
"""n blocks of rank 1 have as many parameters as a LoRA of rank 1: n times fewer than a LoRA of rank n."""
BASE = Arm("none", "none")
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
CHOICE_SEED = 100
"""Not among the seeds of the study."""
TASK, CHOICE = "documentation", "documentation, choice"
HELD_OUT = {TASK: "held out", CHOICE: "choice"}
"""The windows on which the loss of a task is computed."""
STUDY = Study(
    name="language_study",
    title="Quality on text",
    tasks={TASK: "loss per token in nats"},
    arms=[*(arm.name for arm in ARMS), BASE.name],
    comparisons=(
        Comparison("MELoRA 36×1", "LoRA 36", "36 times fewer parameters, equal rank"),
        Comparison("MELoRA 8×1", "LoRA 8", "8 times fewer parameters, equal rank"),
        Comparison("MELoRA 36×1", "LoRA 1", "equal parameters, 36 times the rank"),
        Comparison("MELoRA 8×1", "LoRA 1", "equal parameters, 8 times the rank"),
    ),
    choice=CHOICE,
    rule="The learning rate of each adapter was chosen by the loss on documents reserved for this choice, after fewer "
    "steps: the best rate, with a worse one on either side. So few steps may prefer high rates.",
    near=0,
    seeds=3,
    baseline=(BASE.name, "the model before the training"),
    beside="LoRA r is PEFT's LoRA of rank r, and MELoRA n×r has n blocks of rank r; both adapt `q_proj` and `o_proj`. "
    "A seed decides which windows are used and the initial values of the adapter.",
    unit="nats",
    scale="per token",
    factor=1,
    digits=4,
    higher_is_better=False,
    differs=(
        "Training is short: about two per cent of one pass over the text. How fast an adapter starts to learn counts "
        "more here than the level that it finally reaches.",
        "The paper tunes Llama-2-7B to follow instructions and scores it on INSTRUCTEVAL. Here SmolLM2-135M learns to "
        "continue documentation and is scored by the loss on other documents. This measures how well an adapter learns "
        "a text, not how well a model follows instructions.",
        "The paper chooses the rank of a block for each benchmark. Here it is 1, with 36 blocks compared with a LoRA "
        "of rank 36, and 8 blocks compared with a LoRA of rank 8.",
        "alpha is 16 for all arms, so alpha / rank ranges from 0.44 (LoRA 36) to 16 (rank 1); the separate learning "
        "rates make up for some of that.",
        "The base is SmolLM2-135M-Instruct from its pip package, dequantised from four bits.",
        "Adapters are on the query and output projections of the attention, 576 → 576: all other linears have a number "
        "of features that is not divisible by 36.",
    ),
)


def run(options: Namespace) -> int:
    missing = "" if options.report_only else why_missing(options)
    if missing:
        print(f"language_study: {missing}", file=sys.stderr)
        return LEFT_OUT
    path = options.out / "language_study.csv"
    status = DONE
    if not options.report_only:
        if is_misused(options, (TASK,), (*ARMS, BASE)):
            return MISUSED
        make = functools.partial(_run, options, *prepare(options))
        status, chosen = _choose(options, make, path)
        print(f"learning rates: {chosen}", flush=True)
        runs = [make(TASK, BASE, 0, 0.0, options.steps)]
        runs += [
            make(TASK, arm, seed, chosen[arm.name], options.steps) for seed in range(options.seeds) for arm in ARMS
        ]
        status = max(status, train_all(options, "studies.language", runs))
    if rows := read_csv(path):
        write_report(STUDY, rows, options.out)
    return status


def _choose(options: Namespace, make: Callable[..., Run], path: Path) -> tuple[int, dict[str, float]]:
    """Returns an exit status, and the learning rate with the smallest loss by arm.

    Tries further rates until the best is not the smallest or largest rate tried, except with --quick.
    """
    rates = LEARNING_RATES[1:3] if options.quick else LEARNING_RATES
    new = choice = [make(CHOICE, arm, CHOICE_SEED, rate, options.choice_steps) for rate in rates for arm in ARMS]
    status = DONE
    while new:
        status = max(status, train_all(for_choice(options), "studies.language", new))
        losses = values_by_rate(read_csv(path), choice)
        further = {} if options.quick else {arm: further_rate(of) for arm, of in losses.items()}
        new = [
            make(CHOICE, arm, CHOICE_SEED, rate, options.choice_steps)
            for arm in ARMS
            if (rate := further.get(arm.name))
        ]
        choice = [*choice, *new]
    return status, {arm: min(of, key=lambda rate: of[rate]) for arm, of in losses.items()}


def further_rate(losses: Mapping[float, float]) -> float | None:
    """Returns twice the best rate if it is the largest, half of it if it is the smallest, else None.

    Args:
        losses: by learning rate.
    """
    best = min(losses, key=lambda rate: losses[rate])
    return 2 * best if best == max(losses) else best / 2 if best == min(losses) else None


def why_missing(options: Namespace) -> str:
    """Returns what to do about a missing text or model; empty if both are there."""
    if options.text != BOTOCORE and not Path(options.text).is_file():
        return f"`{options.text}` is missing: pass --text a file of English text, or `{BOTOCORE}`"
    needs = [BOTOCORE_PACKAGE] * (options.text == BOTOCORE) + [SMOLLM2] * (not options.quick)
    return "; ".join(filter(None, (need.why_missing(options.cache) for need in needs)))


def prepare(options: Namespace) -> tuple[Path, Path, str, int]:
    """Returns the folders of model and windows, a description of the text, and the number of training windows.

    Both folders are in --cache.
    """
    documents = read_documents(options.text)
    name = f"{BOTOCORE} {version(BOTOCORE)}" if options.text == BOTOCORE else Path(options.text).name
    sha256 = digest(
        f"{WINDOW} {HELD_OUT_SHARE} {NUM_HELD_OUT}", *(f"{title}\n{document}" for title, document in documents.items())
    )
    kind = "tiny" if options.quick else "smollm2-135m"
    model = once(options.cache / f"language-{kind}", functools.partial(_save_model, quick=options.quick))

    def save_windows(folder: Path) -> None:
        tokenizer = None if options.quick else AutoTokenizer.from_pretrained(model)
        cut = windows(documents, lambda text: list(text.encode()) if tokenizer is None else tokenizer(text).input_ids)
        save_file(cut, folder / "windows.safetensors")

    text = once(options.cache / f"language-{kind}-{sha256}", save_windows)
    with safe_open(text / "windows.safetensors", "pt") as file:
        num_windows = file.get_slice("train").get_shape()[0]
    return model, text, f"{name}, sha256 {sha256}, of whose {num_windows * WINDOW:,} tokens", num_windows


def _save_model(folder: Path, *, quick: bool) -> None:
    """Saves SmolLM2-135M-Instruct in float32 with its tokenizer, or a tiny model of bytes of 72 features."""
    if quick:
        torch.manual_seed(0)
        LlamaForCausalLM(llama_config(72, 144, 2, 2, vocab_size=256)).save_pretrained(folder)
        return
    model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _run(
    options: Namespace,
    model: Path,
    text: Path,
    about: str,
    num_windows: int,
    task: str,
    arm: Arm,
    seed: int,
    rate: float,
    steps: int,
) -> Run:
    tokens = f"{steps * BATCH * WINDOW:,} are trained on in {steps} steps of {BATCH} × {WINDOW}"
    autocast = f"autocast to {str(AUTOCAST).removeprefix('torch.')}"
    settings = f"{about} {tokens}, {autocast}, alpha {ALPHA}" + ", quick" * options.quick
    given = {"model": str(model), "text": str(text), "steps": steps, "held_out": HELD_OUT[task]}
    return Run(task, arm, seed, round(steps * BATCH / num_windows, 4), rate, settings, given)
