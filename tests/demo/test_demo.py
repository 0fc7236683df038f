"""`melora-fx demo` on user-provided models: what `export` and `fold` write has the reported accuracy."""

import json
from pathlib import Path

import pytest
from support.command_line import run
from support.text_models import TEXT_MODELS, held_out_accuracy, write_csv
from transformers import AutoModelForSequenceClassification

from exporters import OrtRunner, TorchRunner
from exporters.training.texts import read_texts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "texts.csv", 2500)


@pytest.mark.slow_cases("llama-safetensors")
@pytest.mark.parametrize(
    ("name", "form"),
    [("bert", "safetensors"), ("distilbert", "bin"), ("gpt2", "bin"), ("llama", "safetensors")],
)
def test_the_model_that_is_written_is_as_good_as_the_demo_says(
    name: str, form: str, data: Path, tmp_path: Path
) -> None:
    base, out = TEXT_MODELS[name].write(tmp_path / "base", as_bin=form == "bin"), tmp_path / "out"
    result = run("demo", "--quick", "--data", data, "--model", base, "--out", out)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    reported = report["accuracy_after"]
    assert reported > report["majority_baseline"] + 0.1
    assert report["accuracy_merged"] == reported
    assert not (out / "demo-checkpoints").exists()
    texts = read_texts(data, "text", "label")

    result = run("export", base, out / "adapter", "-o", tmp_path / "export" / "model.onnx")
    assert result.returncode == 0, result.stderr
    assert held_out_accuracy(OrtRunner(tmp_path / "export" / "model.onnx"), base, texts) == reported
    labels = json.loads((tmp_path / "export" / "config.json").read_text())["id2label"]
    assert labels == {"0": "animals", "1": "food", "2": "travel"}

    result = run("fold", base, out / "adapter", "-o", tmp_path / "folded")
    if form == "bin":
        assert (result.returncode, "`save_pretrained` it, which writes safetensors" in result.stderr) == (1, True)
        return
    assert result.returncode == 0, result.stderr
    folded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "folded").eval()
    folded.config.use_cache = False
    assert held_out_accuracy(TorchRunner(folded), tmp_path / "folded", texts) == reported
    assert folded.config.id2label == {0: "animals", 1: "food", 2: "travel"}
    assert folded.config.pad_token_id is not None
