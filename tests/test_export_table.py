"""The table of graphs in docs/EXPORT.md is still correct, except parts that depend on the named versions."""

from pathlib import Path

import pytest
from support.export_table import MODELS, Case, Row, cases, documented, measure

EXPORTED = {("BERT", "ort-cuda", "fp16", "fold")} | {
    (model, *rest) for model in MODELS for rest in (("ort-cpu", "fp32", "swap"), ("tensorrt", "fp16", "keep"))
}


def test_the_page_lists_every_case() -> None:
    assert list(documented()) == [case.key for case in cases()]


def test_the_documented_errors_are_small() -> None:
    for key, (_, _, error, from_keep, _) in documented().items():
        assert float(error) <= (1e-4 if "fp32" in key else 2e-2)
        assert ("swap" in key) == bool(from_keep)
        assert float(from_keep or 0) <= (1e-5 if "fp32" in key else 2e-2)


@pytest.mark.slow_cases(
    "T5, ort-cpu, *",
    "Llama, tensorrt, *",
    "MiniLM-L6, tensorrt, *",
    "BERT, ort-cuda, *",
    "ViT, ort-cpu, *",
    "nn.TransformerEncoder, tensorrt, *",
    "GPT-2, ort-cpu, *",
)
@pytest.mark.parametrize("case", [case for case in cases() if case.key in EXPORTED], ids=lambda case: case.label)
def test_the_graph_is_as_documented(case: Case, tmp_path: Path) -> None:
    nodes, runtime_ops, error, from_keep, _ = documented()[case.key]
    row = measure(case, tmp_path)
    assert isinstance(row, Row)
    assert (", ".join(row.runtime_ops) or "–") == runtime_ops
    assert row.as_base == nodes.endswith("as the base") == (case.adapter == "fold")
    assert row.error <= 10 * float(error)
    assert (row.from_keep or 0) <= 10 * float(from_keep or 0)
