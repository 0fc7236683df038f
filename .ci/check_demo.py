"""Checks the demo's report.json and files: `check_demo.py FOLDER`."""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
report = json.loads((folder / "report.json").read_text())
checks = {
    "accuracy rises by 15 points": report["accuracy_after"] >= report["accuracy_before"] + 0.15,
    "accuracy is above the majority baseline": report["accuracy_after"] > report["majority_baseline"],
    "fold error at most 1e-5": report["fold_max_abs_error"] <= 1e-5,
    "merged error at most 1e-4": report["merged_max_abs_error"] <= 1e-4,
    "unmerged error at most 1e-4": report["unmerged_max_abs_error"] <= 1e-4,
    "every label agrees": report["label_agreement"] == 1.0,
    "fewer parameters than LoRA": report["trainable_parameters"] < report["lora_equal_rank_parameters"],
    "latencies by name": {"onnx base", "onnx merged", "onnx unmerged", "torch eager"} == set(report["latency"]),
}
files = ("adapter/adapter.safetensors", "merged.onnx", "unmerged.onnx", "latency.csv", "latency.png", "training.png")
checks |= {f"{name} written": (folder / name).is_file() for name in files}
for name, holds in checks.items():
    print("ok  " if holds else "FAIL", name)
sys.exit(not all(checks.values()))
