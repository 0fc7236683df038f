"""An export's assumptions about a step, in terms of tokens and mask: translated, without repeated or refuted ones."""

from itertools import product

import pytest

from exporters.decoders.step_conditions import (
    ONE_TOKEN_OR_TEXT,
    STEP_CONDITIONS,
    step_conditions,
    without_refuted,
)
from exporters.graph.ranges import holds
from melora_fx.whole_capture.conditions import Condition

INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value")
TOKENS, TOTAL, BATCH = "input_ids.shape[1]", "attention_mask.shape[1]", "input_ids.shape[0]"
KEY = "past_key_values_0_key"


def translated(*texts: str) -> list[str]:
    """Returns an export's conditions in addition to those of every step."""
    found = step_conditions(map(Condition, texts), INPUTS)
    assert tuple(found[: len(STEP_CONDITIONS)]) == STEP_CONDITIONS
    return [condition.text for condition in found[len(STEP_CONDITIONS) :]]


def shapes(batch: int, new: int, total: int) -> dict[str, tuple[int, int]]:
    return {"input_ids": (batch, new), "attention_mask": (batch, total)}


def test_every_step_has_tokens_and_a_mask_of_past_and_new_ones() -> None:
    assert translated() == []
    for batch, new, total in product(range(3), range(4), range(6)):
        assert holds(STEP_CONDITIONS, shapes(batch, new, total)) == (batch > 0 and 0 < new <= total)
    assert not holds(STEP_CONDITIONS, {"input_ids": (2, 3), "attention_mask": (1, 3)})


def test_one_token_or_one_text_after_a_past() -> None:
    for batch, new, past in product(range(1, 4), range(1, 4), range(3)):
        expected = batch == 1 or new == 1 or past == 0
        assert holds([ONE_TOKEN_OR_TEXT], shapes(batch, new, past + new)) == expected


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (f"{KEY}.shape[2] > 3", lambda batch, new, past: past > 3),
        (f"{KEY}.shape[2] + {TOKENS} <= 16", lambda batch, new, past: past + new <= 16),
        ("position_ids.shape[1] != 3", lambda batch, new, past: new != 3),
        ("position_ids.shape[0] < 7", lambda batch, new, past: batch < 7),
        (f"{KEY}.shape[0] != 2", lambda batch, new, past: batch != 2),
        ("past_key_values_0_value.shape[2] * 2 != 4", lambda batch, new, past: past != 2),
        (f"{TOTAL} % 2 == 0", lambda batch, new, past: (past + new) % 2 == 0),
        ("attention_mask.shape[0] < 7", lambda batch, new, past: batch < 7),
    ],
    ids=["past", "past and new", "positions", "positions' rows", "rows of the past", "a value", "mask", "mask's rows"],
)
def test_sizes_of_the_cache_are_said_of_tokens_and_mask(text: str, meaning: object) -> None:
    (found,) = translated(text)
    condition = Condition(found)
    assert {*condition.names} <= {"input_ids", "attention_mask"}
    for batch, new, past in product((1, 2, 3, 7), (1, 2, 3, 4, 17), (0, 1, 2, 3, 5, 12, 16)):
        assert holds([condition], shapes(batch, new, past + new)) == meaning(batch, new, past), (batch, new, past)  # type: ignore[operator]


@pytest.mark.parametrize(
    "text",
    [
        f"{KEY}.shape[2] == past_key_values_0_value.shape[2]",
        f"{KEY}.shape[0] == {BATCH}",
        f"{KEY}.shape[2] + {TOKENS} == {TOTAL}",
        f"position_ids.shape[1] == {TOKENS}",
        f"{KEY}.shape[1] == 2",
        f"{TOTAL} < 9223372036854775807",
        f"{TOTAL} >= 1",
    ],
)
def test_what_holds_of_every_step_is_left_out(text: str) -> None:
    """Also conditions on sizes that only the cache has."""
    assert translated(text) == []


def test_conditions_that_exclude_the_same_steps_are_one_and_the_shortest() -> None:
    texts = (f"not {TOKENS} > 16", f"16 >= {TOKENS}", f"{TOKENS} < 17", "position_ids.shape[1] <= 16")
    assert translated(*texts) == [f"{TOKENS} <= 16"]
    assert translated(*reversed(texts)) == [f"{TOKENS} <= 16"]
    assert translated(f"{TOKENS} > 2", f"{TOKENS} > 3") == [f"{TOKENS} > 2", f"{TOKENS} > 3"]


def test_windows_and_numbers_of_positions_are_kept() -> None:
    """Up to the largest number of tokens that models support."""
    for size in (16, 63, 1024, 4096, 131071):
        assert len(translated(f"{TOTAL} <= {size}")) == 1
        assert len(translated(f"{KEY}.shape[2] < {size}")) == 1


def test_a_decoder_beside_an_encoder_is_asked_of_both_texts() -> None:
    inputs = ("input_ids", "encoder_attention_mask", "past_key_values.0.decoder.key", "past_key_values.0.encoder.key")
    found = step_conditions([Condition(f"{TOKENS} > 7")], inputs)
    assert holds(found, {"input_ids": (2, 1), "encoder_attention_mask": (2, 3)})
    for tokens, mask in (((2, 0), (2, 3)), ((0, 1), (0, 3)), ((2, 1), (2, 0)), ((2, 1), (3, 3))):
        assert not holds(found, {"input_ids": tokens, "encoder_attention_mask": mask})


def test_what_a_right_step_refutes_is_left_out() -> None:
    conditions = [*STEP_CONDITIONS, Condition(f"{TOKENS} > 1"), Condition(f"{TOTAL} <= 8"), ONE_TOKEN_OR_TEXT]
    kept = without_refuted(conditions, [shapes(2, 1, 6), shapes(1, 3, 8)])
    assert kept == [*STEP_CONDITIONS, Condition(f"{TOTAL} <= 8"), ONE_TOKEN_OR_TEXT]
    assert without_refuted(conditions, []) == conditions
    cache = {"past_key_values.0.key": (2, 2, 5, 8)}
    assert without_refuted(conditions, [shapes(2, 2, 9) | cache]) == [*STEP_CONDITIONS, Condition(f"{TOKENS} > 1")]
