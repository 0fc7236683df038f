"""The same export twice gives the same bytes, in processes that hash strings differently."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.onnx_files import data_of

EXPORTS = """
import sys
sys.path.insert(0, "tests")
from support.models import bert_classifier, fill, tokens
import melora_fx
from exporters import export_onnx

config = melora_fx.MELoRAConfig(rank=2, num_blocks=3)
model = bert_classifier(num_layers=1)
fill(melora_fx.rewrite(model, "all-linear", config, keep_trainable="classifier"))
target = sys.argv[1]
for adapter in ("fold", "keep", "swap") if target != "tensorrt" else ("fold", "keep"):
    export_onnx(model, tokens(), adapter, target=target, adapter=adapter, verify=False)
"""


@pytest.mark.slow_cases("ort-cpu", "ort-cuda")
@pytest.mark.parametrize("target", ["portable", "ort-cpu", "ort-cuda", "tensorrt"])
def test_every_export_has_the_same_bytes_in_another_process(target: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    for seed in ("1", "77"):
        (tmp_path / seed).mkdir()
        (tmp_path / seed / "tests").symlink_to(root / "tests")
        variables = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        command = [sys.executable, "-W", "ignore", "-c", EXPORTS, target]
        subprocess.run(command, cwd=tmp_path / seed, env=variables, check=True)
    folders = [folder.name for folder in (tmp_path / "1").iterdir() if not folder.is_symlink()]
    assert len(folders) == (2 if target == "tensorrt" else 3)
    for folder in folders:
        first, second = (tmp_path / seed / folder for seed in ("1", "77"))
        for file in ("model.onnx", data_of(first / "model.onnx").name, "config.json"):
            assert (first / file).read_bytes() == (second / file).read_bytes(), f"{folder}/{file}"
        reports = [json.loads((each / "model.export.json").read_text()) | {"seconds": 0} for each in (first, second)]
        assert reports[0] == reports[1], folder
