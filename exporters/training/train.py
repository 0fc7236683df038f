"""`melora-fx train`: adapters for a model folder, trained on labelled texts."""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import melora_fx
from exporters.measuring.plots import import_pyplot
from melora_fx import MatchReport, MELoRAConfig, MELoRAError
from melora_fx.files import lies_in, writing
from melora_fx.versions import package_version

from .base import Base, label_order, load_base
from .batches import Batches
from .checkpoints import Checkpoints, History, hash_base, hash_texts
from .default_targets import default_targets, match_targets
from .device import find_device
from .loop import Schedule, train
from .plots import plot_training
from .report import console, print_texts
from .texts import Texts, read_texts
from .tokenizer import TokenLengths, measure_texts

_PACKAGES = ("melora_fx", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class TrainOptions:
    """What is asked for, as the command line has it.

    Attributes:
        model: a Hugging Face folder.
        out: the folder for the results.
        data: a delimited file with a header, whose columns are `text` and `label`; None for texts from elsewhere.
        validation: the share of the texts that is held out, or a file of its own.
        targets: the linears to adapt; none: the query and value projections.
        max_tokens: where texts are cut; None: only at the model's limit.
        device: what trains, as torch names it; "auto" is CUDA where there is any.
        restart: forgets the checkpoints of another run in `out`.
        checkpoint_every_s: seconds; one is written after each epoch, too.
    """

    model: Path
    out: Path
    data: Path | None = None
    text: str = "text"
    label: str = "label"
    validation: float | Path = 0.2
    targets: tuple[str, ...] = ()
    config: MELoRAConfig = field(default_factory=MELoRAConfig)
    epochs: int = 5
    learning_rate: float = 2e-3
    batch_size: int = 16
    max_tokens: int | None = None
    seed: int = 0
    device: str = "auto"
    restart: bool = False
    checkpoint_every_s: float = 180.0

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.epochs, self.learning_rate, self.seed)


@dataclass(frozen=True)
class Training:
    """A training that is ready to run, all its inputs checked: the plain model, the plan, and where the results go."""

    options: TrainOptions
    base: Base
    batches: Batches
    lengths: TokenLengths
    matched: MatchReport
    checkpoints: Checkpoints

    @property
    def texts(self) -> Texts:
        return self.batches.texts


def run_train(options: TrainOptions) -> dict[str, Any]:
    """Trains, prints what it does, and writes adapter, picture and report.json into `options.out`.

    Returns:
        what it has also written as report.json.

    Raises:
        MELoRAError, ValueError: for data, a model, options or a folder that cannot be used, before anything is written.
    """
    if options.data is None:
        raise ValueError("`data` is needed: a file with the texts and their labels")
    check_requirements(options.out)
    training = prepare(options, read_texts_of(options))
    print(training.matched)
    results = fit(training)
    write_report(results, options.out)
    print_summary(results)
    console.print(f"adapter, training.png and report.json are in {options.out}", markup=False)
    return results


def read_texts_of(options: TrainOptions) -> Texts:
    """The texts in the file that the options name."""
    assert options.data is not None
    return read_texts(options.data, options.text, options.label, held_out=options.validation, seed=options.seed)


def prepare(options: TrainOptions, texts: Texts, *, checkpoints: str = "checkpoints") -> Training:
    """All that is decided before the training; nothing is written yet.

    Args:
        options: what is asked for.
        texts: what is trained on and held out.
        checkpoints: the folder in `options.out` for the checkpoints.

    Raises:
        MELoRAError, ValueError: as `run_train`.
    """
    if options.batch_size < 1:
        raise ValueError(f"`batch_size` (={options.batch_size}) must be at least 1")
    _ = options.schedule, find_device(options.device)  # refuse what is out of range
    refuse_model_folder(options)
    texts = texts.with_labels(label_order(options.model, texts.labels))
    print_texts(texts)
    torch.manual_seed(options.seed)
    base = load_base(options.model, texts.labels)
    all_texts = [text for text, _ in (*texts.train, *texts.held_out)]
    lengths = measure_texts(base.tokenizer, all_texts, base.model, options.model, options.max_tokens)
    console.print(f"[bold]tokens[/]: {lengths}")
    if base.new:
        console.print(f"[bold]new in this model[/], trained and saved with the adapter: {', '.join(base.new)}")
    if base.heads:
        console.print(f"[bold]the model's own head[/], trained on: {', '.join(base.heads)}")
    targets = options.targets or default_targets(base.model)
    if not options.targets:
        console.print(f"[bold]targets[/]: {', '.join(targets)}")
    matched = match_targets(base.model, targets, options.config)
    arguments = _arguments(options, texts, base, targets, lengths.max_tokens)
    kept = Checkpoints(options.out / checkpoints, arguments, options.checkpoint_every_s)
    if not options.restart:
        kept.refuse_others()
    batches = Batches(base.tokenizer, texts, lengths.lengths, options.batch_size, lengths.max_tokens)
    _try_model(base, batches)
    return Training(options, base, batches, lengths, matched, kept)


