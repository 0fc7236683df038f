"""Makes the graphs that decoding compares, each once, and keeps them in --cache; only ours depend on our code."""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import melora_fx
from benchmarks.common.checkout import digest_of
from benchmarks.common.kept import digest, once, run_offline
from benchmarks.common.models import fill, load_smollm2
from benchmarks.common.random_models import llama_config
from exporters import export_onnx, write_ort_adapter, write_peft_adapter
from exporters.decoders.flat_cache import flat_cache
from exporters.measuring.machine import package_versions
from exporters.onnx_files.cache_names import LOGITS, MASK, POSITIONS, TOKENS, is_present, past_of
from melora_fx import MELoRAConfig

from .decoding_cells import SIDES, TARGETS, Setting, Step

GENAI, OLIVE = "onnxruntime-genai", "olive-ai"
BUILDER = "onnxruntime_genai.models.builder"
EXAMPLE_TOKENS = 16
CHECKED = 16
"""Number of tokens at the end of a step whose logits are compared."""
_TINY_WORDS = 96
"""Must not be the width of any other linear: the builder recognises the head by it."""


class Workshop:
    """Models, adapters and graphs in a folder.

    Args:
        cache: the folder.
        olive: a Python with olive-ai; if it has none, Olive's sides are left out.
    """

    def __init__(self, cache: Path, olive: str) -> None:
        self._olive = olive
        self.olive_version = _version_in(olive, OLIVE)
        versions = package_versions(GENAI, "peft")
        self._theirs = cache / f"decoders-{digest(versions, self.olive_version)}"
        self._ours = cache / f"decoders-{digest(versions, digest_of('melora_fx', 'exporters'))}"

    @property
    def sides(self) -> list[str]:
        """The names of the sides that can be measured here."""
        return [side.name for side in SIDES if side.graph != "olive" or self.olive_version]

    def prepare(self, setting: Setting, steps: Sequence[Step]) -> dict[str, Any]:
        """Makes everything that a process loads; returns the paths, ready for JSON."""
        graphs: dict[str, Path] = {
            "builder": self._built(setting.model) / "model.onnx",
            "baked": self._built(setting.model, setting) / "model.onnx",
            **{kind: self._exported(setting, kind) / "model.onnx" for kind in ("fold", "keep", "swap")},
        }
        adapters = {"swap": self._native_adapter(setting, graphs["swap"])}
        if self.olive_version:
            folder = self._extracted(setting, graphs["baked"])
            graphs["olive"], adapters["olive"] = folder / "model.onnx", folder / "adapter_weights.onnx_adapter"
        return {
            "model": str(self.model(setting.model)),
            "adapter": str(self._adapter(setting)),
            "reference": str(self._reference(setting, steps) / "arrays.npz"),
            "graphs": {name: str(path) for name, path in graphs.items()},
            "native_adapters": {name: str(path) for name, path in adapters.items()},
        }

    def model(self, name: str) -> Path:
        """Returns the folder of a model and its tokenizer."""
        return once(self._theirs / name, lambda folder: _SAVE[name](folder))

    def _adapter(self, setting: Setting) -> Path:
        def make(folder: Path) -> None:
            model = load_model(self.model(setting.model))
            torch.manual_seed(0)
            config = MELoRAConfig(rank=setting.rank, num_blocks=setting.num_blocks)
            melora_fx.save_adapter(fill(melora_fx.rewrite(model, TARGETS[setting.targets], config)), folder / "ours")
            write_peft_adapter(folder / "ours", folder / "peft")

        return once(self._theirs / f"{setting.file_name}-adapter", make) / "ours"

    def _reference(self, setting: Setting, steps: Sequence[Step]) -> Path:
        model, adapter = self.model(setting.model), self._adapter(setting)

        def make(folder: Path) -> None:
            found = run_in_torch(load_model(model), steps, "base")
            found |= run_in_torch(load_merged(model, adapter), steps, "adapted")
            np.savez(folder / "arrays.npz", **found)  # type: ignore[arg-type]

        return once(self._theirs / f"{setting.file_name}-reference-{digest(str(steps))}", make)

    def _built(self, name: str, setting: Setting | None = None) -> Path:
        """Returns a graph of onnxruntime-genai's builder, which supports the LoRA of `setting` only as constants."""
        model = self.model(name)
        lora = []
        if setting is not None:
            lora = ["--extra_options", f"adapter_path={self._adapter(setting).with_name('peft')}"]

        def make(folder: Path) -> None:
            with tempfile.TemporaryDirectory(dir=self._theirs) as cache:
                options = ["-i", str(model), "-o", str(folder), "-p", "fp32", "-e", "cpu", "-c", cache, *lora]
                run_offline([sys.executable, "-m", BUILDER, *options], folder)

        return once(self._theirs / f"{name if setting is None else setting.file_name}-builder", make)

    def _extracted(self, setting: Setting, baked: Path) -> Path:
        """Returns what Olive makes of the builder's graph, as in `auto-opt --use_model_builder --adapter_path`."""

        def make(folder: Path) -> None:
            options = ["--pass-name", "ExtractAdapters", "-m", str(baked), "-o", str(folder), "--device", "cpu"]
            with tempfile.TemporaryDirectory(dir=self._theirs) as cache:
                command = [self._olive, "-m", "olive", "run-pass", *options, "--provider", "CPUExecutionProvider"]
                run_offline(command, Path(cache), {"OLIVE_DISABLE_TELEMETRY": "1"})

        return once(self._theirs / f"{setting.file_name}-olive", make)

    def _exported(self, setting: Setting, kind: str) -> Path:
        """Returns our graph; the rank decides the form of the updates, also if they are swappable."""

        def make(folder: Path) -> None:
            model = melora_fx.load_adapter(load_model(self.model(setting.model)), self._adapter(setting))
            tokens = torch.arange(2 * EXAMPLE_TOKENS).view(2, -1) + 3
            example = {TOKENS: tokens, MASK: torch.ones_like(tokens)}
            export_onnx(model, example, folder, adapter=kind, target="ort-cpu", use_cache=True, verify=False)

        return once(self._ours / f"{setting.file_name}-{kind}", make)

    def _native_adapter(self, setting: Setting, graph: Path) -> Path:
        path = self._ours / f"{setting.file_name}.onnx_adapter"
        write_ort_adapter(self._adapter(setting), graph, path)
        return path


