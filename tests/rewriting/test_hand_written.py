"""Modules as people write them by hand are adapted correctly or refused, never silently incorrect."""

from collections.abc import Callable
from typing import Any

import pytest
from support.capture_table import IN_PLACE, WRONG, documented
from support.hand_written import CASES, Case, in_use
from support.hand_written.case import AT_REWRITE, EITHER, IN_FORWARD, LIMIT, REFUSED, RIGHT, WITH_GRADIENTS
from support.hand_written.checks import assert_outcome
from support.sampled import a_fifth_slow

ADAPTED = (RIGHT, EITHER)
QUICK = [
    f"{case.id}-eval" for number, case in enumerate(CASES.values()) if case.outcome not in ADAPTED or number % 5 == 0
]
"""Cases of the default run: every fifth that is adapted, and all that are refused."""
ASK_FOR_THE_MODE = (
    "functional-dropout-train",
    "train-or-eval-train",
    "product-in-training-train",
    "enable-grad-train",
    "normalised-train",
    "own-train-train",
    "encoder-layer-train",
)


def of(outcomes: tuple[str, ...]) -> Any:
    """Parametrizes `case` with the cases of these outcomes; slow ones are marked."""
    cases = [case for case in CASES.values() if case.outcome in outcomes]
    parameters = [pytest.param(case, id=case.id, marks=[pytest.mark.slow] * case.slow) for case in cases]
    return pytest.mark.parametrize("case", parameters)


def of_adapted(chosen: Callable[[Case], bool] = lambda case: True) -> Any:
    """Parametrizes `case` with those that are adapted: every fifth slow, the others full."""
    cases = [case for case in CASES.values() if case.outcome in ADAPTED and chosen(case)]
    return pytest.mark.parametrize("case", a_fifth_slow(cases, [case.id for case in cases]))


def or_skipped(function: Callable[..., None], *arguments: Any) -> None:
    """Calls the function; skips the test if the plain model cannot do this either."""
    try:
        function(*arguments)
    except in_use.NotAskedError as reason:
        pytest.skip(str(reason))


@pytest.mark.default_cases(*QUICK, *ASK_FOR_THE_MODE)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@of((RIGHT, AT_REWRITE, IN_FORWARD, WITH_GRADIENTS, REFUSED, EITHER, LIMIT))
def test_right_or_refused(case, training) -> None:
    """In eval mode without and with gradients, and in training; the training steps of most cases are slow."""
    assert_outcome(case, training=training)


def test_the_page_has_a_row_for_each_case() -> None:
    """`PYTHONPATH=tests python -m support.capture_table` writes them."""
    rows = {(area, what): result for area, what, result in documented(IN_PLACE)}
    assert rows.keys() == {(case.area, case.what) for case in CASES.values()}
    open_outcomes = (EITHER, REFUSED)
    pinned = {(case.area, case.what): case.outcome for case in CASES.values() if case.outcome not in open_outcomes}
    assert {key: rows[key] for key in pinned} == pinned
    assert WRONG not in rows.values()


@pytest.mark.filterwarnings("ignore")  # torch's warnings while it compiles
@of_adapted()
def test_compiled(case, fresh_dynamo) -> None:
    or_skipped(in_use.assert_compiles, case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@of((IN_FORWARD, REFUSED))
def test_refused_when_compiled(case, fresh_dynamo) -> None:
    or_skipped(in_use.assert_refused_compiled, case)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@of_adapted(lambda case: case.is_plain_call)
def test_exported(case, strict, fresh_dynamo) -> None:
    or_skipped(in_use.assert_exports, case, strict)


@pytest.mark.parametrize("way", in_use.COPIES)
@of_adapted()
def test_copied(case, way) -> None:
    or_skipped(in_use.assert_copies, case, way)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@of_adapted(lambda case: case.is_plain_call)
def test_checkpointed(case, use_reentrant) -> None:
    or_skipped(in_use.assert_checkpoints, case, use_reentrant)
