"""Blocks about training steps, experts, swaps of adapters and rewriting."""

from exporters.measuring.tables import markdown_table

from .block import Rows
from .words import by_case, duration, listed, machine, number, origin, paragraph, ratio, span, times

OURS, PEFT, AUTHORS = "ours", "PEFT LoRA, equal rank", "authors' loop"
PEFT_EQUAL_PARAMETERS = "PEFT LoRA, equal parameters"
_MINILM = "MiniLM-L6, {}, 1024 tokens"
_SMOLLM2 = "SmolLM2-135M, {}, 256 tokens"
CENTRE = _MINILM.format("eager, centre, rank 8, float32, 1 threads")
DROPOUT, KEPT = f"{CENTRE}, dropout 0.1", f"{CENTRE}, memory kept"
STEPS = {
    "MiniLM-L6, 16 × 64 tokens, every dense layer, eager": CENTRE,
    "… query and value only": _MINILM.format("eager, q,v, rank 8, float32, 1 threads"),
    "… rank 1 (PEFT: 8)": _MINILM.format("eager, centre, rank 1, float32, 1 threads"),
    "… bfloat16": _MINILM.format("eager, centre, rank 8, bfloat16, 1 threads"),
    "… dropout 0.1": DROPOUT,
    "… two threads": _MINILM.format("eager, centre, rank 8, float32, 2 threads"),
    "… compiled": _MINILM.format("compiled, centre, rank 8, float32, 1 threads"),
    "… compiled, bfloat16": _MINILM.format("compiled, centre, rank 8, bfloat16, 1 threads"),
    "SmolLM2-135M, 2 × 128 tokens, q,k,v,o, eager": _SMOLLM2.format("eager, centre, rank 8, float32, 1 threads"),
    "… every linear": _SMOLLM2.format("eager, all-linear, rank 8, float32, 1 threads"),
    "… bfloat16, q,k,v,o": _SMOLLM2.format("eager, centre, rank 8, bfloat16, 1 threads"),
}
"""Row of the table in docs/LOWERINGS.md → case in train_step.csv."""


def steps(rows: Rows) -> list[str]:
    """Returns the table of docs/LOWERINGS.md, from train_step.csv."""
    cases = by_case(rows)
    table = []
    for label, case in STEPS.items():
        found = [cases[case].get(side) for side in (OURS, PEFT, PEFT_EQUAL_PARAMETERS, AUTHORS)]
        table.append([label, *(f"{number(row, 'ratio'):.2f}" if row else "" for row in found)])
    return [
        *paragraph(
            "Time of a step relative to the frozen model with an input that requires a gradient, on "
            f"{machine(rows)} (`python -m benchmarks train_step`; one thread unless stated otherwise). Here: 8 blocks "
            "of rank 8. PEFT's LoRA of equal rank (64) has 8 times as many parameters; the one of equal parameters "
            "(rank 8) was timed only in some rows:"
        ),
        "",
        *markdown_table(["", "here", "PEFT, equal rank", "PEFT, equal parameters", "the authors' loop"], table),
    ]


def kept_for_backward(rows: Rows) -> list[str]:
    """Returns a sentence, from train_step.csv."""
    cases = by_case(rows)

    def kept(case: str, side: str) -> str:
        return f"{number(cases[case][side], 'saved_mib') - number(cases[case]['frozen'], 'saved_mib'):.0f} MiB"

    return paragraph(
        f"On MiniLM-L6 with adapters in every dense layer, that is {kept(CENTRE, OURS)} more than the frozen model "
        f"keeps, and {kept(CENTRE, PEFT)} more in PEFT; with dropout, {kept(DROPOUT, OURS)} and {kept(DROPOUT, PEFT)}."
    )


def allocators(rows: Rows) -> list[str]:
    """Returns a sentence, from train_step.csv: steps with memory that is kept, compared with glibc's defaults."""
    cases = by_case(rows)
    frozen, ours, peft = (times(ratio(cases[KEPT][side], cases[CENTRE][side])) for side in ("frozen", OURS, PEFT))
    return paragraph(
        f"A step of MiniLM-L6 then takes {frozen} of its previous time if frozen, {ours} with our adapters and {peft} "
        f"with PEFT's, each measured separately, on {origin(rows, 'torch', 'peft')}."
    )


def experts(rows: Rows) -> list[str]:
    """Returns the table of docs/LOWERINGS.md, from experts.csv."""
    sides = {"here": OURS, "PEFT, rank 64": PEFT, "PEFT, rank 8": PEFT_EQUAL_PARAMETERS}
    table = [
        ["`{}`, {}".format(*case.split(", ", 1)), *(f"{number(found[side], 'ratio'):.2f}" for side in sides.values())]
        for case, found in by_case(rows).items()
    ]
    return [
        *paragraph(f"On {origin(rows, 'torch', 'transformers', 'peft')}:"),
        "",
        *markdown_table(["experts", *sides], table),
    ]


def swaps(rows: Rows) -> list[str]:
    """Returns a sentence, from swap_speed.csv."""
    cases = {name: sides for name, sides in by_case(rows).items() if name.startswith("swap, ")}
    ours = [sides["load_adapter"] for sides in cases.values()]
    over = {
        side: span([ratio(sides["load_adapter"], sides[side]) for sides in cases.values()], ".2f")
        for side in ("PEFT hotswap_adapter", "PEFT load_adapter")
    }
    least, most = (pick(ours, key=lambda row: number(row, "median_ms")) for pick in (min, max))
    named = [f"{duration(row)} for {row['num_sites']} sites of {row['case'].split(', ')[1]}" for row in (least, most)]
    return paragraph(
        f"Loading another adapter takes {over['PEFT hotswap_adapter']} times as long as PEFT's `hotswap_adapter`, "
        f"which checks neither hash nor base, and {over['PEFT load_adapter']} times as long as PEFT's `load_adapter`: "
        f"{listed(named)}, on {origin(rows, 'torch', 'peft')}. "
        "[Where the time goes](../benchmarks/results/NOTES.md#a-swap-of-adapters-from-disk)."
    )


def rewriting(rows: Rows) -> list[str]:
    """Returns a sentence, from rewrite_speed.csv."""
    cases = {name: sides for name, sides in by_case(rows).items() if name.startswith("rewrite ")}
    named = [f"{number(sides['melora_fx'], 'ratio'):.2f} ({name.rpartition(' ')[2]})" for name, sides in cases.items()]
    return paragraph(
        f"Rewriting Llama-2-7B takes {listed(named)} of the time of PEFT's module swapping "
        f"(`benchmarks/results/rewrite_speed.csv`, on {machine(rows)})."
    )
