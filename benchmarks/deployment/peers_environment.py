"""Makes the peers' graphs of a model, in an environment that has optimum-onnx and Olive but none of our packages.

`python peers_environment.py MODEL_FOLDER OUT_FOLDER` writes OUT_FOLDER/SIDE/model.onnx for each side that can be made,
and OUT_FOLDER/sides.json: side → what made it, or why it failed.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = {"vit": "image-classification", "gpt2": "text-generation"}
FUSED_AS = {"mpnet": "bert"}


def main(model: Path, out: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    task = TASKS.get(config.model_type, "text-classification")
    sides: dict[str, tuple[str, Callable[[Path], None]]] = {
        "optimum": ("optimum-onnx", lambda folder: export_by_optimum(model, folder, task)),
        **{
            f"optimum {level}": ("optimum-onnx", lambda folder, level=level: optimize_by_optimum(out, folder, level))  # type: ignore[misc]
            for level in ("O1", "O2", "O3")
        },
        "ONNX Runtime's optimizer": ("onnxruntime", lambda folder: optimize_by_runtime(out, folder, config)),
        "Olive": ("olive-ai", lambda folder: optimize_by_olive(model, folder, task)),
    }
    made = {}
    for side, (package, make) in sides.items():
        folder = out / side
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with tempfile.TemporaryDirectory(dir=out) as staging:
                make(Path(staging))
                graph = next(Path(staging).rglob("*.onnx"))  # Olive writes some graphs into a subfolder
                graph.rename(graph.with_name("model.onnx"))
                shutil.copytree(graph.parent, folder)
            made[side] = {"made_by": f"{package} {importlib.metadata.version(package)}"}
        except Exception as error:
            traceback.print_exc()
            made[side] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    (out / "sides.json").write_text(json.dumps(made, indent=2) + "\n")


def export_by_optimum(model: Path, folder: Path, task: str) -> None:
    from optimum.exporters.onnx import main_export

    main_export(str(model), output=str(folder), task=task, do_validation=False, library_name="transformers")


def optimize_by_optimum(out: Path, folder: Path, level: str) -> None:
    from optimum.onnxruntime import AutoOptimizationConfig, ORTOptimizer

    plain = ORTOptimizer.from_pretrained(str(out / "optimum"), file_names=["model.onnx"])
    plain.optimize(save_dir=str(folder), optimization_config=getattr(AutoOptimizationConfig, level)())


def optimize_by_runtime(out: Path, folder: Path, config: Any) -> None:
    from onnxruntime.transformers import optimizer

    optimized = optimizer.optimize_model(
        str(out / "optimum" / "model.onnx"),
        model_type=FUSED_AS.get(config.model_type, config.model_type),
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
    )
    optimized.save_model_to_file(str(folder / "model.onnx"))


def optimize_by_olive(model: Path, folder: Path, task: str) -> None:
    options = ["--provider", "CPUExecutionProvider", "--device", "cpu", "--precision", "fp32"]
    command = [sys.executable, "-m", "olive", "optimize", "-m", str(model), "-t", task, *options]
    command += ["--exporter", "dynamo_exporter", "-o", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | {"OLIVE_DISABLE_TELEMETRY": "1"}
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
