"""The report on an export: what was written, and its errors against torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExportReport:
    """The report on an exported graph: what was written, and its errors against torch. `str()` is a summary.

    Attributes:
        path: the .onnx file.
        files: every file written, as names relative to the folder of `path`.
        adapter: the form of the adapters in the graph, a name in `exporters.targets.ADAPTERS`, or "none".
        target: the runtime that the graph is for, a name in `exporters.targets.TARGETS`.
        precision: a name in `exporters.targets.PRECISIONS`.
        forms: number of unmerged sites by form, "block" or "dense".
        opset: version of the ONNX operator set.
        num_nodes: number of nodes, subgraphs included.
        op_counts: number of nodes by operator type, subgraphs included.
        inputs: name → axes: a number for a fixed size, a name for a dynamic axis.
        outputs: the same for the outputs.
        ranges: name of each dynamic axis → the sizes for which the graph is correct, in words.
        assumed: all conditions on the inputs' sizes that the export assumed; `OrtRunner` checks them.
        constants: argument of the model → its constant value in the graph.
        num_adapter_inputs: number of optional inputs for an adapter's tensors.
        compared: the comparisons with torch, in words; empty without `verify`.
        max_abs_error: the largest error of those comparisons; None if nothing was compared.
        max_rel_error: the largest error relative to the largest value of its output; None if nothing was compared.
        encoder: the report on the encoder's graph, if this one is on the decoder's graph of an encoder-decoder model
            with a cache; else None.
        notes: messages for the user, such as one on missing tokenizer files.
        seconds: duration of the export of this graph, in seconds.
    """

    path: str
    files: tuple[str, ...]
    adapter: str
    target: str
    precision: str
    forms: dict[str, int]
    opset: int
    num_nodes: int
    op_counts: dict[str, int]
    inputs: dict[str, tuple[int | str, ...]]
    ranges: dict[str, str]
    assumed: tuple[str, ...]
    constants: dict[str, Any]
    num_adapter_inputs: int
    outputs: dict[str, tuple[int | str, ...]]
    compared: tuple[str, ...]
    max_abs_error: float | None
    max_rel_error: float | None
    notes: tuple[str, ...]
    seconds: float
    encoder: "ExportReport | None" = None

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in list(self.op_counts.items())[:6])
        lines = [] if self.encoder is None else [str(self.encoder)]
        lines += [
            f"{self.path}: {self.target}, {self.precision}, opset {self.opset}, {self.seconds:.1f} s",
            f"  {self.num_nodes} nodes: {counts}, …",
        ]
        lines += [f"  in   {line}" for line in _in_lines(self.inputs)]
        lines += [f"  axis {axis}: {sizes}" for axis, sizes in self.ranges.items()]
        lines += [f"  for {name}={value!r} only" for name, value in self.constants.items()]
        if self.num_adapter_inputs:
            lines.append(f"  in   {self.num_adapter_inputs} optional tensors of an adapter, of any rank")
        lines += [f"  out  {line}" for line in _in_lines(self.outputs)]
        if self.forms:
            lines.append("  unmerged sites: " + ", ".join(f"{count} {form}" for form, count in self.forms.items()))
        if self.max_abs_error is not None:
            lines.append(
                f"  equal to torch in {len(self.compared)} comparisons: "
                f"max abs error {self.max_abs_error:.1e}, relative {self.max_rel_error:.1e}"
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _in_lines(tensors: Mapping[str, Sequence[int | str]]) -> list[str]:
    """Returns lines of name and axes, one for all layers: `present.0…29.key (batch, 3, total_sequence, 64)`."""
    layers: dict[tuple[str, ...], list[str]] = {}
    for name, axes in tensors.items():
        before, number, after = re.fullmatch(r"(.*?)(\.\d+\.|$)(.*)", name).groups()  # type: ignore[union-attr]
        layers.setdefault((before, after, ", ".join(map(str, axes))), []).append(number)
    lines = []
    for (before, after, axes), numbers in layers.items():
        span = numbers[0] if len(numbers) == 1 else f"{numbers[0][:-1]}…{numbers[-1][1:]}"
        lines.append(f"{before}{span}{after} ({axes})")
    return lines
