"""`melora-fx train`: its results, where a killed run continues, and what is refused before anything is written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import run
from support.text_models import TEXT_MODELS, held_out_accuracy, write_csv
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from exporters.runtime.torch_runner import TorchRunner
from exporters.training.train import TrainOptions, read_texts_of, run_train
from melora_fx import MELoRAConfig, MELoRAError, fold_checkpoint
from melora_fx.saving.adapter_file import read_adapter

pytest.importorskip("matplotlib", reason="a training draws a picture")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TEXT_MODELS["bert"].write(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "texts.csv", 80)


def options(bert: Path, data: Path, out: Path, **others: Any) -> TrainOptions:
    """Returns options for eight steps, with a checkpoint after each, and dropout in the adapters."""
    usual = {"epochs": 2, "checkpoint_every_s": 0.0, "config": MELoRAConfig(rank=2, num_blocks=4, dropout=0.2)}
    return TrainOptions(model=bert, data=data, out=out, **usual | others)


def content(out: Path) -> tuple[bytes, list[float], list[Any]]:
    report = json.loads((out / "report.json").read_text())
    return (out / "adapter" / "adapter.safetensors").read_bytes(), report["losses"], report["evaluations"]


@pytest.fixture(scope="module")
def finished(bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run_train(options(bert, data, out))
    return out


def test_what_is_trained_is_in_the_folded_model(bert: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "texts.csv", 400)
    out = tmp_path / "out"
    result = run("train", bert, "--data", data, "--out", out, "--epochs", 2, "--rank", 4, "--num-blocks", 4)
    assert result.returncode == 0, result.stderr
    assert "no text is cut: the longest has" in result.stdout
    assert "new in this model, trained and saved with the adapter: bert.pooler, classifier" in result.stdout
    assert "targets: query, value" in result.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["accuracy_after"] > report["majority_baseline"] + 0.2
    assert report["labels"] == ["animals", "food", "travel"]
    assert report["evaluations"][-1][1] == report["accuracy_after"]
    assert len(report["losses"]) == report["evaluations"][-1][0] == 40
    assert (out / "training.png").is_file()

    fold_checkpoint(bert, out / "adapter", tmp_path / "folded")
    folded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "folded").eval()
    assert folded.config.id2label == {0: "animals", 1: "food", 2: "travel"}
    texts = read_texts_of(TrainOptions(model=bert, data=data, out=out))
    assert held_out_accuracy(TorchRunner(folded), tmp_path / "folded", texts) == report["accuracy_after"]


def test_checkpoints_are_the_last_two_and_hold_no_base_weights(finished: Path) -> None:
    paths = sorted((finished / "checkpoints").iterdir())
    assert [path.name for path in paths] == ["run.json", "step-00000007", "step-00000008"]
    assert sorted(path.name for path in paths[1].iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
        "state.pt",
    ]
    assert (paths[2] / "adapter.safetensors").read_bytes() == content(finished)[0]


@pytest.mark.default_cases("within_an_epoch")
@pytest.mark.parametrize("steps", [(), (7,), (7, 8)], ids=["from_the_start", "within_an_epoch", "finished"])
def test_a_killed_run_ends_with_the_same_bits(
    steps: tuple[int, ...], finished: Path, bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(finished / "checkpoints" / "run.json", tmp_path / "checkpoints")
    for step in steps:
        shutil.copytree(finished / "checkpoints" / f"step-{step:08d}", tmp_path / "checkpoints" / f"step-{step:08d}")
    (tmp_path / "checkpoints" / ".step-00000003.abc.tmp").mkdir()  # killed while it wrote
    torch.manual_seed(5)
    run_train(options(bert, data, tmp_path))
    assert content(tmp_path) == content(finished)
    assert (f"resuming after step {max(steps, default=0)} of 8" in capsys.readouterr().out) == bool(steps)
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_run_that_is_killed_in_the_middle_goes_on(bert: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "texts.csv", 640)
    command = [sys.executable, "-m", "exporters.cli", "train", str(bert), "--data", str(data), "--dropout", "0.1"]
    command += ["--num-blocks", "4", "--epochs", "3", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((killed / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "adapter").exists()
    result = subprocess.run([*command, str(killed)], capture_output=True, text=True, check=True)
    assert "resuming after step 32 of 96" in result.stdout
    subprocess.run([*command, str(whole)], capture_output=True, check=True)
    assert content(killed) == content(whole)


@pytest.mark.parametrize(
    ("others", "difference"),
    [
        ({"seed": 1}, r"texts_sha256 .*seed \(=1, there 0\)"),
        ({"epochs": 3}, r"`.*` has the checkpoints of another training: epochs \(=3, there 2\)\. .*`--restart`"),
        ({"config": MELoRAConfig(rank=3, num_blocks=4)}, r"config \(=.*'rank': 3"),
    ],
    ids=["seed", "epochs", "config"],
)
def test_a_run_with_other_arguments_is_refused(
    others: dict[str, Any], difference: str, finished: Path, bert: Path, data: Path
) -> None:
    before = content(finished)
    with pytest.raises(MELoRAError, match=difference):
        run_train(options(bert, data, finished, **others))
    assert content(finished) == before


@pytest.mark.slow
def test_another_model_is_refused_and_a_restart_begins_anew(
    finished: Path, bert: Path, data: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(bert, tmp_path / "other")
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias.add_(1)
    model.bert.save_pretrained(other)
    out = shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(MELoRAError, match="another training: model_sha256"):
        run_train(options(other, data, out))
    run_train(options(other, data, out, epochs=1, restart=True))
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == ["step-00000003", "step-00000004"]
    assert content(out)[0] != content(finished)[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--targets", "qeury"), "`--targets query,value`"),
        (("--num-blocks", 5), "must be divisible by `num_blocks` (=5)"),
        (("--max-tokens", 41), "`max_tokens` (=41) must be at most 40, the model's limit"),
        (("--max-tokens", 2), "`max_tokens` (=2) must be at least 3"),
        (("--epochs", 0), "`epochs` (=0) must be at least 1"),
        (("--learning-rate", 0), "`learning_rate` (=0.0) must be above 0"),
        (("--batch-size", 0), "`batch_size` (=0) must be at least 1"),
        (("--validation", "/nowhere.csv"), "/nowhere.csv"),
        (("--validation", 1.5), "`--validation`) must be between 0 and 1"),
        (("--seed", 10**20), "`seed` (=100000000000000000000) must be from 0 to"),
        (("--device", "gpu"), "`device` (='gpu') must be auto, cpu, cuda"),
        (("--label", "kind"), "has no column 'kind'"),
    ],
    ids=lambda value: str(value[0]).strip("-") if isinstance(value, tuple) else "",
)
def test_bad_arguments_leave_nothing_behind(
    arguments: tuple[object, ...], text: str, bert: Path, data: Path, tmp_path: Path
) -> None:
    result = run("train", bert, "--data", data, "--out", tmp_path / "out", *arguments)
    assert (result.returncode, text in result.stderr) == (1, True), result.stderr
    assert list(tmp_path.iterdir()) == []


def damaged(kind: str, bert: Path, folder: Path) -> Path:
    """Returns a copy of the model that cannot be trained."""
    shutil.copytree(bert, folder)
    if kind == "no_tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "unknown_words":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        first = {token: index for token, index in tokenizer["model"]["vocab"].items() if index < 5}
        tokenizer["model"]["vocab"] = first
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif kind == "no_weights":
        (folder / "model.safetensors").unlink()
    elif kind == "other_weights":
        shutil.rmtree(folder)
        TEXT_MODELS["gpt2"].write(folder.parent / "gpt2")
        shutil.copytree(bert, folder)
        shutil.copy(folder.parent / "gpt2" / "model.safetensors", folder)
        shutil.rmtree(folder.parent / "gpt2")
    else:
        sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertForSequenceClassification(BertConfig(**sizes, intermediate_size=48)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("no_tokenizer", "has no tokenizer: save the one that the model was trained with into it"),
        ("unknown_words", "its tokenizer knows no word of the texts"),
        ("no_weights", "the weights cannot be read"),
        ("other_weights", "lacks weights of BertForSequenceClassification, which would be random"),
        ("other_tokenizer", "but the model has 60: it is another model's"),
    ],
)
def test_models_that_cannot_be_trained(kind: str, text: str, bert: Path, data: Path, tmp_path: Path) -> None:
    model = damaged(kind, bert, tmp_path / "model")
    result = run("train", model, "--data", data, "--out", tmp_path / "out", "--num-blocks", 4)
    assert (result.returncode, text in result.stderr) == (1, True), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_folder_of_the_model_and_the_training_file_are_refused(bert: Path, data: Path) -> None:
    before = sorted(bert.iterdir())
    result = run("train", bert, "--data", data, "--out", bert / "trained")
    assert (result.returncode, "is the model's own folder, or in it" in result.stderr) == (1, True), result.stderr
    (data.parent / "link").symlink_to(bert)
    result = run("train", bert, "--data", data, "--out", data.parent / "link" / "trained")
    assert (result.returncode, "is the model's own folder, or in it" in result.stderr) == (1, True), result.stderr
    assert sorted(bert.iterdir()) == before
    result = run("train", bert, "--data", data, "--out", bert.parent / "out", "--validation", data)
    assert (result.returncode, "is both the training and the validation file" in result.stderr) == (1, True)


def test_the_models_own_head_is_trained_on_and_keeps_the_order_of_its_labels(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    own = ["travel", "food", "animals"]
    model = AutoModelForSequenceClassification.from_pretrained(bert, id2label=dict(enumerate(own)))
    model.save_pretrained(shutil.copytree(bert, tmp_path / "own"))
    results = run_train(options(tmp_path / "own", data, tmp_path / "out", epochs=1))
    assert (results["labels"], results["new"], results["heads"]) == (own, [], ["classifier"])
    adapter = read_adapter(tmp_path / "out" / "adapter")
    assert adapter.kept == ("classifier",)
    assert not torch.equal(adapter.tensors["classifier.weight"], model.classifier.weight)
    assert adapter.model["labels"] == own


def test_texts_that_the_model_cannot_take(data: Path, tmp_path: Path) -> None:
    tokenizer = TEXT_MODELS["gpt2"].tokenizer()
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
    config = T5Config(vocab_size=len(tokenizer), eos_token_id=1, decoder_start_token_id=0, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    result = run("train", tmp_path / "t5", "--data", data, "--out", tmp_path / "out", "--num-blocks", 4)
    assert result.returncode == 1
    assert "T5ForSequenceClassification cannot process the texts as its tokenizer encodes them" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_head_of_another_size_is_replaced(bert: Path, data: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=5)
    model.save_pretrained(shutil.copytree(bert, tmp_path / "five"))
    run_train(options(tmp_path / "five", data, tmp_path / "out", epochs=1))
    fold_checkpoint(tmp_path / "five", tmp_path / "out" / "adapter", tmp_path / "folded")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "folded").config.num_labels == 3


def test_a_training_that_diverges_says_so(bert: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match=r"the loss of step \d is nan; use a smaller `learning_rate`"):
        run_train(options(bert, data, tmp_path, learning_rate=1e30))
