"""`OrtRunner` runs an ONNX file on ONNX Runtime, on the requested provider or not at all."""

import contextlib
import copy
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.adapters.ort_adapter import check_inputs, read_ort_adapter, swap_tensors
from exporters.onnx_files.metadata import conditions_in, read_facts
from exporters.onnx_files.onnx_file import (
    axes_by_name,
    content_hash,
    has_optional_inputs,
    precision_of,
    read_graph,
    required_inputs,
)
from exporters.onnx_files.save_graph import check_weights
from exporters.onnx_runtime import Arrays, as_array, import_onnxruntime
from exporters.private import node_counts
from melora_fx import MELoRAError
from melora_fx.saving.adapter_file import read_adapter

from .adapter_cache import AdapterCache
from .cache_inputs import with_empty_cache
from .input_check import InputCheck
from .io_binding import ReplayBuffers, run_bound, to_device
from .providers import Shapes, choose_provider
from .session import default_config, make_session


@dataclass(frozen=True)
class _Adapter:
    """An adapter's tensors by input name; `values`: the same on the device; `native`: ONNX Runtime's own object."""

    tensors: Arrays = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    native: Any = None


class OrtRunner:
    """Runs an ONNX file on ONNX Runtime; several threads may call `run` at once.

    A GPU provider with missing libraries raises an error. ONNX Runtime by itself would log a line and compute on the
    CPU, and would do so after a failed run, too. `describe()` says what the session does.

    Args:
        path: a .onnx file, with its external data next to it.
        provider: "cpu", "cuda" or "tensorrt".
        threads: number of ONNX Runtime's intra-operator threads; None leaves its default.
        provider_options: options of the provider as ONNX Runtime documents them. They override ours (`describe()` shows
            all); None as a value restores ONNX Runtime's default. `enable_cuda_graph` (for "tensorrt":
            `trt_cuda_graph_enable`) replays each run, `trt_dump_ep_context_model` writes the built engine as a graph.
        shapes: dynamic axis → (min, opt, max): TensorRT's profile, and on any provider the sizes that `run` accepts; an
            axis with only one size is fixed in the session.
        io_binding: bind inputs, outputs and adapters to the device's memory; None does so only on GPUs.
        session_config: further entries of the session's configuration, under ONNX Runtime's own keys; they override
            `HALF_CONFIG`, which graphs in half precision get.
        save_memory: load and run in as little memory as ONNX Runtime's CPU allows, but slower: for one comparison.
        max_adapters: number of adapters to keep in memory; the least recently used are dropped, and read again when
            needed.
        verify: first read all weights, and refuse any that `export_onnx` or `fold_onnx` did not write.

    Raises:
        ValueError: if the provider is unknown, options are unknown to it or exclude each other, `threads` is below 1,
            `shapes` do not fit the graph, or `max_adapters` is below 1.
        MELoRAError: if ONNX Runtime is not installed, lacks the provider or one of its libraries, or cannot load the
            file; if the file is missing or incomplete; if it has swappable adapters, and the provider is TensorRT or a
            CUDA graph is requested.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str = "cpu",
        threads: int | None = None,
        provider_options: Mapping[str, Any] | None = None,
        shapes: Shapes | None = None,
        io_binding: bool | None = None,
        session_config: Mapping[str, str] | None = None,
        save_memory: bool = False,
        max_adapters: int = 32,
        verify: bool = False,
    ) -> None:
        ort = import_onnxruntime()
        self.path = Path(path)
        self.provider = provider
        self.threads = threads
        self._shapes = dict(shapes or {})
        self._adapters = AdapterCache[_Adapter](max_adapters)
        if not os.path.isfile(self.path):
            raise MELoRAError(f"`{self.path}` does not exist")
        graph = read_graph(self.path)
        if verify:
            check_weights(self.path, graph)
        precision = precision_of(graph)
        axes = axes_by_name(required_inputs(graph))
        self._check = InputCheck(self.path, axes, self._shapes, conditions_in(graph, self.path))
        self.choice = choose_provider(
            provider,
            self.path,
            axes,
            precision=precision,
            content=content_hash(self.path, graph) if provider == "tensorrt" else "",
            threads=threads,
            provider_options=provider_options,
            shapes=shapes,
            io_binding=io_binding,
        )
        if has_optional_inputs(graph):
            self._check_takes_optional_inputs()
        self.session_config = default_config(precision, save_memory=save_memory) | dict(session_config or {})
        self.session = make_session(ort, self.path, self.choice, self.session_config, save_memory=save_memory)
        self.input_names = [value.name for value in self.session.get_inputs()]
        self.output_names = [value.name for value in self.session.get_outputs()]
        overridable = [value.name for value in self.session.get_overridable_initializers()]
        self.adapter_names = [name for name in overridable if name not in self.input_names]
        self._fixed = _Adapter()
        self._lock = threading.Lock()
        self._replay: ReplayBuffers | None = None
        if self.choice.cuda_graph:
            self._replay = ReplayBuffers(self.session, self.choice.device, self.choice.device_id)

    def run(self, inputs: Mapping[str, Any], adapter: str | os.PathLike[str] | None = None) -> Arrays:
        """Returns the outputs as NumPy arrays by name.

        Args:
            inputs: arrays or tensors by name, one for every input of the graph and no others. A decoder's first step
                needs only its tokens, and a mask if texts are padded.
            adapter: for a graph exported with "swap", an adapter folder or an .onnx_adapter file, which is read at its
                first use, and again if it has changed; None computes the base.

        Raises:
            ValueError: if several adapters are passed.
            MELoRAError: if an input is missing or unknown, a size is outside `shapes` or what the export assumed, the
                adapter does not fit, or ONNX Runtime refuses the run.
        """
        given = with_empty_cache(self.session.get_inputs(), inputs)
        arrays = {name: as_array(value) for name, value in given.items()}
        self._check.refuse({name: array.shape for name, array in arrays.items()})
        loaded = self._load(adapter)
        if self._replay is not None:
            with self._lock, self._own_errors():
                return self._replay.run(arrays)
        if self.choice.io_binding:
            with self._own_errors():
                values = self.to_device(arrays)
            outputs = self._run_bound(values, loaded)
            return {name: value.numpy() for name, value in outputs.items()}
        return self._run_unbound(arrays, loaded)

    def to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Copies arrays or tensors, by name, to the session's device: `onnxruntime.OrtValue`s for `run_on_device`."""
        return to_device(inputs, self.choice.device, self.choice.device_id)

    def run_on_device(self, values: Mapping[str, Any], adapter: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Runs on `onnxruntime.OrtValue`s on the device, and returns such values by name; copies nothing.

        Args:
            values: every input of the graph by name, also at a decoder's first step.
            adapter: as in `run`.

        Raises:
            ValueError: if several adapters are passed, or the session has a CUDA graph, which has its own inputs.
            MELoRAError: as `run`.
        """
        if self._replay is not None:
            raise ValueError("a CUDA graph keeps its inputs in its own buffers: use `run`")
        self._check.refuse({name: value.shape() for name, value in values.items()})
        return self._run_bound(values, self._load(adapter))

    def with_tensors(self, tensors: Arrays) -> "OrtRunner":
        """Returns a runner on the same session that passes these optional inputs in every run."""
        runner = copy.copy(self)
        runner._fixed = _Adapter(tensors, self.to_device(tensors))
        return runner

    def without_check(self) -> "OrtRunner":
        """Returns a runner on the same session that does not check what the export assumed about sizes."""
        runner = copy.copy(self)
        runner._check = self._check._replace(conditions=())
        return runner

    def describe(self) -> dict[str, Any]:
        """Returns what the session is and does, ready for JSON.

        This includes the requested provider; the session's providers in order, with all options as ONNX Runtime reports
        them; the number of nodes on each provider; threads, device and the version of ONNX Runtime.
        """
        choice = self.choice
        return {
            "graph": str(self.path),
            "provider": choice.provider,
            "providers": list(self.session.get_providers()),
            "provider_options": self.session.get_provider_options(),
            "nodes": node_counts(self.session),
            "threads": choice.threads,
            "device": "cpu" if choice.device == "cpu" else f"{choice.device}:{choice.device_id}",
            "io_binding": choice.io_binding,
            "cuda_graph": choice.cuda_graph,
            "fixed_axes": choice.fixed_axes,
            "session_config": self.session_config,
            "shapes": {axis: list(sizes) for axis, sizes in self._shapes.items()},
            "assumed": [condition.text for condition in self._check.conditions],
            "onnxruntime": import_onnxruntime().__version__,
        }

    def _run_unbound(self, arrays: Arrays, loaded: _Adapter) -> Arrays:
        feed = arrays | self._fixed.tensors
        options = None
        if loaded.native is None:
            feed |= loaded.tensors
        else:
            options = import_onnxruntime().RunOptions()
            options.add_active_adapter(loaded.native)
        with self._own_errors():
            outputs = self.session.run(self.output_names, feed, options)
        return dict(zip(self.output_names, outputs, strict=True))

    def _run_bound(self, values: Mapping[str, Any], loaded: _Adapter) -> dict[str, Any]:
        values = {**values, **self._fixed.values, **loaded.values}
        with self._own_errors():
            return run_bound(self.session, values, self.output_names, self.choice.device, self.choice.device_id)

    def _check_takes_optional_inputs(self) -> None:
        if self.provider == "tensorrt" or self.choice.cuda_graph:
            raise MELoRAError(
                f"`{self.path}` has optional inputs (swappable adapters), which TensorRT and CUDA graphs refuse: "
                'export it with `adapter="fold"` or "keep", or use the provider "cuda" without a CUDA graph'
            )

    def _load(self, adapter: str | os.PathLike[str] | None) -> _Adapter:
        """Returns the adapter, which is checked against the graph when it is read; an empty one for None."""
        if adapter is None:
            return _Adapter()
        if isinstance(adapter, list | tuple):
            raise ValueError(f"`adapter` (={adapter!r}) must be one adapter: a run computes one")
        return self._adapters.get(adapter, self._read_adapter)

    def _read_adapter(self, path: Path) -> _Adapter:
        facts = read_facts(self.path)
        native = None
        if path.is_dir():
            tensors = swap_tensors(read_adapter(path), facts)
        else:
            native, tensors = read_ort_adapter(path, facts)
        expected = {value.name: value.shape for value in self.session.get_overridable_initializers()}
        check_inputs(path, tensors, self.path, expected)
        return _Adapter(tensors, self.to_device(tensors), native)

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ONNX Runtime's own exception types are private
            raise MELoRAError(f"ONNX Runtime cannot run `{self.path}`: {error}") from error
