"""What decoding measures: the adapters, the steps, and the sides that are compared."""

from dataclasses import dataclass
from typing import NamedTuple

TARGETS: dict[str, list[str] | str] = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"}


@dataclass(frozen=True)
class Setting:
    """A model and an adapter of it: N blocks of rank R here, a LoRA of rank N R elsewhere, of equal updates."""

    model: str
    targets: str
    total_rank: int
    num_blocks: int = 8

    @property
    def rank(self) -> int:
        return self.total_rank // self.num_blocks

    @property
    def name(self) -> str:
        return f"{self.targets}, total rank {self.total_rank}"

    @property
    def file_name(self) -> str:
        return f"{self.model}-{self.targets.replace(',', '')}-{self.total_rank}"


class Step(NamedTuple):
    """One run of a decoder; `share`: of the time that a process has."""

    past: int
    new: int
    share: float = 0.0

    @property
    def end(self) -> int:
        """Tokens behind it."""
        return self.past + self.new

    @property
    def name(self) -> str:
        return f"a token after {self.past}" if self.past else f"the first {self.new}"


class Side(NamedTuple):
    """What is compared. `graph`: as `Workshop` names it; `equals`: the model whose logits it must have."""

    name: str
    graph: str
    equals: str = "adapted"
    gives_adapter: bool = False


SIDES = (
    Side("builder, base", "builder", equals="base"),
    Side("merged", "fold"),
    Side("unmerged", "keep"),
    Side("swap, none active", "swap", equals="base"),
    Side("swap, active", "swap", gives_adapter=True),
    Side("builder, LoRA baked in", "baked"),
    Side("Olive, none active", "olive", equals="base"),
    Side("Olive, active", "olive", gives_adapter=True),
    Side("torch eager", "torch"),
)
"""The first is the reference. "builder" is onnxruntime-genai's, and so is "baked", whose LoRA, PEFT's, is constants;
"olive" is that with the LoRA as optional inputs; "torch" is the merged model of transformers."""
REFERENCE, MERGED, TORCH = SIDES[0].name, SIDES[1].name, SIDES[-1].name

GOALS = {
    "merged": {"q,v": 1.00, "all-linear": 1.00},
    "unmerged": {"q,v": 1.04, "all-linear": 1.10},
    "swap, none active": {"q,v": 1.02, "all-linear": 1.04},
}
"""The largest ratio to the reference that a side should have, by targets."""
TIMES_FASTER_THAN_TORCH = 2.0
"""What the merged graph should be at least."""

SETTINGS = tuple(Setting("SmolLM2-135M", targets, rank) for targets in TARGETS for rank in (8, 64))
STEPS = (Step(64, 1, 0.2), Step(512, 1, 0.25), Step(0, 64, 0.2), Step(0, 512, 0.35))
QUICK_SETTINGS = (Setting("Tiny", "q,v", 8, num_blocks=4),)
QUICK_STEPS = (Step(8, 1, 0.5), Step(0, 8, 0.5))


def settings_and_steps(quick: bool) -> tuple[tuple[Setting, ...], tuple[Step, ...]]:
    return (QUICK_SETTINGS, QUICK_STEPS) if quick else (SETTINGS, STEPS)
