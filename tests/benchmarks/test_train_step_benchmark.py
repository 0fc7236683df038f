"""benchmarks/train_step.py: its cells and sides, and one cell measured on a tiny Llama."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from support.models import fill
from torch import nn

import melora_fx
from benchmarks import train_step
from benchmarks.training.train_cells import Cell, all_cells
from benchmarks.training.train_sides import SIDES, LoopLinear, Setting, make_side

LLAMA = (32, 64, 2, 4)
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT reads it
]


def tiny_cell() -> Cell:
    return Cell(Setting("Llama", "all-linear", 2, "float32", num_blocks=4, llama=LLAMA), tokens=256)


def test_cells_differ_from_their_centre_in_one_factor():
    cells = all_cells(LLAMA)
    assert 35 <= len(cells) <= 45
    assert len({cell.key for cell in cells}) == len(cells)

    def facts(cell):
        names = ("threads", "tokens", "keeps_memory")
        return vars(cell.setting) | {name: getattr(cell, name) for name in names}

    for model in ("MiniLM-L6", "SmolLM2-135M", "Llama"):
        for mode in ("eager", "compiled"):
            centre, *others = [c for c in cells if (c.setting.model, c.mode) == (model, mode)]
            for cell in others:
                assert sum(facts(centre)[name] != value for name, value in facts(cell).items()) == 1, cell.key
    largest = [cell for cell in cells if cell.tokens == 8192]
    assert {cell.sides for cell in largest} == {("frozen", "ours", "PEFT LoRA, equal rank")}


def test_sides_adapt_the_same_linears():
    setting = tiny_cell().setting
    models = {name: make_side(name, setting) for name in SIDES}
    counts = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    ours = counts["ours"]
    assert counts["frozen"] == 0
    assert counts["ours, plain nodes"] == counts["authors' loop"] == counts["PEFT LoRA, equal parameters"] == ours
    assert counts["PEFT LoRA, equal rank"] == 4 * ours
    assert counts["full fine-tuning"] == sum(p.numel() for p in models["frozen"].parameters()) - 128 * 32
    assert {site.lowering for site in melora_fx.sites(models["ours"]).values()} == {"weight"}


def test_the_loop_of_the_authors_computes_what_ours_does():
    setting = tiny_cell().setting
    base = nn.Sequential(nn.Linear(24, 36))
    model = fill(melora_fx.rewrite(nn.Sequential(base[0]), "all-linear", setting.config))
    plain = nn.Linear(24, 36)
    plain.load_state_dict({name: model.state_dict()[f"0.{name}"] for name in ("weight", "bias")})
    loop = LoopLinear(plain, setting.config)
    with torch.no_grad():
        for index in range(setting.num_blocks):
            loop.lora_a[index].weight.copy_(model[0].lora_a[index])
            loop.lora_b[index].weight.copy_(model[0].lora_b[index])
    x = torch.randn(5, 24)
    torch.testing.assert_close(loop(x), model(x))


@pytest.mark.slow
def test_one_cell_is_measured():
    cell = tiny_cell()
    rows = {row["side"]: row for row in train_step.measure(cell, 1, "cpu")}
    assert list(rows) == list(cell.sides)
    assert rows["frozen"]["ratio"] == 1.0
    for row in rows.values():
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["rounds"] == train_step.STEPS_PER_ROUND
    inputs = 2 * (32 + 32 + 64) * 256 * 4 / 2**20  # of q, k, v; of gate and up; of down. The attention keeps that of o
    saved = {name: row["saved_mib"] - rows["frozen"]["saved_mib"] for name, row in rows.items()}
    assert saved["ours"] <= inputs
    assert saved["PEFT LoRA, equal rank"] > saved["ours"]


@pytest.mark.slow
def test_a_side_stays_compiled_when_the_next_one_is():
    cell = replace(tiny_cell(), mode="compiled")
    steps = [train_step.prepare_side(name, cell, "cpu", "aot_eager")[0] for name in ("frozen", "ours")]
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    for step in steps:
        step()
    assert stats["unique_graphs"] == before > 0


def test_the_environment_of_a_cell_that_keeps_its_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(train_step, "run_apart", lambda module, which, **options: calls.append(options) or [])
    options = Namespace(quick=False, llama="32,64,2,4", rounds=1, device="cpu")
    for keeps_memory in (False, True):
        train_step.measure_apart(replace(tiny_cell(), keeps_memory=keeps_memory), options)
    assert [call["environment"] for call in calls] == [{}, train_step.KEEP_MEMORY]
