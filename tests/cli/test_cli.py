"""The command line as it is typed: what it prints, writes and returns."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.command_line import run
from support.models import bert_classifier, fill, tokens
from transformers import BertForSequenceClassification

import melora_fx
from exporters import OrtRunner, TorchRunner, compare
from melora_fx import MELoRAConfig


def test_the_module_runs_as_a_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["exporters.cli", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("exporters.cli", run_name="__main__")
    assert not caught.value.code
    assert {"demo", "train", "match", "fold", "export", "fold-onnx", "bench"} <= set(capsys.readouterr().out.split())


@pytest.mark.slow
def test_the_module_runs_in_a_process_of_its_own() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "exporters.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert {"demo", "train", "match", "fold", "export", "fold-onnx", "bench"} <= set(result.stdout.split())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    bert_classifier(num_layers=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        *("demo", "train", "match", "fold", "export", "fold-onnx", "generate", "bench"),
        *(f"adapter {name}" for name in ("inspect", "scale", "add", "average", "compress", "to-ort")),
    ],
)
def test_help_has_an_example(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.returncode == 0
    assert f"Example: melora-fx {command}" in " ".join(result.stdout.split())


def test_match_prints_the_table(model_dir: Path) -> None:
    result = run("match", model_dir, "--targets", "query,value", "--num-blocks", 3)
    assert result.returncode == 0, result.stderr
    assert "bert.encoder.layer.0.attention.self.value" in result.stdout
    assert "2 sites" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_match_prints_json(model_dir: Path) -> None:
    result = run("match", model_dir, "--targets", "query", "--targets", "key", "--num-blocks", 3, "--json")
    sites = json.loads(result.stdout)["sites"]
    assert [site["name"].rsplit(".", 1)[1] for site in sites] == ["query", "key"]
    assert sites[0]["num_parameters"] == 8 * (24 + 24)


def test_export_writes_the_merged_graph(model_dir: Path, tmp_path: Path) -> None:
    model = type(bert_classifier()).from_pretrained(model_dir).eval()
    fill(melora_fx.rewrite(model, ["query"], MELoRAConfig(num_blocks=3), keep_trainable="classifier"))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    result = run("export", model_dir, tmp_path / "adapter", "-o", tmp_path / "out.onnx")
    assert result.returncode == 0, result.stderr
    assert re.search(r"equal to torch in \d+ comparisons", result.stdout)
    assert compare(OrtRunner(tmp_path / "out.onnx"), TorchRunner(model), tokens()).max_rel_error <= 1e-5


@pytest.mark.slow
def test_a_base_in_half_precision_is_exported_in_float32(tmp_path: Path) -> None:
    bert_classifier(num_layers=1).bfloat16().save_pretrained(tmp_path / "base")
    result = run("export", tmp_path / "base", "-o", tmp_path / "out.onnx")
    assert result.returncode == 0, result.stderr
    expected = BertForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    assert compare(OrtRunner(tmp_path / "out.onnx"), TorchRunner(expected), tokens()).max_rel_error <= 1e-5


@pytest.mark.slow
def test_folds_on_disk_and_in_a_graph_give_the_model_with_its_head(tmp_path: Path) -> None:
    """From a base without a head, as most are published."""
    torch.manual_seed(0)
    trained = bert_classifier(num_layers=1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.1)
    trained.bert.save_pretrained(tmp_path / "base")
    fill(
        melora_fx.rewrite(trained, ["query", "value"], MELoRAConfig(rank=2, num_blocks=3), keep_trainable="classifier")
    )
    melora_fx.save_adapter(trained, tmp_path / "adapter")
    expected = trained(**tokens()).logits.detach()

    result = run("fold", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "folded")
    assert result.returncode == 0, result.stderr
    assert "rounded away" in result.stdout
    assert f"{tmp_path / 'folded'}: contains adapter " in result.stdout
    folded = BertForSequenceClassification.from_pretrained(tmp_path / "folded").eval()
    torch.testing.assert_close(folded(**tokens()).logits.detach(), expected, rtol=1e-4, atol=1e-4)

    graph = tmp_path / "base.onnx"
    result = run("export", tmp_path / "base", "-o", graph, "--base-of", tmp_path / "adapter", "--target", "ort-cpu")
    assert result.returncode == 0, result.stderr
    result = run("fold-onnx", graph, tmp_path / "adapter", "-o", tmp_path / "merged.onnx")
    assert result.returncode == 0, result.stderr
    inputs = {name: value.numpy() for name, value in tokens().items()}
    logits = torch.from_numpy(OrtRunner(tmp_path / "merged.onnx").run(inputs)["logits"])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    result = run("fold", tmp_path / "folded", tmp_path / "adapter", "-o", tmp_path / "twice")
    assert (result.returncode, result.stdout) == (1, "")
    assert "holds an adapter already" in result.stderr
    result = run("export", tmp_path / "base", tmp_path / "adapter", "-o", graph, "--base-of", tmp_path / "adapter")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)


@pytest.mark.slow
def test_export_for_tensorrt_prints_how_to_build_it_and_writes_the_repository(model_dir: Path, tmp_path: Path) -> None:
    arguments = ("--target", "tensorrt", "--shapes", "batch=1:4:8", "--triton", tmp_path / "repository", "--no-verify")
    result = run("export", model_dir, "-o", tmp_path / "bert.onnx", *arguments, "--shapes", "sequence=4:16:32")
    assert result.returncode == 0, result.stderr
    assert "TensorRT builds all of it" in result.stdout
    assert "--optShapes=input_ids:4x16,attention_mask:4x16" in result.stdout
    assert "trt_engine_cache_enable = True" in result.stdout
    assert (tmp_path / "repository" / "bert" / "1" / "model.onnx").is_file()
    assert "max_batch_size: 8" in (tmp_path / "repository" / "bert" / "config.pbtxt").read_text()


@pytest.mark.slow
def test_adapters_become_onnx_runtimes_own_files(model_dir: Path, tmp_path: Path) -> None:
    model = type(bert_classifier()).from_pretrained(model_dir).eval()
    fill(melora_fx.rewrite(model, ["query"], MELoRAConfig(num_blocks=3)))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    export = (
        "export",
        model_dir,
        tmp_path / "adapter",
        "-o",
        tmp_path / "swap.onnx",
        "--adapter",
        "swap",
        "--no-verify",
    )
    assert run(*export).returncode == 0
    out = tmp_path / "a.onnx_adapter"
    result = run("adapter", "to-ort", tmp_path / "adapter", tmp_path / "swap.onnx", "-o", out)
    assert result.returncode == 0, result.stderr
    actual = OrtRunner(tmp_path / "swap.onnx").run(tokens(), adapter=out)["logits"]
    assert abs(actual - TorchRunner(model).run(tokens())["logits"]).max() <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("match", "MODEL", "--targets", "qeury"), "nearest: query"),
        (("match", "/nowhere"), "has no config.json"),
        (("match", "MODEL", "--rank", 0), "`rank` (=0) must be at least 1"),
        (("export", "MODEL", "/nowhere", "-o", "x.onnx"), "is not an adapter folder"),
        (("export", "MODEL", "-o", "x.onnx", "--target", "ort-tpu"), "`target` (='ort-tpu') must be one of"),
        (("export", "MODEL", "-o", "x.onnx", "--precision", "int8"), "`precision` (='int8') must be one of"),
        (
            ("export", "MODEL", "-o", "x.onnx", *("--shapes", "batch=1") * 2),
            "`--shapes` names an axis twice: batch, batch",
        ),
        (("adapter", "to-ort", "/nowhere", "/nowhere.onnx", "-o", "x"), "`/nowhere.onnx` cannot be read"),
        (("fold", "MODEL", "", "-o", "TMP"), "an argument is empty"),
        (("demo", "--data", "/nowhere.csv", "--out", "TMP"), "cannot be read"),
        (("demo", "--out", "/dev/null/folder"), "cannot be written"),
        (("demo", "--model", "/nowhere", "--out", "TMP"), "has no config.json"),
    ],
    ids=[
        "target",
        "model",
        "rank",
        "adapter",
        "runtime",
        "precision",
        "shapes",
        "to_ort",
        "empty",
        "data",
        "out",
        "demo_model",
    ],
)
def test_bad_input_is_one_line(arguments: tuple[object, ...], text: str, model_dir: Path, tmp_path: Path) -> None:
    places = {"MODEL": model_dir, "TMP": tmp_path}
    result = run(*(places.get(str(argument), argument) for argument in arguments))
    assert result.returncode == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
