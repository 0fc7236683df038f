"""Exported graphs that several tests read: each is exported once per run, by the first process that needs it."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from filelock import FileLock
from torch import nn

import melora_fx
from exporters import ExportReport, export_onnx
from melora_fx import MELoRAConfig
from support import decoders
from support.models import (
    adapted_kept_tower,
    assert_unchanged,
    bert,
    bert_classifier,
    fill,
    gpt2,
    kept_tower,
    randn,
    rewritten_tower,
    tokens,
    tower,
)
from support.zoo import build

CONFIG = MELoRAConfig(rank=2, num_blocks=3)


def bert_with_biases() -> nn.Module:
    """Returns a BERT with distinct biases: a new model's are zeros, which the exporter stores once for each size."""
    model = bert_classifier(num_layers=1)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter.add_(0.1 * randn(*parameter.shape, seed=index))
    return model


def adapted_bert(seed: int = 0) -> nn.Module:
    model = bert_classifier(num_layers=1)
    return fill(melora_fx.rewrite(model, "all-linear", CONFIG, keep_trainable="classifier"), seed)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "tower": (tower, lambda: {"x": randn(2, 24)}),
    "adapted tower": (rewritten_tower, lambda: {"x": randn(2, 24)}),
    "kept tower": (kept_tower, lambda: {"x": randn(2, 24)}),
    "adapted kept tower": (adapted_kept_tower, lambda: {"x": randn(2, 24)}),
    "sequence tower": (tower, lambda: {"x": randn(2, 5, 24)}),
    "adapted sequence tower": (rewritten_tower, lambda: {"x": randn(2, 5, 24)}),
    "bert": (lambda: bert_classifier(num_layers=1), tokens),
    "adapted bert": (adapted_bert, tokens),
    "bert with biases": (bert_with_biases, tokens),
    "bare bert": (lambda: bert(num_layers=1), tokens),
    "gpt2": (lambda: gpt2(num_layers=1), tokens),
    "llama": (lambda: build("Llama")[0], tokens),
    "decoder": (decoders.llama, decoders.example),
    "adapted decoder": (decoders.adapted_llama, decoders.example),
    "adapted gpt2": (lambda: fill(melora_fx.rewrite(gpt2(num_layers=1), ["c_attn", "c_fc"], CONFIG)), tokens),
}
"""Maps a name to its model, always with the same values, and its export inputs; one layer is enough for a graph."""


class Exports:
    """`exports(name, **options)` exports `MODELS[name]` and compares it with torch; tests must not change its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(exist_ok=True)

    def __call__(self, name: str, **options: Any) -> ExportReport:
        folder = self.folder / "-".join([name, *(f"{key}={value}" for key, value in sorted(options.items()))])
        report = folder / "report.pickle"
        with FileLock(f"{folder}.lock"):
            if not report.is_file():
                make, inputs = MODELS[name]
                model = make()
                with assert_unchanged(model):
                    made = export_onnx(model, inputs(), folder / "model.onnx", **options)
                report.write_bytes(pickle.dumps(made))
            return pickle.loads(report.read_bytes())


def copy_graph(report: ExportReport, path: Path) -> Path:
    """Writes the graph under another name, with its weights next to it in a file of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.load(report.path), path, save_as_external_data=True, location=f"{path.name}.data")
    return path
