"""The tables of targets, precisions, adapter forms and update forms that `export_onnx` accepts by name.

A new target is a line here. A new precision or adapter form is a line here and a file with its pass in `graph/`.
"""

import functools
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Protocol, TypeVar

import melora_fx
from exporters.graph.export import AdapterForm, Precision, Target, UpdateForm


def _later(function: str) -> Callable[..., Any]:
    """Returns a function that imports its module when it is called: the command line only lists the names below."""
    return functools.partial(_call, function)


def _call(function: str, /, *args: Any, **kwargs: Any) -> Any:
    module, _, name = function.rpartition(".")
    return getattr(import_module(module), name)(*args, **kwargs)


TARGETS = (
    Target("portable", "standard ONNX operators only"),
    Target("ort-cpu", "the fastest operators on ONNX Runtime's CPU", fusions="cpu"),
    Target(
        "ort-cuda", "the fastest operators for CUDA, fp16 by default", fusions="cuda", precision="fp16", provider="cuda"
    ),
    Target(
        "tensorrt",
        "only operators that TensorRT builds",
        provider="tensorrt",
        takes_swap=False,
        check=_later("exporters.tensorrt_check.obstacles.refuse_obstacles"),
        explain=_later("exporters.tensorrt_check.check.check_tensorrt"),
    ),
)

PRECISIONS = (
    Precision("fp32", "float32", epsilon=2**-23, tolerance=1e-4, tolerance_of_more=1e-4),
    Precision(
        "fp16",
        "half precision inside the graph",
        epsilon=2**-10,
        tolerance=2e-2,
        tolerance_of_more=4e-2,
        convert=_later("exporters.graph.half.to_float16"),
        needs_runtime=True,
    ),
)

_WRITE_FORMS = _later("exporters.graph.forms.write_forms")
_ADD_BIASES_LAST = _later("exporters.graph.forms.add_biases_last")

ADAPTERS = (
    AdapterForm("fold", "merged", values=lambda model, _: melora_fx.folded(model)),
    AdapterForm("keep", "unmerged", passes=(_WRITE_FORMS, _ADD_BIASES_LAST), stays=True),
    AdapterForm(
        "swap",
        "adapters as inputs",
        values=_later("exporters.graph.swap_inputs.distinct_values"),
        passes=(
            _later("exporters.graph.swap_inputs.own_values"),
            _WRITE_FORMS,
            _ADD_BIASES_LAST,
            _later("exporters.graph.swap_inputs.open_inputs"),
        ),
        stays=True,
        is_swappable=True,
        refuse=_later("exporters.graph.swap_inputs.refuse_without_adapters"),
        trials=_later("exporters.graph.swap_inputs.swap_trials"),
    ),
)

NO_ADAPTER = AdapterForm("none", "only the base")
"""The form of the graph of a model that has no sites, or is inside `disabled`."""

FORMS = (
    UpdateForm(
        "auto", "the faster form for each site", is_dense=_later("exporters.graph.forms.is_dense_faster"), is_gated=True
    ),
    UpdateForm("block", "as the model computes it", is_dense=lambda *_: False),
    UpdateForm("gated", "block, skipped without an adapter", is_dense=lambda *_: False, is_gated=True),
    UpdateForm("dense", "block-diagonal matrices", is_dense=lambda *_: True),
)


class _Entry(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def about(self) -> str: ...


T = TypeVar("T", bound=_Entry)


def find(option: str, name: str, table: tuple[T, ...], *, auto: str | None = None) -> T:
    """Returns the entry of `table` called `name`; "auto" means the entry called `auto`, if that is passed.

    Args:
        option: the argument of `export_onnx` that `name` was passed as, for the error.
        name: the name to look up.
        table: the entries to choose from.
        auto: the name of the entry for "auto"; None if "auto" is not special.

    Raises:
        ValueError: if no entry has this name.
    """
    entries = {entry.name: entry for entry in table}
    if auto is not None:
        entries = {"auto": entries[auto], **entries}
    if name not in [*entries]:  # a list, because a value of another type may not be hashable
        raise ValueError(f"`{option}` (={name!r}) must be one of {', '.join(map(repr, entries))}")
    return entries[name]


def in_words(table: Iterable[_Entry]) -> str:
    """Returns the names and descriptions of a table as one string, for a help text."""
    return "; ".join(f'"{entry.name}": {entry.about}' for entry in table)
