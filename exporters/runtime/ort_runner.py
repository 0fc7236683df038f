"""`OrtRunner`: an ONNX file on ONNX Runtime, on the provider that was asked for or not at all."""

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
    """An adapter's tensors by input name; `values` the same on the device, `native` ONNX Runtime's own object."""

    tensors: Arrays = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    native: Any = None


class OrtRunner:
    """Runs an ONNX file on ONNX Runtime; several threads may call `run` at once.

    A GPU provider whose libraries are missing is an error; ONNX Runtime by itself would compute on the CPU, after a
    line in the log, and again after a failed run. What the session does is in `describe()`.

    Args:
        path: a .onnx file; its external data lies beside it.
        provider: "cpu", "cuda" or "tensorrt".
        threads: number of ONNX Runtime's intra-operator threads; None leaves its default.
        provider_options: options of the provider as ONNX Runtime documents them; they go before ours (`describe()`
            shows all), None in place of a value leaves ONNX Runtime's default. `enable_cuda_graph` (for "tensorrt":
            `trt_cuda_graph_enable`) replays each run, `trt_dump_ep_context_model` writes the built engine as a graph.
        shapes: dynamic axis → (min, opt, max): TensorRT's profile, and on any provider the sizes that `run` takes; an
            axis with one size is fixed in the session.
        io_binding: bind inputs, outputs and adapters to the device's memory; None does so on GPUs.
        session_config: further entries of the session's configuration, under ONNX Runtime's own keys; they go before
            `HALF_CONFIG`, which graphs in half precision get.
        save_memory: load and run in as little memory as ONNX Runtime's CPU can, more slowly: for a single comparison.
        max_adapters: how many adapters are kept in memory; the least recently used ones leave and are read again.
        verify: read all weights first, and refuse any that are not those which `export_onnx` or `fold_onnx` wrote.

    Raises:
        ValueError: for an unknown provider, options that it lacks or that exclude each other, `shapes` that do not fit
            the graph, or `max_adapters` below 1.
        MELoRAError: where ONNX Runtime is not installed, lacks the provider or a library of it, or cannot load the
            file; where the file is not whole, or holds swappable adapters, which TensorRT and CUDA graphs do not take.
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
        """The outputs by name, for `inputs` of arrays or tensors by name; an input that the graph lacks is refused.

        Args:
            inputs: every input of the graph; a decoder's first step needs its tokens only, and a mask where texts are
                padded.
            adapter: for a graph exported with "swap", an adapter folder or an .onnx_adapter file, read at its first
                use and when it was written anew; None computes the base.

        Raises:
            ValueError: for more than one adapter.
            MELoRAError: for a missing or unknown input, a size outside of `shapes` or of what the export assumed, an
                adapter that does not fit, or what ONNX Runtime refuses.
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
        """Arrays or tensors as `onnxruntime.OrtValue`s where the session computes, for `run_on_device`."""
        return to_device(inputs, self.choice.device, self.choice.device_id)

    def run_on_device(self, values: Mapping[str, Any], adapter: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """`run` for inputs that lie on the device: `onnxruntime.OrtValue`s in and out, nothing is copied.

        Raises:
            ValueError: for more than one adapter, or with a CUDA graph, whose inputs have places of their own.
            MELoRAError: as `run`.
        """
        if self._replay is not None:
            raise ValueError("a CUDA graph keeps its inputs in places of its own: use `run`")
        self._check.refuse({name: value.shape() for name, value in values.items()})
        return self._run_bound(values, self._load(adapter))

    def with_tensors(self, tensors: Arrays) -> "OrtRunner":
        """A runner on the same session that gives these optional inputs with every run."""
        runner = copy.copy(self)
        runner._fixed = _Adapter(tensors, self.to_device(tensors))
        return runner

    def without_check(self) -> "OrtRunner":
        """A runner on the same session that takes inputs whatever the export assumed of their sizes."""
        runner = copy.copy(self)
        runner._check = self._check._replace(conditions=())
        return runner

    def describe(self) -> dict[str, Any]:
        """What the session is and does, ready for JSON: the provider asked for, and those that it has, in order, with
        all options as ONNX Runtime reports them; the number of nodes that each provider has been given; threads,
        device and versions.
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
                f"`{self.path}` has optional inputs (swappable adapters), which TensorRT and CUDA graphs cannot take: "
                'export it with `adapter="fold"` or "keep", or use the provider "cuda" without a CUDA graph'
            )

    def _load(self, adapter: str | os.PathLike[str] | None) -> _Adapter:
        """An adapter that fits the graph."""
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
