"""What a whole capture assumed of the inputs is checked in every call: right or refused, never silent."""

from pathlib import Path

import pytest
from support.whole_captures import CASES, WholeCase, check, check_onnx


@pytest.mark.default_cases("long-inputs", "other-order", "view-of-weight")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_right_or_refused(case: WholeCase) -> None:
    check(case)


@pytest.mark.default_cases("long-inputs")
@pytest.mark.parametrize("case", [each for each in CASES.values() if each.exported], ids=lambda case: case.id)
def test_onnx_right_or_refused(case: WholeCase, tmp_path: Path) -> None:
    check_onnx(case, tmp_path)
