"""benchmarks/experts.py: one case measured on a tiny Mixtral."""

import pytest

from benchmarks import experts

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT reads it


@pytest.mark.slow
def test_sides_train_what_their_names_say() -> None:
    by_side = {row["side"]: row for row in experts.measure(experts.QUICK[0], 2)}
    assert list(by_side) == list(experts.SIDES)
    assert by_side["frozen"]["ratio"] == 1.0
    ours = by_side["ours"]["parameters"]
    equal = by_side["PEFT LoRA, equal parameters"]["parameters"]
    assert ours == equal == by_side["PEFT LoRA, equal rank"]["parameters"] // 8
    assert by_side["frozen"]["parameters"] == 0
