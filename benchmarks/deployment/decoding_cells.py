"""The adapters and the steps that decoding measures, and the sides that it compares."""

from dataclasses import dataclass
from typing import NamedTuple

TARGETS: dict[str, list[str] | str] = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"}


@dataclass(frozen=True)
class Setting:
    """A model and its adapter: N blocks of rank R here, and a LoRA of rank N R with equal updates elsewhere."""

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
    """One run of a decoder: `new` tokens after `past` ones. `share`: its share of the time of a process."""

    past: int
    new: int
    share: float = 0.0

    @property
    def end(self) -> int:
        """The number of tokens after it."""
        return self.past + self.new

    @property
    def name(self) -> str:
        return f"a token after {self.past}" if self.past else f"the first {self.new}"


class Side(NamedTuple):
    """A side of the comparison. `graph`: its name in `Workshop`; `equals`: the model whose logits it must have."""

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
"""The first is the reference. "builder" and "baked" are from onnxruntime-genai's builder; "baked" has PEFT's LoRA as
constants, "olive" has it as optional inputs. "torch" is the merged model of transformers."""
REFERENCE, MERGED, TORCH = SIDES[0].name, SIDES[1].name, SIDES[-1].name

GOALS = {
    "merged": {"q,v": 1.00, "all-linear": 1.00},
    "unmerged": {"q,v": 1.04, "all-linear": 1.10},
    "swap, none active": {"q,v": 1.02, "all-linear": 1.04},
}
"""The largest ratio to the reference that a side should have, by targets."""
TIMES_FASTER_THAN_TORCH = 2.0
"""How many times faster than torch the merged graph should be at least."""

SETTINGS = tuple(Setting("SmolLM2-135M", targets, rank) for targets in TARGETS for rank in (8, 64))
STEPS = (Step(64, 1, 0.2), Step(512, 1, 0.25), Step(0, 64, 0.2), Step(0, 512, 0.35))
QUICK_SETTINGS = (Setting("Tiny", "q,v", 8, num_blocks=4),)
QUICK_STEPS = (Step(8, 1, 0.5), Step(0, 8, 0.5))


def settings_and_steps(quick: bool) -> tuple[tuple[Setting, ...], tuple[Step, ...]]:
    return (QUICK_SETTINGS, QUICK_STEPS) if quick else (SETTINGS, STEPS)
