"""What graphs can be exported for and as, whole: each list holds all that `export_onnx` takes by name.

A further target is a line here; a precision, or a way to hold adapters, a line here and a file of its pass in `graph/`.
"""

from collections.abc import Iterable
from typing import Protocol, TypeVar

from exporters.graph.export import AdapterForm, Precision, Target, UpdateForm
from exporters.graph.forms import add_biases_last, is_dense_faster, write_forms
from exporters.graph.half import to_float16
from exporters.graph.swap_inputs import distinct_values, open_inputs, own_values, refuse_without_adapters, swap_trials
from exporters.tensorrt_check.check import check_tensorrt
from exporters.tensorrt_check.obstacles import refuse_obstacles
from melora_fx import folded

TARGETS = (
    Target("portable", "standard ONNX operators only"),
    Target("ort-cpu", "ONNX Runtime's fused operators for a CPU", fusions="cpu"),
    Target("ort-cuda", "those for CUDA, by default in fp16", fusions="cuda", precision="fp16", provider="cuda"),
    Target(
        "tensorrt",
        "only what TensorRT builds",
        provider="tensorrt",
        takes_swap=False,
        check=refuse_obstacles,
        explain=check_tensorrt,
    ),
)

PRECISIONS = (
    Precision("fp32", "float32", tolerance=1e-4, tolerance_of_more=1e-4),
    Precision("fp16", "half precision inside", 2e-2, tolerance_of_more=4e-2, convert=to_float16, needs_runtime=True),
)

ADAPTERS = (
    AdapterForm("fold", "merged", values=lambda model, _: folded(model)),
    AdapterForm("keep", "unmerged", passes=(write_forms, add_biases_last), stays=True),
    AdapterForm(
        "swap",
        "adapters as inputs",
        values=distinct_values,
        passes=(own_values, add_biases_last, open_inputs),
        stays=True,
        is_swappable=True,
        refuse=refuse_without_adapters,
        trials=swap_trials,
    ),
)

NO_ADAPTER = AdapterForm("none", "the base alone")
"""What the graph of a model holds that has no sites, or is inside `disabled`."""

FORMS = (
    UpdateForm("auto", "the faster", is_dense=is_dense_faster),
    UpdateForm("block", "as the model computes it", is_dense=lambda *_: False),
    UpdateForm("dense", "block-diagonal matrices", is_dense=lambda *_: True),
)


class _Entry(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def about(self) -> str: ...


T = TypeVar("T", bound=_Entry)


def find(option: str, name: str, table: tuple[T, ...], *, auto: str | None = None) -> T:
    """The entry of a table that the argument `option` names; "auto" means the one called `auto`, if given.

    Raises:
        ValueError: for an unknown name.
    """
    entries = {entry.name: entry for entry in table}
    if auto is not None:
        entries = {"auto": entries[auto], **entries}
    if name not in [*entries]:  # whatever type it has
        raise ValueError(f"`{option}` (={name!r}) must be one of {', '.join(map(repr, entries))}")
    return entries[name]


def in_words(table: Iterable[_Entry]) -> str:
    """A table for a person to choose from."""
    return "; ".join(f'"{entry.name}": {entry.about}' for entry in table)
