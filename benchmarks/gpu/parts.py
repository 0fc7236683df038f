"""PARTS: the parts of a run on a GPU, in their order."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.checkout import source_digest
from benchmarks.common.needs import CACHE, ONNX, ONNX_IR, ONNXRUNTIME, ONNXSCRIPT, PEFT, PYTEST, TRANSFORMERS, Need

GRAPHS = (ONNX_IR, ONNXSCRIPT, ONNXRUNTIME)
"""The packages that export graphs and run them."""


class Part(NamedTuple):
    """A part; its module has the same name.

    Attributes:
        name: the name of the part, of its module and of its file of results.
        question: the question that it answers.
        minutes: the approximate duration on an H100; with fewer minutes the part gets its share of them.
        needs: packages without which none of its cases runs; a case can need more.
    """

    name: str
    question: str
    minutes: float
    needs: tuple[Need, ...]

    @property
    def missing(self) -> str:
        """What to install; empty if nothing is missing."""
        return "; ".join(filter(None, (need.why_missing(CACHE) for need in self.needs)))

    @property
    def digest(self) -> str:
        """The digest of the code on which its results depend, including the tests if it runs them."""
        return source_digest(*(("tests",) if self.name == "correct" else ()))

    @property
    def run(self) -> Callable[[Any], None]:
        """The function that runs all cases, given the `Recorder`."""
        return importlib.import_module(f"benchmarks.gpu.{self.name}").run

    def file(self, folder: Path) -> Path:
        """Returns the file of its results in `folder`."""
        return folder / f"{self.name}.jsonl"


PARTS = (
    Part("correct", "Does CUDA compute what the CPU computes?", 5, (PYTEST, TRANSFORMERS)),
    Part("sessions", "Do graphs compute on CUDA and TensorRT what torch computes?", 3, (*GRAPHS, ONNX, PEFT)),
    Part("train", "What does a step cost relative to the frozen model's, here and in PEFT?", 6, (ONNX, PEFT)),
    Part("latency", "What does an adapter cost at inference, merged and unmerged?", 4, (ONNX, PEFT)),
    Part("fold", "How fast is a fold, compared with PEFT's merge?", 1, (ONNX, PEFT)),
)


def part_named(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)
