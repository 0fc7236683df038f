"""Converts the report.json of `melora-fx demo`, `melora-fx train` and an example into CSV files in results/:

    python -m benchmarks.report_rows demo demo-output/report.json
    python -m benchmarks.report_rows train_command trained/report.json
    python -m benchmarks.report_rows instruction_tuning instruction-tuning-output/report.json

Run it on the machine and at the commit of the reported run. benchmarks/pages/ makes tables from the rows.
"""

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from exporters.measuring.machine import device_name, package_versions, source_commit
from exporters.measuring.tables import write_csv

from .common.cases import COLUMNS, Row
from .common.checkout import ROOT, source_digest

MAJORITY, EPOCH, LORA, FOLDED, BASE = "majority baseline", "epoch ", "LoRA of equal rank", "folded", "onnx base"
"""Sides in addition to those that the demo timed. EPOCH is the start of an epoch's name; epoch 0 is before training."""
OWN_COLUMNS = ("accuracy", "parameters", "adapter_parameters", "max_abs_error", "same_labels")
TUNING_COLUMNS = ("parameters", "loss", "stated", "last_number")
"""Of instruction_tuning.csv: trained parameters, held-out loss, and the shares of correct answers, read in two ways."""


def rows_of(benchmark: str, report: Mapping[str, Any], device: str, time: str) -> list[Row]:
    """Returns a row for each epoch and each baseline, and for everything that the demo folded, exported and timed."""
    sides: dict[str, Row] = {MAJORITY: {"accuracy": report["majority_baseline"]}}
    sides |= {f"{EPOCH}{index}": {"accuracy": accuracy} for index, (_, accuracy) in enumerate(report["evaluations"])}
    last = sides[f"{EPOCH}{len(report['evaluations']) - 1}"]
    last |= {"parameters": report["trainable_parameters"], "adapter_parameters": report["adapter_parameters"]}
    sides[LORA] = {"adapter_parameters": report["lora_equal_rank_parameters"]}
    if "latency" in report:
        sides[FOLDED] = {"max_abs_error": report["fold_max_abs_error"]}
        sides |= {name: {**timed, "reference": BASE} for name, timed in report["latency"].items()}
        sides["onnx unmerged"]["max_abs_error"] = report["unmerged_max_abs_error"]
        sides["onnx merged"] |= {
            "max_abs_error": report["merged_max_abs_error"],
            "same_labels": report["label_agreement"],
        }
    arguments = report["arguments"]
    origin = {
        "benchmark": benchmark,
        "case": Path(report["model"]).name,
        "settings": f"epochs {arguments['epochs']}, rank {arguments['config']['rank']}, num_blocks "
        f"{arguments['config']['num_blocks']}, texts {report['num_train']}, held out {report['num_held_out']}",
        "device": device,
        "versions": "; ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "time": time,
    }
    return [dict.fromkeys(COLUMNS, "") | {"side": side, **own, **origin} for side, own in sides.items()]


def tuning_rows_of(report: Mapping[str, Any], device: str, time: str) -> list[Row]:
    """Returns a row for the base model and one for the tuned model."""
    origin = {
        "benchmark": "instruction_tuning",
        "case": "stories260K-hf",
        "device": device,
        "versions": package_versions("accelerate", "lm-eval"),
        "time": time,
    }
    rows = []
    for side, loss in (("base", "loss_before"), ("tuned", "loss_folded")):
        scores = report["scores"][side]["arithmetic_problems"]
        row = {"side": side, "loss": report[loss], "parameters": report["trainable_parameters"]}
        row |= {"stated": scores["exact_match,stated"], "last_number": scores["exact_match,last-number"]}
        rows.append(dict.fromkeys(COLUMNS, "") | row | origin)
    return rows


def main(benchmark: str, path: str) -> None:
    time = datetime.fromtimestamp(Path(path).stat().st_mtime, UTC).isoformat(timespec="seconds")
    report, device = json.loads(Path(path).read_text(encoding="utf-8")), device_name("cpu")
    if benchmark == "instruction_tuning":
        rows, own = tuning_rows_of(report, device, time), TUNING_COLUMNS
    else:
        rows, own = rows_of(benchmark, report, device, time), OWN_COLUMNS
    rows = [row | {"source": source_digest(), "commit": source_commit()} for row in rows]
    write_csv(rows, [*COLUMNS, *own], ROOT / "benchmarks" / "results" / f"{benchmark}.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
