"""How much does folding a trained adapter into a bfloat16 base lose, compared with PEFT's merge?

SmolLM2-135M-Instruct in bfloat16, with adapters of 8 blocks of rank 8 in every linear, trained for a minute on the
first half of the stories in the text. PEFT gets the same update as a LoRA of rank 64. It merges with its defaults,
which round once, and with `safe_merge=True`, which rounds the update and then the sum. Measures for each site the share
of the adapter that the merge rounds away,

    ‖merged - (W + Δ)‖ / ‖Δ‖        in float64

and then the loss on the other half of the stories. Losses are computed in bfloat16, as the model runs, and with the
same weights in float32, which shows only the rounding of the weights. Writes fold_rounding.csv, with a row for each
site and side and one for each way to run the adapter, and fold_rounding.md. --quick uses a tiny model.
"""

import copy
import functools
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaForCausalLM

import melora_fx
from exporters.measuring.tables import markdown_table
from melora_fx import AdapterSite, MELoRAConfig, MELoRAError

from .common.cases import Case, Row, run_cases
from .common.models import copy_into_lora, equal_lora, load_smollm2
from .common.needs import SMOLLM2
from .common.origin import written_by
from .common.random_models import llama_config
from .common.stories import read_windows, train_adapter, why_no_text

CONFIG = MELoRAConfig(rank=8, num_blocks=8, alpha=16)
SIDES = ("ours", "PEFT", "PEFT safe_merge")
TOLERANCE = 1e-6
"""Of the comparison with PEFT: both multiply in float32, and the order of the sums differs between processors."""


def run(options: Namespace) -> int:
    torch.set_num_threads(1)
    name = "a tiny Llama" if options.quick else "SmolLM2-135M-Instruct"
    missing = why_no_text(options.text) or ("" if options.quick else SMOLLM2.why_missing(options.cache))
    case = Case(f"{name}, {options.steps} steps", functools.partial(measure, options), missing)
    settings = f"steps {options.steps}, text {options.text.name}"
    return run_cases(options, [case], settings=settings, write_report=write_report)


def tiny_llama() -> tuple[nn.Module, Any]:
    """Returns a random model of bytes, and its tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(64, 128, 2, 4, vocab_size=256))
    return model, lambda text: SimpleNamespace(input_ids=list(text.encode()))


def measure(options: Namespace) -> list[Row]:
    """Returns the rows of every site and side, and then of every way to run the adapter.

    Raises:
        MELoRAError: if our fold loses more than PEFT's merge at a site.
    """
    torch.manual_seed(0)
    base, tokenizer = tiny_llama() if options.quick else load_smollm2()
    base = base.to(torch.bfloat16).eval()
    train, held_out = read_windows(options.text, tokenizer)
    held_out = held_out[:2] if options.quick else held_out
    unmerged = melora_fx.rewrite(copy.deepcopy(base), "all-linear", CONFIG)
    train_adapter(unmerged, train, options.steps)
    sites = melora_fx.sites(unmerged)
    models = (
        melora_fx.fold(copy.deepcopy(unmerged)),
        merged_by_peft(base, sites),
        merged_by_peft(base, sites, safe_merge=True),
    )
    merged = dict(zip(SIDES, models, strict=True))
    weights = {name: {side: model.get_parameter(f"{name}.weight") for side, model in merged.items()} for name in sites}
    rows = [row for name, site in sites.items() for row in measure_site(site, weights[name])]
    if worse := [row["site"] for row in rows if row["side"] != "ours" and row["ratio"] < 1 / (1 + TOLERANCE)]:
        raise MELoRAError(f"our fold loses more than PEFT's merge at {', '.join(worse)}")
    rows += measure_losses(base, unmerged, merged, held_out)
    for row in rows:
        row |= {"held_out_tokens": held_out.numel(), "steps": options.steps}
        if row["side"].startswith("merged, "):
            side = row["side"].removeprefix("merged, ")
            row["differing_weights"] = sum(int((each["ours"] != each[side]).sum()) for each in weights.values())
            row["merged_weights"] = sum(each["ours"].numel() for each in weights.values())
    return rows


def merged_by_peft(base: nn.Module, sites: dict[str, AdapterSite], *, safe_merge: bool = False) -> nn.Module:
    """Returns a copy of `base` with PEFT's LoRA of the same update merged, with PEFT's other defaults."""
    # Not `inject_adapter_in_model`, which leaves the adapter in the base's bfloat16: `get_peft_model` makes it float32.
    model: Any = peft.get_peft_model(copy.deepcopy(base), equal_lora(sites))
    copy_into_lora(sites, model.get_base_model())
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {torch.float32}
    return model.merge_and_unload(safe_merge=safe_merge)


@torch.no_grad()
def measure_site(site: AdapterSite, merged: Mapping[str, torch.Tensor]) -> list[Row]:
    """Returns the rows of a site: the share of its update that each side's merged weight (O, I) lacks."""
    delta = torch.block_diag(*(site.scaling.double() * site.lora_b.double() @ site.lora_a.double()))
    exact = site.weight.double() + delta
    shares = {side: float((weight.double() - exact).norm() / delta.norm()) for side, weight in merged.items()}
    facts = {"reference": "ours", "site": site.name, "shape": "x".join(map(str, exact.shape))}
    return [
        {"side": side, "ratio": share / shares["ours"], **facts, "rounded_away": share}
        for side, share in shares.items()
    ]


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: torch.Tensor) -> float:
    """Returns the mean cross-entropy per token, in nats."""
    return statistics.fmean(model(input_ids=window, labels=window).loss.item() for window in windows.split(1))