def refuse_model_folder(options: TrainOptions) -> None:
    """Raises MELoRAError where the results would go into the folder of the model."""
    if lies_in(options.out, options.model):
        raise MELoRAError(f"`{options.out}` is the model's own folder, or in it: give another `--out`")


def _try_model(base: Base, batches: Batches) -> None:
    """Raises MELoRAError where the model cannot compute what its tokenizer makes of the texts."""
    try:
        with torch.no_grad():
            base.model(**batches.example())
    except Exception as error:  # a model raises what it likes, such as T5 without an end token in each text
        raise MELoRAError(
            f"`{base.folder}`: {type(base.model).__name__} cannot take the texts as its tokenizer writes them: {error}"
        ) from error


def fit(training: Training) -> dict[str, Any]:
    """Rewrites the model, trains it, and writes adapter and picture; what report.json says of it. The model is on the
    CPU before and after.
    """
    options, model, out = training.options, training.base.model, training.options.out
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    targets = training.checkpoints.arguments["targets"]
    melora_fx.rewrite(model, targets, options.config, keep_trainable=training.base.keep_trainable)
    training.checkpoints.open(restart=options.restart)
    model.to(find_device(options.device))
    history = train(model, training.batches, options.schedule, training.checkpoints)
    model.cpu()
    melora_fx.save_adapter(model, out / "adapter")
    with writing(out):
        plot_training(history.losses, history.evaluations, training.texts.majority_baseline, out / "training.png")
    return _results(training, history, time.perf_counter() - start)


def write_report(results: dict[str, Any], out: Path) -> None:
    with writing(out):
        (out / "report.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def print_summary(results: dict[str, Any]) -> None:
    console.print(
        f"held-out accuracy {results['accuracy_before']:.1%} → {results['accuracy_after']:.1%}, majority baseline "
        f"{results['majority_baseline']:.1%}; trainable: {results['trainable_parameters']:,} parameters, "
        f"{results['adapter_parameters']:,} of them in adapters"
    )


def check_requirements(out: Path) -> None:
    """Raises MELoRAError for a package that is missing, and a folder that cannot be made or written; makes nothing."""
    import_pyplot()
    there = next((path for path in (out, *out.absolute().parents) if path.exists()), out)
    if not there.is_dir():
        raise MELoRAError(f"`{out}` cannot be written: `{there}` is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise MELoRAError(f"`{out}` cannot be written: `{there}` may not be written to")


def _arguments(
    options: TrainOptions, texts: Texts, base: Base, targets: tuple[str, ...], max_tokens: int
) -> dict[str, Any]:
    """Everything that the trained adapter depends on but the versions of packages, as JSON-ready values."""
    return {
        "model_sha256": hash_base(base.model, base.new),
        "texts_sha256": hash_texts(texts.train, texts.held_out),
        "labels": list(texts.labels),
        "targets": list(targets),
        "config": options.config.to_dict(),
        "max_tokens": max_tokens,
        "batch_size": options.batch_size,
        "device": find_device(options.device).type,
        **asdict(options.schedule),
    }


def _results(training: Training, history: History, seconds: float) -> dict[str, Any]:
    options, model, texts = training.options, training.base.model, training.texts
    sites = melora_fx.sites(model)
    versions = {name: package_version(name) for name in _PACKAGES}
    return {
        "model": str(options.model),
        "accuracy_before": history.evaluations[0][1],
        "accuracy_after": history.evaluations[-1][1],
        "majority_baseline": texts.majority_baseline,
        "num_sites": len(sites),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_parameters": sum(p.numel() for p in melora_fx.adapter_parameters(model).values()),
        "lora_equal_rank_parameters": sum(
            site.config.total_rank * (site.in_features + site.out_features) for site in sites.values()
        ),
        "new": list(training.base.new),
        "heads": list(training.base.heads),
        "labels": list(texts.labels),
        "num_train": len(texts.train),
        "num_held_out": len(texts.held_out),
        "notes": list(texts.notes),
        "share_cut": training.lengths.share_cut,
        "share_unknown": training.lengths.share_unknown,
        "seconds": seconds,
        "arguments": dict(training.checkpoints.arguments),
        "versions": {**versions, "python": platform.python_version()},
        "evaluations": history.evaluations,
        "losses": history.losses,
    }
