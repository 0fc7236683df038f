"""Errors, warnings, logs and versions on the command line, and a shell's completions."""

import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from support.command_line import run
from support.models import bert_classifier

from exporters.cli.commands import main
from exporters.cli.terminal import tidy_terminal
from exporters.measuring import bench
from melora_fx import MELoRAError


def test_versions() -> None:
    result = run("--version")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["melora-fx", "torch", "transformers", "onnxruntime"]
    assert all(re.fullmatch(r"\S+ \d+\.\S+", line) for line in lines)


@pytest.mark.parametrize("arguments", [("--debug", "match", "/nowhere"), ("match", "/nowhere", "--debug")], ids=str)
def test_debug_raises_the_error(arguments: tuple[str, ...]) -> None:
    with pytest.raises(MELoRAError, match=r"has no config\.json"):
        run(*arguments)


def test_other_peoples_errors_are_one_line_too(tmp_path: Path) -> None:
    bert_classifier(num_layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    result = run("export", tmp_path, "-o", tmp_path / "out.onnx")
    assert (result.returncode, result.stdout) == (1, "")
    expected = r"error: ZeroDivisionError: .*\(`melora-fx --debug COMMAND …` shows the traceback\)\n"
    assert re.fullmatch(expected, result.stderr), result.stderr


def test_errors_of_our_own_code_that_no_one_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_bench", lambda _: {}["x"])
    result = run("bench", "a.onnx")
    assert result.stderr == "error: KeyError: 'x' (`melora-fx --debug COMMAND …` shows the traceback)\n"


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_bench", interrupted)
    result = run("bench", "a.onnx")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_a_closed_pipe_is_no_message() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "exporters.cli", "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()  # before it prints
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 1


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with tidy_terminal():
            warnings.warn("the base is quantised", stacklevel=1)
    assert capsys.readouterr().err == "warning: the base is quantised\n"


def test_logs_below_an_error_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("of.another.package")
    with tidy_terminal():
        logger.warning("chatter")
        logger.error("a real fault")
    logger.warning("afterwards")
    assert caplog.messages == ["a real fault", "afterwards"]


def complete(monkeypatch: pytest.MonkeyPatch, line: str) -> list[str]:
    """Returns bash's completions of a line whose last word is being typed."""
    monkeypatch.setenv("_MELORA_FX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    return run().stdout.split()


def test_a_shell_completes_commands_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {"demo", "match", "fold", "fold-onnx", "export", "bench", "adapter"}
    assert set(complete(monkeypatch, "melora-fx ")) >= commands
    assert complete(monkeypatch, "melora-fx fo") == ["fold", "fold-onnx"]
    assert complete(monkeypatch, "melora-fx adapter to-") == ["to-peft", "to-gguf", "to-mlx", "to-ort"]
    assert complete(monkeypatch, "melora-fx export --target ort") == ["ort-cpu", "ort-cuda"]
    assert complete(monkeypatch, "melora-fx export --adapter ") == ["fold", "keep", "swap"]
    assert complete(monkeypatch, "melora-fx bench --provider ") == ["cpu", "cuda", "tensorrt"]


def test_the_script_for_a_shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_MELORA_FX_COMPLETE", "source_bash")
    monkeypatch.setattr(sys, "argv", ["melora-fx"])
    with pytest.raises(SystemExit):
        main()
    assert "complete -o default -F _melora_fx_completion melora-fx" in capsys.readouterr().out