def measure_losses(
    base: nn.Module, unmerged: nn.Module, merged: dict[str, nn.Module], windows: torch.Tensor
) -> list[Row]:
    """Returns the held-out losses of each way to run the adapter: in bfloat16, and with the same weights in float32."""
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
        {
            "side": name,
            "loss_bfloat16": held_out_loss(narrow, windows) if narrow else None,
            "loss_float32": held_out_loss(model, windows),
        }
        for name, (narrow, model) in ways.items()
    ]


def write_report(rows: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Writes fold_rounding.md: the tables of the newest case."""
    rows = [row for row in rows if row["case"] == max(rows, key=lambda row: row["time"])["case"]]
    first = rows[0]
    ways = [row for row in rows if row["loss_float32"]]
    shares = {side: {row["site"]: row for row in rows if row["site"] and row["side"] == side} for side in SIDES}
    lines = [
        "# Rounding of a fold into bfloat16",
        "",
        f"{written_by('fold_rounding', rows)}. {first['case'].partition(',')[0]} in bfloat16, 8 "
        f"blocks of rank 8 in every linear, after {first['steps']} steps; {first['held_out_tokens']} held-out tokens.",
        "",
        *_table_of_shares(shares),
        "",
    ]
    for row in ways:
        side = row["side"].removeprefix("merged, ")
        if side in SIDES[1:]:
            ratios = [1 / float(each["ratio"]) for each in shares[side].values()]
            differ = f"{int(row['differing_weights']):,} of {int(row['merged_weights']):,} merged weights differ"
            lines += [f"Our share over that of {side}: {min(ratios):.6f} to {max(ratios):.6f}; {differ}.", ""]
    losses = [[row[name] and f"{float(row[name]):.5f}" for name in ("loss_bfloat16", "loss_float32")] for row in ways]
    table = [(row["side"], *pair) for row, pair in zip(ways, losses, strict=True)]
    lines += markdown_table(("held-out loss", "in bfloat16", "same weights in float32"), table)
    (folder / "fold_rounding.md").write_text("\n".join(lines) + "\n")


def _table_of_shares(shares: Mapping[str, Mapping[str, Mapping[str, str]]]) -> list[str]:
    table = []
    for side, rows in shares.items():
        values = {site: float(row["rounded_away"]) for site, row in rows.items()}
        worst = max(values, key=values.__getitem__)
        table.append((side, worst, f"{statistics.median(values.values()):.3%}", f"{values[worst]:.3%}"))
    heading = f"share of the adapter rounded away, {len(shares['ours'])} sites"
    return markdown_table((heading, "worst site", "median", "worst"), table, text_columns=2)
