"""benchmarks/train_step.py: its cells and sides, one cell measured on a tiny Llama, and what stopping leaves."""

import importlib
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.models import fill
from torch import nn

import melora_fx

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LLAMA = (32, 64, 2, 4)
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT asks for it
]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_step")


@pytest.fixture
def sides(benchmark: ModuleType) -> ModuleType:
    return importlib.import_module("train_sides")


def tiny_cell(benchmark: ModuleType, **changes: object):
    setting = importlib.import_module("train_sides").Setting(
        "Llama", "all-linear", 2, "float32", num_blocks=4, llama=LLAMA
    )
    return replace(benchmark.Cell(setting, tokens=256), **changes)


def test_cells_differ_from_their_centre_in_one_factor(benchmark):
    cells = benchmark.all_cells(LLAMA)
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


def test_sides_adapt_the_same_linears(benchmark, sides):
    setting = tiny_cell(benchmark).setting
    models = {name: sides.make_side(name, setting) for name in sides.SIDES}
    counts = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    ours = counts["ours"]
    assert counts["frozen"] == 0
    assert counts["ours, plain nodes"] == counts["authors' loop"] == counts["PEFT LoRA, equal parameters"] == ours
    assert counts["PEFT LoRA, equal rank"] == 4 * ours
    assert counts["full fine-tuning"] == sum(p.numel() for p in models["frozen"].parameters()) - 128 * 32
    assert {site.lowering for site in melora_fx.sites(models["ours"]).values()} == {"weight"}


def test_the_loop_of_the_authors_computes_what_ours_does(benchmark, sides):
    setting = tiny_cell(benchmark).setting
    base = nn.Sequential(nn.Linear(24, 36))
    model = fill(melora_fx.rewrite(nn.Sequential(base[0]), "all-linear", setting.config))
    plain = nn.Linear(24, 36)
    plain.load_state_dict({name: model.state_dict()[f"0.{name}"] for name in ("weight", "bias")})
    loop = sides.LoopLinear(plain, setting.config)
    with torch.no_grad():
        for index in range(setting.num_blocks):
            loop.lora_a[index].weight.copy_(model[0].lora_a[index])
            loop.lora_b[index].weight.copy_(model[0].lora_b[index])
    x = torch.randn(5, 24)
    torch.testing.assert_close(loop(x), model(x))


def test_one_cell_is_measured(benchmark):
    cell = tiny_cell(benchmark)
    rows = {row["side"]: row for row in benchmark.measure(cell, 1, "cpu")}
    assert list(rows) == list(cell.sides)
    assert rows["frozen"]["ratio"] == 1.0
    for row in rows.values():
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["steps"] == benchmark.STEPS_PER_ROUND
    inputs = 2 * (32 + 32 + 64) * 256 * 4  # of q, k, v; of gate and up; of down. The one of o is kept by the attention
    saved = {name: row["saved_bytes"] - rows["frozen"]["saved_bytes"] for name, row in rows.items()}
    assert saved["ours"] <= inputs
    assert saved["PEFT LoRA, equal rank"] > saved["ours"]


def test_cells_that_are_done_are_not_measured_again(benchmark, tmp_path, monkeypatch, capsys):
    calls = []

    def measured(command, **options):
        key = command[command.index("--cell") + 1]
        calls.append(key)
        if "bfloat16" in key:
            return SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nRuntimeError: no bfloat16")
        row = dict.fromkeys(benchmark.FIELDS, 1) | {"key": key, "side": "frozen", "commit": "c", "targets": "q,v"}
        return SimpleNamespace(returncode=0, stdout=benchmark.json.dumps([row]), stderr="")

    monkeypatch.setattr(benchmark.subprocess, "run", measured)
    options = Namespace(results=tmp_path, again=False, rounds=1, device="cpu", llama="32,64,2,4")
    keys = [cell.key for cell in benchmark.all_cells(LLAMA)][:5]
    benchmark.run_cells(keys, keys, options)
    assert calls == keys
    assert "no bfloat16" in capsys.readouterr().out
    benchmark.run_cells(keys, keys, options)
    assert calls[5:] == [key for key in keys if "bfloat16" in key], "what failed is tried again"
    assert (tmp_path / "train_step.md").is_file()
    assert (tmp_path / "train_step.png").stat().st_size > 10_000
