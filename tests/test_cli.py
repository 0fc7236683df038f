"""The command line as it is typed: what it prints, writes and returns."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import bert_classifier, fill, tokens

import melora_fx
from exporters import OrtRunner, TorchRunner, compare
from exporters.cli import main
from melora_fx import MELoRAConfig


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Result:
    """The command line in this process: importing torch for each command would take most of the time."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["melora-fx", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as exit:
        return Result(int(exit.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv
    return Result(0, out.getvalue(), err.getvalue())


def test_the_module_runs_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "exporters.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert {"demo", "match", "export", "bench"} <= set(result.stdout.split())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    bert_classifier().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["demo", "match", "export", "bench"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0
    assert f"Example: melora-fx {command}" in " ".join(result.stdout.split())


def test_match_prints_the_table(model_dir: Path) -> None:
    result = run("match", model_dir, "--targets", "query,value", "--num-blocks", 3)
    assert result.returncode == 0, result.stderr
    assert "bert.encoder.layer.1.attention.self.value" in result.stdout
    assert "4 sites" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_match_prints_json(model_dir: Path) -> None:
    result = run("match", model_dir, "--targets", "query", "--targets", "key", "--num-blocks", 3, "--json")
    sites = json.loads(result.stdout)["sites"]
    assert [site["name"].rsplit(".", 1)[1] for site in sites] == ["query", "key"] * 2
    assert sites[0]["num_parameters"] == 8 * (24 + 24)


def test_export_writes_the_merged_graph(model_dir: Path, tmp_path: Path) -> None:
    model = type(bert_classifier()).from_pretrained(model_dir).eval()
    fill(melora_fx.rewrite(model, ["query"], MELoRAConfig(num_blocks=3), keep_trainable="classifier"))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    result = run("export", model_dir, tmp_path / "adapter", "-o", tmp_path / "out.onnx")
    assert result.returncode == 0, result.stderr
    assert "equal to torch at 3 shapes" in result.stdout
    assert compare(OrtRunner(tmp_path / "out.onnx"), TorchRunner(model), tokens()).max_rel_error <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("match", "MODEL", "--targets", "qeury"), "nearest: query"),
        (("match", "/nowhere"), "has no config.json"),
        (("match", "MODEL", "--rank", 0), "`rank` (=0) must be at least 1"),
        (("export", "MODEL", "/nowhere", "-o", "x.onnx"), "is not an adapter folder"),
        (("demo", "--data", "/nowhere.csv", "--out", "TMP"), "cannot be read"),
        (("demo", "--out", "/dev/null/folder"), "cannot be written"),
        (("demo", "--model", "/nowhere", "--out", "TMP"), "has no config.json"),
    ],
    ids=["target", "model", "rank", "adapter", "data", "out", "demo_model"],
)
def test_bad_input_is_one_line(arguments: tuple[object, ...], text: str, model_dir: Path, tmp_path: Path) -> None:
    places = {"MODEL": model_dir, "TMP": tmp_path}
    result = run(*(places.get(str(argument), argument) for argument in arguments))
    assert result.returncode == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
