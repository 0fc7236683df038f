"""The machine and the versions of a line of results. Absent ones are named as such, so every machine has an origin."""

import functools
import platform
import subprocess
from datetime import UTC, datetime

import torch

from melora_fx.versions import package_version, source_commit

PACKAGES = ("triton", "transformers", "peft", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt")


def origin(source: str, *, dry: bool) -> dict[str, str]:
    """Returns the fields at the end of each line. `source`: the digest of the code."""
    own = {"settings": "dry run" if dry else "", "source": source}
    return own | _machine() | {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}


@functools.cache
def _machine() -> dict[str, str]:
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    versions += [f"{name} {package_version(name)}" for name in PACKAGES]
    return {"device": _device(), "driver": _driver(), "versions": "; ".join(versions), "commit": source_commit()}


def _device() -> str:
    if not torch.cuda.is_available():
        return f"{platform.machine()} CPU"
    facts = torch.cuda.get_device_properties(0)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"


def _driver() -> str:
    """Returns the driver's version according to `nvidia-smi`, and the version of CUDA that torch was built with."""
    built = f"CUDA {torch.version.cuda or 'none'}"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return f"{found or 'unknown'}, {built}"
