"""`melora-fx generate`, and the cache of `melora-fx export`."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers as hf
from support import command_line
from support.command_line import run
from support.decoders import VOCABULARY, adapted_llama, llama, text_folder, write_tokenizer
from support.exports import Exports

import melora_fx
from exporters import ExportReport, export, generate

PROMPT = "w40 w4 w18 w47 w44 w8 w43"


@pytest.fixture(scope="module")
def folder(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(exports("decoder").path, tmp_path_factory.mktemp("cli") / "texts", eos_token_id=None)


def test_it_prints_the_text_and_a_line_end(folder: Path) -> None:
    result = run("generate", folder, PROMPT, "--max-new-tokens", 7)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == generate(folder, PROMPT, max_new_tokens=7)[0] + "\n"
    assert result.stdout == run("generate", folder / "model.onnx", PROMPT, "--max-new-tokens", 7, "--threads", 1).stdout


def test_the_text_comes_piece_by_piece(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []

    class Recorded(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    monkeypatch.setattr(command_line, "io", SimpleNamespace(StringIO=Recorded))
    result = run("generate", folder, PROMPT, "--max-new-tokens", 4)
    words = result.stdout.split()
    assert [text.split() for text in flushed if text][:4] == [words[:number] for number in (1, 2, 3, 4)]


def test_options_reach_the_function(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.generation import generate as module

    given: dict[str, Any] = {}
    monkeypatch.setattr(module, "generate", lambda *args, **options: given.update(options, args=args))
    assert run("generate", folder, PROMPT).returncode == 0
    defaults = {"adapter": None, "max_new_tokens": 64, "sample": False, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    assert {name: given[name] for name in defaults} == defaults
    assert given["args"] == (folder, PROMPT)
    assert (given["provider"], given["threads"]) == ("cpu", None)
    options = ["--sample", "--temperature", 0.5, "--top-p", 0.9, "--seed", 3, "--adapter", "a", "--provider", "cuda"]
    assert run("generate", folder, PROMPT, *options, "--threads", 2).returncode == 0
    asked = {"sample": True, "temperature": 0.5, "top_p": 0.9, "seed": 3, "adapter": Path("a"), "threads": 2}
    assert {name: given[name] for name in asked} == asked


@pytest.mark.slow
def test_adapters(exports: Exports, tmp_path: Path) -> None:
    graph = exports("adapted decoder", adapter="swap", target="ort-cpu").path
    folder = text_folder(graph, tmp_path / "texts", eos_token_id=None)
    melora_fx.save_adapter(adapted_llama(), tmp_path / "adapter")
    arguments = ("generate", folder, PROMPT, "--max-new-tokens", 6)
    base, adapted = run(*arguments), run(*arguments, "--adapter", tmp_path / "adapter")
    assert base.stdout != adapted.stdout
    assert adapted.stdout == generate(folder, PROMPT, adapter=tmp_path / "adapter", max_new_tokens=6)[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((PROMPT, "--max-new-tokens", 0), "error: `max_new_tokens` (=0) must be a whole number, 1 or more\n"),
        ((PROMPT, "--temperature", 0), "error: `temperature` (=0.0) must be above 0; `sample=False` takes"),
        ((PROMPT, "--top-p", 2), "error: `top_p` (=2.0) must be above 0 and at most 1\n"),
        ((PROMPT, "--seed", -1), "error: `seed` (=-1) must be a whole number, 0 or more\n"),
        ((PROMPT, "--adapter", "/nowhere"), "error: the adapter `/nowhere` does not exist\n"),
        ((" ".join(["w5"] * 64),), "error: prompt 0 has 64 tokens: the model in "),
        ((PROMPT, "--provider", "abacus"), "abacus"),
    ],
    ids=["tokens", "temperature", "top_p", "seed", "adapter", "a long prompt", "provider"],
)
def test_errors_are_one_message(folder: Path, arguments: tuple[Any, ...], text: str) -> None:
    result = run("generate", folder, *arguments)
    assert (result.returncode, result.stdout.strip()) == (1, "")
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    result = run("generate", tmp_path / "nowhere", PROMPT)
    assert (result.returncode, result.stderr) == (1, f"error: `{tmp_path}/nowhere/model.onnx` does not exist\n")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "asked"), [((), "auto"), (("--cache",), True), (("--no-cache",), False)], ids=["", "yes", "no"]
)
def test_whether_a_cache_is_asked_for(
    exports: Exports, model_dir: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], asked: Any
) -> None:
    given: dict[str, Any] = {}

    def write(*_: Any, **options: Any) -> ExportReport:
        given.update(options)
        return exports("decoder")

    monkeypatch.setattr(export, "export_onnx", write)
    result = run("export", model_dir, "-o", model_dir / "out", *arguments)
    assert result.returncode == 0, result.stderr
    assert given["use_cache"] == asked


@pytest.mark.slow_cases("without")
@pytest.mark.parametrize("arguments", [(), ("--no-cache",), ("--no-verify",)], ids=["", "without", "not compared"])
def test_an_export_generates(model_dir: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = run("export", model_dir, "-o", tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    result = run("generate", tmp_path, PROMPT, "--max-new-tokens", 5)
    if arguments == ("--no-cache",):
        assert "has no key-value cache: export a model that generates with `use_cache=True`" in result.stderr
    else:
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(" w")


@pytest.mark.slow
def test_a_cache_that_a_model_cannot_have(tmp_path: Path) -> None:
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    why = "it keeps more of earlier tokens than keys and values of each layer"
    result = run("export", tmp_path, "-o", tmp_path / "out", "--cache")
    assert result.returncode == 1
    assert result.stderr == f"error: `use_cache=True`: the graph cannot have a key-value cache: {why}\n"
    result = run("export", tmp_path, "-o", tmp_path / "out", "--no-verify")
    assert f"without a key-value cache: {why}" in " ".join(result.stdout.split())
