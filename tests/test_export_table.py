"""The table of exported graphs in docs/EXPORT.md still holds, in what does not depend on the versions it names."""

from pathlib import Path

import pytest
from export_table import Case, Row, cases, documented, measure

FAST = {("BERT", "ort-cuda", "fp16", "fold")}


def marked(case: Case) -> object:
    return pytest.param(case, id=case.label, marks=() if case.key in FAST else pytest.mark.slow)


def test_the_page_lists_every_case() -> None:
    assert list(documented()) == [case.key for case in cases()]


@pytest.mark.parametrize("case", [marked(case) for case in cases()])
def test_the_graph_is_as_documented(case: Case, tmp_path: Path) -> None:
    nodes, runtime_ops, error = documented()[case.key]
    row = measure(case, tmp_path)
    assert isinstance(row, Row)
    assert (", ".join(row.runtime_ops) or "–") == runtime_ops
    assert row.as_base == nodes.endswith("as the base") == (case.adapter == "fold")
    assert row.error <= 10 * float(error)
