"""Hand-written models composed at random: each is correct or refused; none is silently incorrect.

In place, and with `example_inputs=` as one graph.
"""

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.composed_calls import EXAMPLES, Call
from support.composed_check import PARTLY, RIGHT, check_composed
from support.composed_modules import PIECES, ComposedModel, composed_models
from support.composed_pieces import FROZEN
from support.sampled import a_fifth_slow

from melora_fx import MELoRAConfig

CONFIGS = st.builds(MELoRAConfig, rank=st.integers(1, 2), num_blocks=st.integers(2, 3), alpha=st.just(3.0))

ONLY_REFUSED = ("reader: parameters", "reader: own list", "part: there and back", "product: einsum of a batch")
"""Without a correct model: they read a weight past its attribute, use it in both orientations, or as a stack."""

CAPTURED_PIECES = [piece for piece in PIECES if piece.partition(":")[0] in ("argument", "control", "input", "region")]
CAPTURED_PIECES += [piece for piece in PIECES if piece.startswith("state") and piece not in FROZEN]


def captured_models(piece: str = "") -> st.SearchStrategy[ComposedModel]:
    """Draws models whose Python one graph can follow."""
    return composed_models(piece).filter(lambda composed: composed.is_followed)


def examples(count: int) -> settings:
    """Returns settings for `count` examples; if one fails, one failure is shrunk and shown."""
    return settings(
        max_examples=count,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


@examples(12)
@given(composed=composed_models(), config=CONFIGS, by_name=st.booleans())
def test_a_composed_model_is_right_or_refused_by_name(
    composed: ComposedModel, config: MELoRAConfig, by_name: bool
) -> None:
    check_composed(composed, config, by_name=by_name)


@pytest.mark.parametrize("piece", a_fifth_slow(PIECES, PIECES))
def test_models_with_each_piece(piece: str) -> None:
    """Some of them must be correct: otherwise a rewrite that always refuses the piece would pass."""
    outcomes: Counter[str] = Counter()

    @examples(5)
    @given(composed=composed_models(piece), config=CONFIGS, by_name=st.booleans())
    def check(composed: ComposedModel, config: MELoRAConfig, by_name: bool) -> None:
        outcomes[check_composed(composed, config, by_name=by_name)] += 1

    check()
    assert outcomes[RIGHT] + outcomes[PARTLY] or piece in ONLY_REFUSED, outcomes


@pytest.mark.full
def test_most_of_many_composed_models_are_right() -> None:
    outcomes: Counter[str] = Counter()

    @examples(300)
    @given(composed=composed_models(), config=CONFIGS, by_name=st.booleans())
    def check(composed: ComposedModel, config: MELoRAConfig, by_name: bool) -> None:
        outcomes[check_composed(composed, config, by_name=by_name)] += 1

    check()
    assert outcomes[RIGHT] > 0.6 * outcomes.total(), outcomes


@examples(1)
@given(composed=captured_models("state: buffer reassigned"), config=CONFIGS, by_name=st.booleans())
def test_a_captured_composed_model_is_right_or_refused(
    composed: ComposedModel, config: MELoRAConfig, by_name: bool
) -> None:
    check_composed(composed, config, by_name=by_name, example=EXAMPLES[0])


@pytest.mark.parametrize("piece", a_fifth_slow(CAPTURED_PIECES, CAPTURED_PIECES))
def test_captured_models_with_each_piece_that_a_graph_may_freeze(piece: str) -> None:
    @examples(1)
    @given(composed=captured_models(piece), config=CONFIGS, by_name=st.booleans(), example=st.sampled_from(EXAMPLES))
    def check(composed: ComposedModel, config: MELoRAConfig, by_name: bool, example: Call) -> None:
        check_composed(composed, config, by_name=by_name, example=example)

    check()


@pytest.mark.full
def test_many_captured_composed_models_are_right() -> None:
    outcomes: Counter[str] = Counter()

    @examples(30)
    @given(composed=captured_models(), config=CONFIGS, by_name=st.booleans(), example=st.sampled_from(EXAMPLES))
    def check(composed: ComposedModel, config: MELoRAConfig, by_name: bool, example: Call) -> None:
        outcomes[check_composed(composed, config, by_name=by_name, example=example)] += 1

    check()
    assert outcomes[RIGHT] > 0.3 * outcomes.total(), outcomes
