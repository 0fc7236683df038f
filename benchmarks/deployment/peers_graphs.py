"""Makes the graphs that `peers` compares, each once, and keeps them in --cache; only ours depend on our code."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, BertConfig, GPT2Config, GPT2LMHeadModel, ViTConfig
from transformers.exporters import OnnxConfig, OnnxExporter

import melora_fx
from benchmarks.common.checkout import digest_of
from benchmarks.common.kept import digest, once, run_offline
from benchmarks.common.models import EXAMPLE, fill, minilm_folder, mpnet_folder
from exporters import export_onnx
from exporters.graph.clean import quiet
from exporters.measuring.machine import package_versions
from melora_fx import MELoRAConfig

_TORCH = f"torch~={'.'.join(torch.__version__.split('.')[:2])}.0"
"""The version in this environment: another build would take another time to import."""
PACKAGES = ("optimum-onnx[onnxruntime]", "transformers<5", "olive-ai", "sentence-transformers", _TORCH)
"""The packages of the peers' environment."""

PLAIN, MERGED = "optimum", "merged"
OURS = (MERGED, "portable", "keep q,v", "keep all-linear", "swap idle q,v", "swap idle all-linear")
TRANSFORMERS = {"transformers": None, "transformers, fused": "cpu"}
BLOCKS = {"num_blocks": 8, "rank": 8}


class Shape(NamedTuple):
    """A batch of texts of one length, or of square images."""

    batch: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.batch} × {self.size}"


class Setting(NamedTuple):
    """A model, the names of its query and value, and the inputs with which it is timed."""

    model: str
    query_value: tuple[str, ...]
    shapes: tuple[Shape, ...]


_TEXTS = (Shape(1, 16), Shape(8, 64), Shape(8, 128), Shape(32, 128))
SETTINGS = (
    Setting("MiniLM-L6", ("query", "value"), _TEXTS),
    Setting("MPNet-base", ("attn.q", "attn.v"), _TEXTS),
    Setting("ViT-B-16", ("q_proj", "v_proj"), (Shape(1, 224), Shape(8, 224))),
    Setting("GPT-2", ("c_attn",), (Shape(1, 16), Shape(8, 64))),
)
QUICK = (Setting("Tiny", ("query", "value"), (Shape(1, 8),)),)


class Workshop:
    """Models and graphs in a folder.

    Args:
        cache: the folder.
        has_environment: whether to include the peers that need a separate environment.
    """

    def __init__(self, cache: Path, *, has_environment: bool) -> None:
        self._has_environment = has_environment
        self._environment = cache / "peers-environment"
        versions = str(package_versions("peft"))
        self._theirs = cache / f"peers-{digest(versions, *PACKAGES)}"
        self._ours = cache / f"peers-{digest(versions, digest_of('melora_fx', 'exporters'))}"
        self._makers: dict[str, str] = {}

    def maker(self, side: str) -> str:
        """Returns what made a side's graph."""
        return self._makers[side]

    def graphs(self, setting: Setting) -> dict[str, Path]:
        """Makes the graphs that are missing; returns side → its graph."""
        model = once(
            self._theirs / setting.model / "model", lambda folder: _save(setting.model, folder, self._theirs.parent)
        )
        found = self._of_environment(setting, model) if self._has_environment else {}
        for side, fusions in TRANSFORMERS.items():
            folder = self._theirs / setting.model / side
            found[side] = (
                once(folder, lambda folder, fusions=fusions: _by_transformers(model, folder, fusions)) / "model.onnx"
            )  # type: ignore[misc]
            self._makers[side] = f"transformers {transformers.__version__}"
        for side in OURS:
            found[side] = (
                once(self._ours / setting.model / side, lambda folder, side=side: _by_us(setting, model, folder, side))
                / "model.onnx"
            )  # type: ignore[misc]
            self._makers[side] = "exporters"
        return found

    def _of_environment(self, setting: Setting, model: Path) -> dict[str, Path]:
        folder = once(self._theirs / setting.model / "peers", lambda out: self._run_there(model, out))
        sides = json.loads((folder / "sides.json").read_text())
        for side, facts in sides.items():
            if "failed" in facts:
                print(f"    {setting.model}: no graph by {side}: {facts['failed']}", flush=True)
        made = {side: facts["made_by"] for side, facts in sides.items() if "made_by" in facts}
        self._makers |= made
        return {side: folder / side / "model.onnx" for side in made}

    def _run_there(self, model: Path, out: Path) -> None:
        python = environment_python(self._environment)
        run_offline([str(python), str(Path(__file__).with_name("peers_environment.py")), str(model), str(out)], out)


def environment_python(folder: Path) -> Path:
    """Returns the Python of an environment with `PACKAGES`, and creates the environment if it is missing."""
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        print(f"    making an environment for {', '.join(PACKAGES)} …", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        run_offline([sys.executable, "-m", "venv", str(folder)], folder.parent)
        run_offline([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], folder.parent)
        (folder / "ready").touch()
    return python


def _save(name: str, folder: Path, cache: Path) -> None:
    torch.manual_seed(0)
    if name in _FOLDERS:
        source = _FOLDERS[name](cache)
        config = AutoConfig.from_pretrained(source)
        kind = {"bert": "BertForSequenceClassification", "mpnet": "MPNetForSequenceClassification"}[config.model_type]
        getattr(transformers, kind).from_pretrained(source).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    else:
        _RANDOM[name]().save_pretrained(folder)


_FOLDERS: dict[str, Callable[[Path], Path]] = {"MiniLM-L6": lambda _: minilm_folder(), "MPNet-base": mpnet_folder}
_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_RANDOM: dict[str, Callable[[], Any]] = {
    "ViT-B-16": lambda: transformers.ViTForImageClassification(ViTConfig(num_labels=10)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config()),
    "Tiny": lambda: transformers.BertForSequenceClassification(BertConfig(vocab_size=1024, **_TINY)),
}


def _load(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    model.config.use_cache = False
    return model


def _example(model: Any) -> dict[str, torch.Tensor]:
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))}
    return dict(EXAMPLE)


def _by_transformers(source: Path, folder: Path, fusions: Any) -> None:
    model = _load(source)
    inputs = _example(model)
    axes = (0,) if "pixel_values" in inputs else (0, 1)
    shapes = {name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name in inputs}
    with quiet():
        exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic_shapes=shapes, ort_fusions=fusions))
    onnx_ir.save(exported.program, folder / "model.onnx", external_data="model.onnx.data")


def _by_us(setting: Setting, source: Path, folder: Path, side: str) -> None:
    model = _load(source)
    target = "portable" if side == "portable" else "ort-cpu"
    options: dict[str, Any] = {"use_cache": False} if model.config.model_type == "gpt2" else {}
    if side not in (MERGED, "portable"):
        adapter, targets = side.replace(" idle", "").split(" ", 1)
        chosen: Any = list(setting.query_value) if targets == "q,v" else targets
        torch.manual_seed(0)
        model = fill(melora_fx.rewrite(model, chosen, MELoRAConfig(**BLOCKS)))
        options["adapter"] = adapter
    export_onnx(model, _example(model), folder, target=target, verify=False, **options)
