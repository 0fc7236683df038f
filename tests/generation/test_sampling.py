"""The next token: against softmax on many draws, at the edges of `top_p` and of the temperature."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporters.generation.sampling import draw, most_likely

DRAWS = 40_000
LOGITS = np.array([1.5, -0.3, 2.0, 0.0, -4.0, 1.5, -1e30], np.float32)


def drawn(
    logits: np.ndarray, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, draws: int = DRAWS
) -> np.ndarray:
    """Returns the share of draws of each token from this one row."""
    generator = np.random.default_rng(seed)
    chosen = draw(np.tile(logits, (draws, 1)), temperature, top_p, generator)
    return np.bincount(chosen, minlength=len(logits)) / draws


def assert_distribution(found: np.ndarray, expected: np.ndarray) -> None:
    """Checks shares within five standard deviations."""
    assert (found[expected == 0] == 0).all()
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(found - expected) <= 5 * deviation + 1e-12).all(), (found, expected)


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    return torch.tensor(logits, dtype=torch.float64).div(temperature).softmax(-1).numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_have_the_probabilities_of_softmax(temperature: float) -> None:
    assert_distribution(drawn(LOGITS, temperature), softmax(LOGITS, temperature))


@pytest.mark.parametrize("top_p", [1e-12, 0.1, 0.41, 0.7, 0.999, 1.0])
def test_the_fewest_tokens_that_have_top_p_together(top_p: float) -> None:
    probabilities = softmax(LOGITS, 1.0)
    order = np.argsort(-probabilities, kind="stable")
    kept = order[: int(np.searchsorted(probabilities[order].cumsum(), top_p)) + 1]
    expected = np.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    assert_distribution(drawn(LOGITS, top_p=top_p), expected)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 2), (0.5 + 1e-9, 3), (0.25, 1), (0.75, 3), (1.0, 4)])
def test_a_sum_that_is_top_p_is_enough(top_p: float, kept: int) -> None:
    """Four equally likely tokens: the first ones are kept."""
    found = drawn(np.zeros(4), top_p=top_p)
    assert_distribution(found, np.array([1 / kept] * kept + [0] * (4 - kept)))


def test_tokens_that_are_ruled_out_are_never_drawn() -> None:
    logits = np.array([0.0, -np.inf, 1.0, -np.inf])
    assert_distribution(drawn(logits), softmax(logits, 1.0))
    alone = np.full(51, -np.inf)
    alone[7] = -1e30
    assert drawn(alone, draws=100)[7] == 1


@pytest.mark.parametrize("temperature", [1e-9, 1e-300, 5e-324])
def test_next_to_no_temperature_leaves_the_most_likely(temperature: float) -> None:
    assert_distribution(drawn(LOGITS, temperature), np.eye(7)[2])
    ties = np.array([3.0, 1.0, 3.0])
    assert_distribution(drawn(ties, temperature), np.array([0.5, 0, 0.5]))


@pytest.mark.parametrize("temperature", [1e300, float("inf")])
def test_any_token_at_a_very_high_temperature(temperature: float) -> None:
    assert_distribution(drawn(LOGITS[:6], temperature), np.full(6, 1 / 6))


def test_large_logits_do_not_overflow() -> None:
    for offset in (3e38, -3e38):
        logits = np.array([offset, offset], np.float32)
        assert_distribution(drawn(logits), np.array([0.5, 0.5]))
    assert_distribution(drawn(np.array([65504, -65504], np.float16)), np.array([1.0, 0.0]))


def test_each_row_is_drawn_by_itself() -> None:
    logits = np.stack([LOGITS, LOGITS[::-1], np.zeros(7, np.float32)])
    generator = np.random.default_rng(0)
    rows = np.array([draw(logits, 1.0, 0.9, generator) for _ in range(2000)])
    again = np.random.default_rng(0)
    np.testing.assert_array_equal(rows, [draw(logits, 1.0, 0.9, again) for _ in range(2000)])
    assert [{*row.tolist()} for row in rows.T] == [{0, 2, 5}, {6, 4, 1}, {*range(7)}]
    assert np.abs(np.corrcoef(rows.T) - np.eye(3)).max() < 0.1


def test_seeds_decide() -> None:
    first, second, third = (
        draw(np.tile(LOGITS, (64, 1)), 1.0, 1.0, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2)
    )
    assert first == second != third


def test_logits_stay_as_they_are() -> None:
    logits = np.tile(LOGITS, (3, 1))
    before = logits.copy()
    draw(logits, 0.5, 0.5, np.random.default_rng(0))
    most_likely(logits)
    np.testing.assert_array_equal(logits, before)


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9),
    st.floats(1e-6, 1e6),
    st.floats(1e-9, 1),
    st.integers(0, 2**63),
)
def test_what_is_drawn_is_among_the_likely(row: list[float], temperature: float, top_p: float, seed: int) -> None:
    """All more likely tokens together have less than `top_p`."""
    logits = np.array([row], np.float32)
    (chosen,) = draw(logits, temperature, top_p, np.random.default_rng(seed))
    probabilities = softmax(logits[0], temperature)
    assert probabilities[probabilities > probabilities[chosen]].sum() < top_p + 1e-9


def test_the_most_likely_is_the_first_of_the_largest() -> None:
    logits = np.array([[0.0, 3.0, 3.0], [-np.inf, -1.0, -2.0], [5.0, 5.0, 5.0]])
    assert most_likely(logits).tolist() == [1, 1, 0]
    assert most_likely(np.zeros((0, 4))).tolist() == []