def load_model(folder: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_merged(folder: str | Path, adapter: str | Path) -> Any:
    return melora_fx.fold(melora_fx.load_adapter(load_model(folder), adapter))


def run_in_torch(model: Any, steps: Sequence[Step], prefix: str) -> dict[str, np.ndarray]:
    """Returns the inputs and expected logits of the steps, from one run in torch.

    These are the cache by the names of inputs, and the last logits of each step by its name, (1, tokens, vocabulary).
    All keys begin with `prefix`.
    """
    tokens = max(step.end for step in steps)
    ids = text(tokens, model.config.vocab_size)
    inputs = {name: torch.as_tensor(value) for name, value in step_arrays(ids, Step(0, tokens)).items()}
    with torch.no_grad(), flat_cache(model):
        outputs = {name: value.numpy() for name, value in model(**inputs).items()}
    found = {past_of(name): value for name, value in outputs.items() if is_present(name)}
    found |= {step.name: outputs[LOGITS][:, max(step.past, step.end - CHECKED) : step.end] for step in steps}
    return {f"{prefix}/{name}": value for name, value in found.items()}


def text(tokens: int, vocabulary: int) -> np.ndarray:
    """Returns token ids, (1, tokens); the first ones do not depend on the length."""
    return np.random.default_rng(0).integers(3, vocabulary, (1, tokens))


def step_arrays(ids: np.ndarray, step: Step) -> dict[str, np.ndarray]:
    """Returns the inputs of a step other than the cache: ids, mask and positions."""
    return {
        TOKENS: np.ascontiguousarray(ids[:, step.past : step.end]),
        MASK: np.ones((1, step.end), np.int64),
        POSITIONS: np.arange(step.past, step.end)[None],
    }


def _save_smollm2(folder: Path) -> None:
    model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_tiny(folder: Path) -> None:
    """Saves a random model of two layers for --quick, and a tokenizer, which the builder needs."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(64, 128, 2, 4, num_key_value_heads=2, vocab_size=_TINY_WORDS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(_TINY_WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", unk_token="w0").save_pretrained(folder)


_SAVE: Mapping[str, Callable[[Path], None]] = {"SmolLM2-135M": _save_smollm2, "Tiny": _save_tiny}


@functools.cache
def _version_in(python: str, package: str) -> str:
    """Returns the version of a package in another Python; empty if it is not installed there."""
    code = f"import importlib.metadata; print(importlib.metadata.version({json.dumps(package)}))"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
