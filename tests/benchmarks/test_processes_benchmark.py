"""What processes.csv says, and the paper model, which agrees with it in the cases that both have."""

import pytest

from benchmarks.common.checkout import ROOT
from benchmarks.training.processes_cell import FROZEN
from benchmarks.training.scale_model import FULL, MODELS, Layout, cost, lora, melora
from exporters.measuring.tables import read_csv

ROWS = read_csv(ROOT / "benchmarks" / "results" / "processes.csv")


def test_what_was_measured_holds() -> None:
    """Losses and gradients as in one process; no more collectives if each process has its own blocks."""
    floors = {row["case"]: row for row in ROWS if row["side"] == FROZEN}
    assert len(floors) == 11
    for row in ROWS:
        assert float(row["loss_difference"]) < 1e-5
        if row["side"].startswith("ours"):
            assert float(row["gradient_difference"]) < 1e-5
        has_own_blocks = "8 blocks" in row["side"] or ("2 blocks" in row["side"] and row["processes"] == "2")
        if row["mode"].startswith("TP") and has_own_blocks:
            for column in ("collectives", "bytes"):
                assert row[column] == floors[row["case"]][column]


def test_the_paper_model_gives_what_was_counted() -> None:
    """PEFT's LoRA adds one sum of T·r values per linear; the measured values are float32."""
    hidden, layers, tokens = 256, 4, 8 * 64
    for row in ROWS:
        if row["mode"] != "TP" or not row["side"].startswith("PEFT"):
            continue
        floor = next(each for each in ROWS if each["case"] == row["case"] and each["side"] == FROZEN)
        rank = int(row["side"].rpartition(" ")[2])
        assert int(row["bytes"]) - int(floor["bytes"]) == layers * 7 * tokens * rank * 4
        assert int(row["collectives"]) - int(floor["collectives"]) == layers * 7
        assert int(floor["bytes"]) == layers * 7 * tokens * hidden * 4


@pytest.mark.parametrize(("name", "billions"), [("Llama 2 7B", 6.738), ("Llama 3 70B", 70.55)])
def test_sizes_of_the_paper_models(name: str, billions: float) -> None:
    """Published: 6.74 and 70.6 billion parameters."""
    assert MODELS[name].num_parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_what_the_paper_model_says_of_blocks() -> None:
    model = MODELS["Llama 3 70B"]
    ours, equal_rank, equal_size, full = (
        cost(model, Layout(8, 8), adapter) for adapter in (melora(8, 8), lora(64), lora(8), FULL)
    )
    assert ours.trained_values * 8 == equal_rank.trained_values
    assert ours.trained_values == equal_size.trained_values
    assert (ours.tensor_added, full.tensor_added) == (0, 0)
    assert 0 < equal_size.tensor_added < equal_rank.tensor_added
    assert ours.trained < equal_size.trained < equal_rank.trained < full.trained
