"""The sides, tasks and input shapes that end_to_end compares, and how it shows ratios."""

from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.studies.runs import Arm

PEFT_SIDE = "PEFT and optimum-onnx"
OUR_SIDE = "ours, 8 blocks of rank 8"


class Side(NamedTuple):
    """One way that a user can go."""

    name: str
    arm: Arm
    compiled: bool = False


SIDES = (
    Side(PEFT_SIDE, Arm("LoRA 8", "LoRA", 8)),
    Side(f"{PEFT_SIDE}, compiled", Arm("LoRA 8", "LoRA", 8), compiled=True),
    Side(OUR_SIDE, Arm("MELoRA 8×8", "MELoRA", 8, 8)),
    Side(f"{OUR_SIDE}, compiled", Arm("MELoRA 8×8", "MELoRA", 8, 8), compiled=True),
    Side("ours, 8 blocks of rank 1", Arm("MELoRA 8×1", "MELoRA", 1, 8)),
)
"""The first four train equally many parameters."""
QUICK_SIDES = (SIDES[0], SIDES[3])


class Story(NamedTuple):
    """A task. `size`: examples per epoch, or steps. `quality`: the score of the served graph."""

    name: str
    model: str
    targets: tuple[str, ...]
    task: str
    size: int
    learning_rate: float
    quality: str


STORIES = (
    Story("MRPC", "MiniLM-L6", ("query", "value"), "text-classification", 2500, 1e-3, "accuracy"),
    Story("stories", "SmolLM2-135M", ("q_proj", "v_proj"), "text-generation-with-past", 40, 1e-3, "held-out loss"),
)
SHAPES = {"1 × 32": (1, 32), "8 × 64": (8, 64)}


def spread(row: Mapping[str, str], column: str) -> str:
    """Returns a median ratio, with the smallest and the largest unless all three are formatted alike."""
    middle, *ends = (f"{float(row[column + end]):.2f}" for end in ("", "_least", "_most"))
    return middle if set(ends) == {middle} else f"{middle}, {ends[0]} to {ends[1]}"
