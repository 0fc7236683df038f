"""`run_train` runs `melora-fx train`: it trains adapters for a model folder on labelled texts."""

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
    """The options of a training, as on the command line.

    Attributes:
        model: a Hugging Face folder.
        out: the folder for the results.
        data: a delimited file with a header and the columns `text` and `label`; None if the texts come from elsewhere.
        validation: the share of the texts to hold out, or a separate file with the held-out texts.
        targets: the linears to adapt; if empty, the query and value projections.
        max_tokens: number of tokens at which texts are cut; None: the model's limit.
        device: a device of torch by name; "auto" is CUDA if available, else the CPU.
        restart: deletes the checkpoints in `out` and starts over.
        checkpoint_every_s: seconds between checkpoints within an epoch; each epoch also ends with one.
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
    """A training that is ready to run: checked inputs, the plain model, the plan, and the place of the results."""

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
    """Trains, prints its progress, and writes the adapter, a plot and report.json into `options.out`.

    Returns:
        the content of report.json.

    Raises:
        MELoRAError, ValueError: if the data, the model, an option or the folder cannot be used. Nothing is written
            then.
        MELoRAError: later, if a loss is not finite, or a checkpoint or result cannot be read or written.
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
    """Returns the texts in the file `options.data`."""
    assert options.data is not None
    return read_texts(options.data, options.text, options.label, held_out=options.validation, seed=options.seed)


def prepare(options: TrainOptions, texts: Texts, *, checkpoints: str = "checkpoints") -> Training:
    """Loads the model, checks all inputs, and decides everything that precedes the training; writes nothing.

    Args:
        options: the options of the training.
        texts: the texts to train on and to hold out.
        checkpoints: name of the folder in `options.out` for the checkpoints.

    Raises:
        MELoRAError, ValueError: as `run_train`.
    """
    if options.batch_size < 1:
        raise ValueError(f"`batch_size` (={options.batch_size}) must be at least 1")
    _ = options.schedule, find_device(options.device)  # raise if a value is out of range
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
        console.print(f"[bold]the model's own head[/], trained further: {', '.join(base.heads)}")
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
    """Raises MELoRAError if the results would go into the model's folder."""
    if lies_in(options.out, options.model):
        raise MELoRAError(f"`{options.out}` is the model's own folder, or in it: pass another `--out`")


def _try_model(base: Base, batches: Batches) -> None:
    """Raises MELoRAError if the model cannot run on the texts as its tokenizer encodes them."""
    try:
        with torch.no_grad():
            base.model(**batches.example())
    except Exception as error:  # of any type, depending on the model; T5 needs an end token in each text
        raise MELoRAError(
            f"`{base.folder}`: {type(base.model).__name__} cannot process the texts as its tokenizer encodes them: "
            f"{error}"
        ) from error


def fit(training: Training) -> dict[str, Any]:
    """Rewrites the model, trains it, writes the adapter and the plot, and returns the content of report.json.

    The model is on the CPU before and after.
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
    """Raises MELoRAError if a package is missing or `out` cannot be created or written; creates nothing."""
    import_pyplot()
    there = next((path for path in (out, *out.absolute().parents) if path.exists()), out)
    if not there.is_dir():
        raise MELoRAError(f"`{out}` cannot be written: `{there}` is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise MELoRAError(f"`{out}` cannot be written: `{there}` is not writable")


def _arguments(
    options: TrainOptions, texts: Texts, base: Base, targets: tuple[str, ...], max_tokens: int
) -> dict[str, Any]:
    """Returns everything that the trained adapter depends on, except package versions, as JSON-ready values."""
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
