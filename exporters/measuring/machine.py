"""Describes the device and the versions of a measurement, and measures the memory and disk use of a graph."""

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from exporters.onnx_runtime import Arrays, import_onnxruntime
from melora_fx import MELoRAError
from melora_fx.versions import package_version, source_commit

_MIB = 2**20

_LOAD_AND_RUN = """
import sys
import numpy, onnxruntime

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

path, feed_path, threads = sys.argv[1:]
with numpy.load(feed_path) as arrays:
    feed = dict(arrays)
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.intra_op_num_threads = int(threads)
before = resident("VmRSS")
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
session.run(None, feed)
print(resident("VmHWM") - before)
"""
"""Reads VmHWM, not `ru_maxrss`, which a child inherits from a larger parent."""


def peak_memory_mib(path: str | os.PathLike[str], feed: Arrays, threads: int | None) -> float | None:
    """Measures what loading a graph and running it on the CPU adds to the peak resident memory of a process.

    A separate process contains only ONNX Runtime, the inputs and the graph. In one process, several graphs could not be
    distinguished.

    Args:
        path: the graph.
        feed: its inputs by name.
        threads: intra-operator threads; None leaves ONNX Runtime's default.

    Returns:
        MiB, or None on systems without /proc.

    Raises:
        MELoRAError: if that process fails.
    """
    if not Path("/proc/self/status").is_file():
        return None
    with tempfile.TemporaryDirectory() as folder:
        feed_path = Path(folder) / "feed.npz"
        np.savez(feed_path, **feed)  # type: ignore[arg-type]
        command = [sys.executable, "-c", _LOAD_AND_RUN, str(path), str(feed_path), str(threads or 0)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise MELoRAError(f"`{path}` cannot be run in a separate process: {reason}")
    return int(result.stdout) * 1024 / _MIB


def file_size_mib(path: str | os.PathLike[str]) -> float:
    """Returns the MiB of a .onnx file and of the files with its external data."""
    path = Path(path)
    graph = onnx.load(path, load_external_data=False).graph
    external = {entry.value for item in graph.initializer for entry in item.external_data if entry.key == "location"}
    return sum(file.stat().st_size for file in [path, *(path.parent / name for name in external)]) / _MIB


def device_name(provider: str) -> str:
    """Returns the processor's name and number of cores, or the first GPU's name if the provider runs on a GPU."""
    if provider in ("cuda", "tensorrt"):
        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
        with contextlib.suppress(OSError):
            command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
            return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def origin_columns(provider: str, *packages: str) -> dict[str, Any]:
    """Returns the columns with versions, device, commit and time (UTC) of a row; arguments as in `package_versions`."""
    return {
        "versions": package_versions(*packages),
        "device": device_name(provider),
        "commit": source_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def package_versions(*packages: str) -> str:
    """Returns the versions of the packages that compute, in one line, followed by those of further `packages`."""
    names = ("melora_fx", "torch", "transformers", "onnx")
    versions = [f"{name} {package_version(name)}" for name in names]
    others = [f"{name} {package_version(name)}" for name in packages]
    return "; ".join([*versions, f"onnxruntime {_onnxruntime_version()}", *others])


def _onnxruntime_version() -> str:
    """Returns the version of the module, which two packages provide."""
    try:
        return import_onnxruntime().__version__
    except MELoRAError:
        return "not installed"
