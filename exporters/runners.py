"""One interface for everything that computes the model: `run(inputs) -> outputs`, both dicts of NumPy arrays."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from melora_fx import MELoRAError
from melora_fx.adapter_file import read_adapter

from .metadata import GraphFacts, read_facts
from .onnx_graph import named_outputs
from .runtime import Arrays, import_onnxruntime
from .swap import swap_tensors


class Runner(Protocol):
    """What `compare` and `measure_latency` need. `threads`: intra-operator threads, None for the default."""

    threads: int | None

    def run(self, inputs: Mapping[str, Any]) -> Arrays: ...


class TorchRunner:
    """Runs a torch module as it is, in its present mode, without gradients.

    Args:
        model: called with the inputs as keyword arguments.
        threads: number of torch's intra-operator threads during a run; None leaves torch's own.
    """

    def __init__(self, model: nn.Module, *, threads: int | None = None) -> None:
        self.model, self.threads = model, threads

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """The outputs by name, for `inputs` of arrays or tensors by name."""
        tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
        before = torch.get_num_threads()
        if self.threads is not None and self.threads != before:
            torch.set_num_threads(self.threads)
        try:
            with torch.no_grad():
                outputs = named_outputs(self.model(**tensors))
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)
        return {name: output.cpu().numpy() for name, output in outputs.items()}


PROVIDERS = {"cpu": "CPUExecutionProvider"}


class OrtRunner:
    """Runs an ONNX file on ONNX Runtime.

    Args:
        path: a .onnx file; its external data lies beside it.
        provider: "cpu".
        threads: number of ONNX Runtime's intra-operator threads; None leaves its default.

    Raises:
        ValueError: for an unknown provider.
        MELoRAError: where ONNX Runtime is not installed, or cannot load the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, provider: str = "cpu", threads: int | None = None) -> None:
        if provider not in PROVIDERS:
            raise ValueError(f"`provider` (={provider!r}) must be one of {', '.join(map(repr, PROVIDERS))}")
        ort = import_onnxruntime()
        self.path, self.provider, self.threads = Path(path), provider, threads
        if not self.path.is_file():
            raise MELoRAError(f"`{self.path}` does not exist")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = ort.InferenceSession(str(self.path), options, providers=[PROVIDERS[provider]])
        except Exception as error:  # ONNX Runtime's own exception types are private
            raise MELoRAError(f"ONNX Runtime cannot load `{self.path}`: {error}") from error
        self.input_names = [value.name for value in self.session.get_inputs()]
        overridable = [value.name for value in self.session.get_overridable_initializers()]
        self.adapter_names = [name for name in overridable if name not in self.input_names]
        self._adapters: dict[Path, Arrays | Any] = {}
        self._fixed: Arrays = {}
        self.output_names = [value.name for value in self.session.get_outputs()]

    def run(self, inputs: Mapping[str, Any], adapter: str | os.PathLike[str] | None = None) -> Arrays:
        """The outputs by name, for `inputs` of arrays or tensors by name; an input that the graph lacks is refused.

        Args:
            inputs: every input of the graph.
            adapter: for a graph exported with "swap", an adapter folder or an .onnx_adapter file, read once; None
                computes the base.

        Raises:
            MELoRAError: for a missing or unknown input, an adapter that does not fit, or what ONNX Runtime refuses.
        """
        missing = [name for name in self.input_names if name not in inputs]
        unknown = [name for name in inputs if name not in self.input_names]
        if missing or unknown:
            raise MELoRAError(
                f"`{self.path}` takes the inputs {self.input_names}: missing {missing}, unknown {unknown}"
            )
        feed = {name: np.asarray(value) for name, value in inputs.items()} | self._fixed
        options = None
        if adapter is not None:
            loaded = self._load(Path(adapter))
            if isinstance(loaded, dict):
                feed |= loaded
            else:
                options = import_onnxruntime().RunOptions()
                options.add_active_adapter(loaded)
        try:
            outputs = self.session.run(self.output_names, feed, options)
        except Exception as error:  # ONNX Runtime's own exception types are private
            raise MELoRAError(f"ONNX Runtime cannot run `{self.path}`: {error}") from error
        return dict(zip(self.output_names, outputs, strict=True))

    def with_tensors(self, tensors: Arrays) -> "OrtRunner":
        """A runner on the same session that gives these optional inputs with every run."""
        runner = copy.copy(self)
        runner._fixed = tensors
        return runner

    def _load(self, path: Path) -> Arrays | Any:
        """An adapter's tensors by input name, or ONNX Runtime's own adapter object."""
        if path not in self._adapters:
            facts = read_facts(self.path)
            if path.is_dir():
                self._adapters[path] = swap_tensors(read_adapter(path), facts)
            else:
                self._adapters[path] = _load_ort_adapter(path, facts, self.adapter_names)
        return self._adapters[path]


def _load_ort_adapter(path: Path, facts: GraphFacts, adapter_names: list[str]) -> Any:
    ort = import_onnxruntime()
    try:
        loaded = ort.AdapterFormat.read_adapter(str(path))
        names = list(loaded.get_parameters())
        adapter = ort.LoraAdapter()
        adapter.Load(str(path))
    except Exception as error:  # ONNX Runtime's own exception types are private
        raise MELoRAError(f"`{path}` is not an .onnx_adapter file that ONNX Runtime can read: {error}") from error
    unknown = [name for name in names if name not in adapter_names]
    if facts.adapter != "swap" or unknown:
        raise MELoRAError(f"`{path}` is for another graph than `{facts.path}`, which has no inputs {unknown}")
    return adapter
