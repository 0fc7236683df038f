"""Runs vLLM's own models and loader, without a GPU, in their own environment.

`MELORA_FX_VLLM_PYTHON` names the interpreter of an environment with vLLM 0.33, whose compiled parts are not needed.
Nothing is imported from it here: `vllm_reader.py` runs there.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

READER = Path(__file__).with_name("vllm_reader.py")


@functools.cache
def vllm_python() -> str | None:
    """Returns an interpreter that has vLLM, or None."""
    python = os.environ.get("MELORA_FX_VLLM_PYTHON", sys.executable)
    found = subprocess.run([python, "-P", "-c", "import vllm.lora.worker_manager"], capture_output=True, env=_env())
    return python if found.returncode == 0 else None


def read_by_vllm(model: Path, adapter: Path, *options: str) -> dict[str, Any]:
    """Returns what vLLM read from an adapter folder for its own model of a configuration; see `vllm_reader.py`."""
    python = vllm_python()
    if python is None:
        pytest.skip("vLLM is not installed: MELORA_FX_VLLM_PYTHON can name an interpreter that has it")
    out = adapter.with_suffix(".updates.safetensors")
    command = [python, "-P", str(READER), str(model), str(adapter), str(out), *options]
    ran = subprocess.run(command, capture_output=True, text=True, env=_env(), check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    if result["error"] is None:
        result["updates"] = load_file(out)
    return result


def _env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"VLLM_TARGET_DEVICE": "cpu"}
