"""`melora-fx adapter to-peft | from-peft | to-gguf | to-mlx`, as they are typed."""

import json
from pathlib import Path

import pytest
from support.command_line import run
from support.travelling import CASES, assert_same_blocks

import melora_fx


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's adapter, with its base next to it."""
    folder = tmp_path_factory.mktemp("llama")
    melora_fx.save_adapter(CASES["Llama"].adapted(), folder / "adapter")
    CASES["Llama"].build().save_pretrained(folder / "base")
    return folder / "adapter"


def test_to_vllm_and_back(adapter: Path, tmp_path: Path) -> None:
    result = run("adapter", "to-peft", adapter, "-o", tmp_path / "peft", "--for", "vllm", "--base-model", "me/llama")
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert "KiB\nvllm serve BASE --enable-lora" in result.stdout
    result = run("adapter", "to-peft", adapter, "-o", tmp_path / "again", "--for", "vllm", "--json")
    written = json.loads(result.stdout)
    assert (written["rank"], written["max_lora_rank"], written["flags"]) == (9, 16, "--enable-lora")
    result = run("adapter", "from-peft", tmp_path / "peft", "-o", tmp_path / "back", "--json")
    assert len(json.loads(result.stdout)["sites"]) == 14
    result = run("adapter", "from-peft", tmp_path / "peft", "-o", tmp_path / "back")
    assert result.returncode == 0, result.stderr
    assert "14 sites" in result.stdout
    assert_same_blocks(adapter, tmp_path / "back")


def test_to_llama_cpp_and_mlx(adapter: Path, tmp_path: Path) -> None:
    for command, out in ((("to-gguf", adapter, adapter.parent / "base"), "a.gguf"), (("to-mlx", adapter), "mlx")):
        result = run("adapter", *command, "-o", tmp_path / out)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        assert result.stdout.startswith(f"{tmp_path / out}: ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--for", "sglang"), "`--for` (='sglang') must be 'peft' or 'vllm'"),
        (("--for", "vllm", "--form", "bdlora"), "vLLM needs `--form lora`"),
        (("--form", "dora"), "`form` (='dora') must be one of"),
    ],
    ids=["reader", "blocks", "form"],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], text: str, adapter: Path, tmp_path: Path) -> None:
    result = run("adapter", "to-peft", adapter, "-o", tmp_path / "out", *arguments)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert text in result.stderr
    assert not (tmp_path / "out").exists()
