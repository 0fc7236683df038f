"""What a whole capture assumed of the inputs is checked in every call: correct or refused, never silently incorrect."""

from pathlib import Path

import pytest
from support.capture_table import WHOLE, documented
from support.whole_captures import CASES, WholeCase, check, check_onnx


@pytest.mark.default_cases("long-inputs", "other-order", "view-of-weight")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_right_or_refused(case: WholeCase) -> None:
    check(case)


def test_the_page_has_a_row_for_each_case() -> None:
    """`PYTHONPATH=tests python -m support.capture_table` writes them."""
    assert documented(WHOLE) == [(case.area, case.what, case.result) for case in CASES.values()]


@pytest.mark.default_cases("long-inputs")
@pytest.mark.parametrize("case", [each for each in CASES.values() if each.exported], ids=lambda case: case.id)
def test_onnx_right_or_refused(case: WholeCase, tmp_path: Path) -> None:
    check_onnx(case, tmp_path)
