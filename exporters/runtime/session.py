"""Makes sessions that compute on the requested provider, or raises an error."""

import contextlib
import ctypes
import importlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.private import provider_library
from melora_fx import MELoRAError

from .providers import CUDA, TENSORRT, ProviderChoice

_DISABLE = "optimization.disable_specified_optimizers"

HALF_CONFIG = {_DISABLE: "NchwcTransformer"}
"""Session configuration for graphs in half precision. The disabled pass, for convolutions on x86, ends the process at
some graphs (Transpose → Cast → MatMul: https://github.com/microsoft/onnxruntime/issues/28392; seen with 1.32)."""

_CONFIGS = {"fp16": HALF_CONFIG}
"""Precision of a graph's weights → the configuration of its sessions."""

SAVE_MEMORY_CONFIG = {
    "session.disable_prepacking": "1",  # prepared copies of the weights
    _DISABLE: f"{HALF_CONFIG[_DISABLE]};ConstantFolding;FuseFp16InitializerToFp32NodeTransformer",
}
"""Session configuration without copies of the weights: a CPU would widen half precision to float32 in advance."""

_LIBRARIES = {CUDA: "cuda", TENSORRT: "tensorrt"}


def default_config(precision: str, *, save_memory: bool) -> dict[str, str]:
    """Returns the session configuration for a graph whose weights have this precision."""
    return SAVE_MEMORY_CONFIG if save_memory else _CONFIGS.get(precision, {})


def require_provider(ort: Any, name: str) -> None:
    """Loads the libraries of a provider; without them ONNX Runtime would log a line and compute on the CPU.

    The loader does not look into NVIDIA's pip packages: ONNX Runtime's `preload_dlls` loads the libraries of CUDA and
    cuDNN from there, and importing `tensorrt_libs` loads those of TensorRT.

    Args:
        ort: the `onnxruntime` module.
        name: the provider's name in ONNX Runtime.

    Raises:
        MELoRAError: if the package has no such provider, or a library is missing; names it and where to get it.
    """
    available = ort.get_available_providers()
    if name not in available:
        raise MELoRAError(
            f"{name} is not in the installed onnxruntime ({ort.__version__}: {', '.join(available)}): "
            'pip uninstall onnxruntime, then pip install "melora_fx[gpu]"; of onnxruntime and onnxruntime-gpu only one '
            "may be installed, because they share a folder"
        )
    library = provider_library(ort, _LIBRARIES[name]) if name in _LIBRARIES else None
    if library is None or not library.is_file():
        return
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every missing library, needed or not
        ort.preload_dlls()
    if name == TENSORRT:
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorrt_libs")
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        if missing := re.match(r"(\S+): cannot open shared object file", str(error)):
            raise MELoRAError(f"{name} cannot be loaded: {missing[1]} is missing; {_remedy(missing[1])}") from error


def _remedy(library: str) -> str:
    if library.startswith("libcuda."):
        return "it comes with NVIDIA's driver: is there a GPU, and is its driver installed?"
    if library.startswith(("libnvinfer", "libnvonnxparser")):
        major = int(library.rpartition(".")[2])
        return f'it is part of TensorRT {major}: pip install "tensorrt>={major},<{major + 1}"'
    return 'pip install "melora_fx[gpu]" brings CUDA and cuDNN'


def make_session(
    ort: Any, path: Path, choice: ProviderChoice, config: Mapping[str, str] | None = None, *, save_memory: bool = False
) -> Any:
    """Returns a session for the file `path` with every provider of the choice, and without a fallback.

    `config`: further entries of the session's configuration. `save_memory`: values are freed after their last use, and
    each weight in half precision is widened only when it is used.

    Raises:
        ValueError: if ONNX Runtime does not know a provider option.
        MELoRAError: if a provider or one of its libraries is missing, or ONNX Runtime cannot load the file.
    """
    for name, _ in choice.providers:
        require_provider(ort, name)
    options = _session_options(ort, choice, config or {}, save_memory)
    try:
        # with `enable_fallback` it would print the failure and try again on the CPU, now and at every run
        session = ort.InferenceSession(str(path), options, providers=[*choice.providers], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own exception types are private
        if unknown := re.search(r'(?:Unknown provider option: |Invalid TensorRT EP option: )"?(\w+)', str(error)):
            raise ValueError(
                f"`provider_options`: `{unknown[1]}` is not an option of {choice.providers[0][0]}"
            ) from error
        raise MELoRAError(f"ONNX Runtime cannot load `{path}` on {choice.provider}: {_reason(error)}") from error
    lacking = [name for name, _ in choice.providers if name not in session.get_providers()]
    if lacking:
        raise MELoRAError(
            f"ONNX Runtime has loaded `{path}` without {', '.join(lacking)}, and would compute on "
            f"{', '.join(session.get_providers())}: a library is missing, or there is no GPU; its log names the cause"
        )
    return session


def _session_options(ort: Any, choice: ProviderChoice, config: Mapping[str, str], save_memory: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    if save_memory:
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if choice.threads is not None:
        options.intra_op_num_threads = choice.threads
    for axis, size in choice.fixed_axes.items():
        options.add_free_dimension_override_by_name(axis, size)
    return options


def _reason(error: Exception) -> str:
    """Returns the message of CUDA or TensorRT, without the C++ signatures before it; otherwise the whole text."""
    said = re.search(r"CUDA failure \d+: [^;]*\w|Failed to parse provider option.*|(?<=\[TensorRT\] ).*", str(error))
    return said[0] if said else str(error)
