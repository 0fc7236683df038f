"""Prints the results of the demo."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.training.report import console
from melora_fx.tables import table


def print_code(title: str, code: str) -> None:
    """Prints the code of a graph without its empty lines."""
    console.print(f"[bold]{title}[/]")
    print("\n".join(line for line in code.splitlines() if line.strip()))


def print_results(results: Mapping[str, Any], out: Path) -> None:
    """Prints the results of `run_demo` as a table, and lists the files in its folder."""
    console.rule("result")
    rows = [
        ("held-out accuracy", f"{results['accuracy_before']:.1%} → {results['accuracy_after']:.1%}"),
        ("majority baseline", f"{results['majority_baseline']:.1%}"),
        ("trainable parameters", f"{results['trainable_parameters']:,} with the head"),
        ("a LoRA of equal rank", f"{results['lora_equal_rank_parameters']:,} in its adapters only"),
    ]
    for name, key in (("folded", "fold"), ("merged ONNX", "merged"), ("unmerged ONNX", "unmerged")):
        rows.append((f"{name} against torch", f"max abs error {results[f'{key}_max_abs_error']:.1e}"))
    rows.append(("same label, merged ONNX and torch", f"{results['label_agreement']:.1%} of held-out texts"))
    for name, row in results["latency"].items():
        rows.append((name, f"{row['median_ms']:.1f} ms, {row['ratio']:.2f} × the base graph"))
    print("\n".join(table(rows)))
    console.print(f"[bold]files in {out}[/]")
    for file in sorted(file for file in out.rglob("*") if file.is_file()):
        print(f"  {os.path.relpath(file, out)}  {file.stat().st_size:,} bytes")
