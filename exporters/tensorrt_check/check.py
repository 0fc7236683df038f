"""Reports what keeps TensorRT from building an engine of a graph, and how to build it if there are no obstacles.

Nothing here needs TensorRT or a GPU; the graph is compared with known facts about TensorRT's parser.

Sources, read in November 2026:
`trtexec`: https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/command-line-programs.html
types of TensorRT 11: https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-trtexec.html
"""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.onnx_files.onnx_file import axes_by_name, content_hash, precision_of, read_graph, required_inputs
from exporters.runtime.providers import Shapes, profile_shapes, tensorrt_options
from melora_fx import MELoRAError

from .operators import TABLE, UNCHECKED

if TYPE_CHECKING:
    import onnx_ir

    from .obstacles import Obstacle


@dataclass(frozen=True)
class TensorRTReport:
    """Whether TensorRT builds the whole of a graph, and with which options.

    Attributes:
        path: the .onnx file.
        num_nodes: the number of nodes in its main graph.
        obstacles: everything that would not build, node by node; `ok` is whether there is none.
        notes: facts that apply only to some versions, or cannot be seen in the graph.
        profile: the smallest, usual and largest shape of each input, as "input_ids:1x16,attention_mask:1x16" under
            "min", "opt" and "max"; empty if all shapes are fixed.
        trtexec: the command that builds an engine of the graph, as a list of arguments.
        provider_options: the options for ONNX Runtime's TensorrtExecutionProvider.
    """

    path: str
    num_nodes: int
    obstacles: tuple[Obstacle, ...]
    notes: tuple[str, ...]
    profile: dict[str, str]
    trtexec: tuple[str, ...]
    provider_options: dict[str, str]

    @property
    def ok(self) -> bool:
        return not self.obstacles

    def __str__(self) -> str:
        from .obstacles import group_obstacles

        verdict = "TensorRT builds all of it" if self.ok else "TensorRT would not build all of it"
        lines = [f"{self.path}: {self.num_nodes} nodes", f"  {verdict}, per {TABLE}"]
        for label, texts in (("no", group_obstacles(self.obstacles)), ("note", self.notes)):
            for text in texts:
                lines += textwrap.wrap(text, 100, initial_indent=f"  {label:6}", subsequent_indent=" " * 8)
        lines += [f"  {kind:6}{shapes}" for kind, shapes in self.profile.items()]
        lines += ["", "  " + " \\\n    ".join(map(shlex.quote, self.trtexec)), "", "  TensorrtExecutionProvider:"]
        lines += [f"    {name} = {value}" for name, value in self.provider_options.items()]
        return "\n".join(lines)


def check_tensorrt(onnx_path: str | os.PathLike[str], *, shapes: Shapes) -> TensorRTReport:
    """Checks without TensorRT whether it builds the whole of a graph, and reports the profile and options for it.

    Args:
        onnx_path: an .onnx file, with its weights next to it.
        shapes: the smallest, usual and largest size of each dynamic axis, such as `{"batch": (1, 8, 32)}`.

    Raises:
        ValueError: if `shapes` does not fit the inputs' axes.
        MELoRAError: if the file is missing or not an ONNX graph, weight files are missing or too short, an input has a
            dynamic axis without a name, or the types of the graph cannot be inferred.
    """
    from .obstacles import find_obstacles  # imports onnx

    path = Path(onnx_path)
    model = read_graph(path)
    inputs = axes_by_name(required_inputs(model))
    if unnamed := [name for name, axes in inputs.items() if "?" in axes]:
        raise MELoRAError(
            f"`{path}`: {', '.join(unnamed)} has a dynamic axis without a name, so no range can be passed"
        )
    profile = {key.split("_")[2]: value for key, value in profile_shapes(inputs, shapes).items()}
    return TensorRTReport(
        path=str(path),
        num_nodes=len(model.graph),
        obstacles=find_obstacles(model),
        notes=tuple(_notes(model)),
        profile=profile,
        trtexec=_trtexec(path, profile),
        provider_options=tensorrt_options(
            path, inputs, precision=precision_of(model), shapes=shapes, content=content_hash(path, model)
        ),
    )


def _trtexec(path: Path, profile: dict[str, str]) -> tuple[str, ...]:
    """Returns the command for trtexec.

    It keeps the types of the graph: TensorRT 10 needs --stronglyTyped for this, TensorRT 11 always keeps them.
    """
    return (
        "trtexec",
        f"--onnx={path}",
        *(f"--{kind}Shapes={shapes}" for kind, shapes in profile.items()),
        "--stronglyTyped",
        f"--saveEngine={path.with_suffix('.plan')}",
        f"--timingCacheFile={path.with_suffix('.timing')}",
        "--skipInference",
    )


def _notes(model: onnx_ir.Model) -> Iterator[str]:
    from onnx_ir import DataType

    ends = (*required_inputs(model), *model.graph.outputs)
    int64 = [value.name or "" for value in ends if value.dtype == DataType.INT64]
    if int64 or any(value.dtype == DataType.INT64 for value in model.graph.initializers.values()):
        of = f" ({', '.join(int64)})" if int64 else ""
        yield f"INT64{of}: a type of TensorRT 10; TensorRT 8 casts it to INT32 and clamps"
    if booleans := [value.name or "" for value in ends if value.dtype == DataType.BOOL]:
        yield f"BOOL ({', '.join(booleans)}): a type of TensorRT 10, for inputs and outputs too"
    if precision_of(model) == "fp16":
        yield "float16: the graph's own types are kept; --fp16 is for float32 graphs, and was removed in TensorRT 11"
    else:
        yield "float32: TensorRT multiplies in TF32 if the GPU can; add --noTF32 to compare with other runtimes"
    for op_type in sorted({node.op_type for node in model.graph} & UNCHECKED.keys()):
        yield f"{op_type}: {UNCHECKED[op_type]}; this cannot be checked here"
