"""PARTS: what an hour on a GPU is used for, in this order."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.checkout import source_digest
from benchmarks.common.needs import CACHE, ONNX, ONNX_IR, ONNXRUNTIME, ONNXSCRIPT, PEFT, PYTEST, TRANSFORMERS, Need

GRAPHS = (ONNX_IR, ONNXSCRIPT, ONNXRUNTIME)
"""What makes graphs and runs them."""


class Part(NamedTuple):
    """An entry; its module has the same name.

    Attributes:
        name: of the part, its module and its file of results.
        question: what it answers.
        minutes: what it takes on an H100, roughly; a run with fewer minutes gives it a share.
        needs: packages without which no case of it runs. Cases can need more.
    """

    name: str
    question: str
    minutes: float
    needs: tuple[Need, ...]

    @property
    def missing(self) -> str:
        """What to install; empty where nothing is missing."""
        return "; ".join(filter(None, (need.why_missing(CACHE) for need in self.needs)))

    @property
    def digest(self) -> str:
        """That of the code which its results depend on: the tests' too where they are what is run."""
        return source_digest(*(("tests",) if self.name == "correct" else ()))

    @property
    def run(self) -> Callable[[Any], None]:
        """Runs all cases, given the `Recorder`."""
        return importlib.import_module(f"benchmarks.gpu.{self.name}").run

    def file(self, folder: Path) -> Path:
        """Its results in `folder`."""
        return folder / f"{self.name}.jsonl"


PARTS = (
    Part("correct", "Does CUDA compute what the CPU computes?", 5, (PYTEST, TRANSFORMERS)),
    Part("sessions", "Do graphs compute on CUDA and TensorRT what torch computes?", 3, (*GRAPHS, ONNX, PEFT)),
    Part("train", "What does a training step cost over the frozen model's, here and in PEFT?", 6, (ONNX, PEFT)),
    Part("latency", "What does an adapter cost at inference, merged and unmerged?", 4, (ONNX, PEFT)),
    Part("fold", "How fast is a fold beside PEFT's merge?", 1, (ONNX, PEFT)),
)


def part_named(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)
