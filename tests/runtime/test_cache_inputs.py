"""The inputs of a decoder's step: those that follow from its tokens, and a cache that is empty before the first."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.decoders import llama, logits_after
from support.exports import Exports

from exporters import OrtRunner
from exporters.onnx_files.cache_names import MASK, TOKENS, is_present, past_of
from exporters.runtime.cache_inputs import as_types, empty_cache, step_inputs, with_empty_cache
from melora_fx import MELoRAError

NAMES = ("input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value")


def session_inputs(dtype: str = "tensor(float)", names: tuple[str, ...] = NAMES) -> list[Any]:
    """Returns inputs as a session of ONNX Runtime describes them; keys have other sizes than values."""
    made = []
    for name in names:
        is_cache = name.startswith("past")
        shape = ["batch", 3, "past_sequence", 8 if name.endswith("key") else 5] if is_cache else ["batch", "sequence"]
        made.append(SimpleNamespace(name=name, shape=shape, type=dtype if is_cache else "tensor(int64)"))
    return made


def test_positions_are_those_of_the_new_tokens_without_padding() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    whole = [[0, 0, 0, 1, 2], [0, 1, 1, 2, 3], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    for new in (1, 2, 5):
        given = step_inputs(NAMES, np.zeros((4, new), np.int64), mask)
        assert given["position_ids"].tolist() == [row[-new:] for row in whole]


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool, np.float32, np.int64])
def test_a_step_is_in_int64_and_in_one_piece(dtype: Any) -> None:
    tokens, mask = np.arange(24, dtype=np.int32).reshape(4, 6)[:, 1::2], np.ones((6, 4), dtype).T
    given = step_inputs(NAMES, tokens, mask)
    assert [*given] == ["input_ids", "attention_mask", "position_ids"]
    assert all(value.dtype == np.int64 and value.flags["C_CONTIGUOUS"] for value in given.values())
    np.testing.assert_array_equal(given["input_ids"], tokens)
    np.testing.assert_array_equal(given["attention_mask"], np.ones((4, 6)))


def test_a_step_has_only_what_the_graph_takes() -> None:
    tokens = np.array([[5, 9]])
    assert [*step_inputs(("input_ids", "attention_mask"), tokens, np.ones((1, 2)))] == ["input_ids", "attention_mask"]
    assert [*step_inputs(("input_ids", "encoder_attention_mask"), tokens, np.ones((1, 2)))] == ["input_ids"]


@pytest.mark.parametrize(
    ("name", "dtype"), [("tensor(float)", np.float32), ("tensor(float16)", np.float16), ("tensor(double)", np.float64)]
)
def test_an_empty_cache_is_of_the_graphs_type(name: str, dtype: Any) -> None:
    cache = empty_cache(session_inputs(name), 4)
    assert {key: value.shape for key, value in cache.items()} == {NAMES[3]: (4, 3, 0, 8), NAMES[4]: (4, 3, 0, 5)}
    assert {value.dtype for value in cache.values()} == {np.dtype(dtype)}


def test_an_encoders_cache_is_never_empty() -> None:
    names = ("input_ids", "past_key_values.0.decoder.key", "past_key_values.0.encoder.key")
    assert [*empty_cache(session_inputs(names=names), 2)] == ["past_key_values.0.decoder.key"]


def test_floats_are_brought_to_a_graphs_types() -> None:
    inputs = session_inputs("tensor(float16)")
    given = {NAMES[3]: np.ones((1, 3, 2, 8), np.float32), "attention_mask": np.ones((1, 2), np.int64)}
    found = as_types(inputs, given)
    assert (found[NAMES[3]].dtype, found["attention_mask"].dtype) == (np.float16, np.int64)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list], ids=["array", "tensor", "list"])
def test_tokens_alone_begin_a_text(kind: Any) -> None:
    given = with_empty_cache(session_inputs(), {"input_ids": kind([[5, 9, 4], [7, 8, 3]])})
    assert {*given} == {*NAMES}
    assert given["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert given["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert given[NAMES[3]].shape == (2, 3, 0, 8)


def test_what_was_given_stays() -> None:
    tokens, mask = np.array([[5, 9, 4]]), torch.tensor([[0, 1, 1]])
    given = with_empty_cache(session_inputs(), {"input_ids": tokens, "attention_mask": mask})
    assert given["input_ids"] is tokens
    assert given["attention_mask"] is mask
    assert given["position_ids"].tolist() == [[0, 0, 1]]
    own = np.array([[7, 8, 9]])
    assert with_empty_cache(session_inputs(), {"input_ids": tokens, "position_ids": own})["position_ids"] is own


@pytest.mark.parametrize(
    ("inputs", "given"),
    [
        (session_inputs(), {"attention_mask": np.ones((1, 2))}),
        (session_inputs(), {"input_ids": np.array([[5]]), NAMES[3]: np.zeros((1, 3, 0, 8))}),
        (session_inputs(names=NAMES[:2]), {"input_ids": np.array([[5]])}),
        (session_inputs(), {"input_ids": np.array([5, 9])}),
        (session_inputs(), {}),
    ],
    ids=["no tokens", "a part of the cache", "a graph without a cache", "one axis", "nothing"],
)
def test_nothing_is_added_to_other_inputs(inputs: list[Any], given: dict[str, Any]) -> None:
    assert with_empty_cache(inputs, given) == given


def test_a_mask_of_other_tokens_is_left_to_the_runners_check() -> None:
    """The mask of a past that was forgotten: no positions are invented."""
    given = {"input_ids": np.array([[5]]), "attention_mask": np.ones((1, 4), np.int64)}
    assert "position_ids" not in with_empty_cache(session_inputs(), given)


@pytest.fixture
def runner(exports: Exports) -> OrtRunner:
    return OrtRunner(exports("decoder").path)


def past_in(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.replace("present", "past_key_values"): value for name, value in outputs.items() if name != "logits"}


@pytest.mark.parametrize("as_tensors", [False, True], ids=["arrays", "tensors"])
def test_a_runner_begins_with_tokens_and_goes_on_with_a_past(runner: OrtRunner, as_tensors: bool) -> None:
    kind: Any = torch.tensor if as_tensors else np.array
    model = llama()
    first = runner.run({"input_ids": kind([[5, 9, 4]])})
    following = {
        "input_ids": kind([[20, 33]]),
        "attention_mask": kind([[1] * 5]),
        "position_ids": kind([[3, 4]]),
    }
    second = runner.run(following | past_in(first))
    for logits, text in ((first, [5, 9, 4]), (second, [5, 9, 4, 20, 33])):
        expected = logits_after(model, text)
        np.testing.assert_allclose(logits["logits"][0, -1], expected, atol=1e-4 * np.abs(expected).max())
    assert second["present.0.key"].shape == (1, 2, 5, 8)


def test_a_runner_begins_with_a_padded_text(runner: OrtRunner) -> None:
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    logits = runner.run({"input_ids": np.array([[0, 0, 5, 9], [7, 8, 3, 11]]), "attention_mask": mask})["logits"]
    for row, text in enumerate(([5, 9], [7, 8, 3, 11])):
        expected = logits_after(llama(), text)
        np.testing.assert_allclose(logits[row, -1], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"input_ids": np.array([[5]]), "attention_mask": np.ones((1, 4), np.int64)}, r"missing \['position_ids'\]"),
        ({"input_ids": np.zeros((2, 0), np.int64)}, r"assumed that input_ids\.shape\[1\] > 0"),
        ({"input_ids": np.zeros((0, 2), np.int64)}, r"assumed that input_ids\.shape\[0\] > 0"),
        ({"input_ids": np.array([5, 9])}, r"missing \['attention_mask', 'position_ids', 'past_key_values\.0\.key'"),
        ({"attention_mask": np.ones((1, 4), np.int64)}, r"missing \['input_ids', 'position_ids'"),
        ({"input_ids": np.array([[5]]), "labels": np.array([[5]])}, r"unknown \['labels'\]"),
        ({"input_ids": np.array([[5]], np.int32)}, r"expected: \(tensor\(int64\)\)"),
        ({"input_ids": np.array([[5]]), "attention_mask": np.ones((1, 1), bool)}, r"expected: \(tensor\(int64\)\)"),
        ({"input_ids": np.array([[51]])}, "out of data bounds"),
    ],
    ids=[
        "a mask of more tokens",
        "no tokens",
        "no texts",
        "one axis",
        "no ids",
        "another input",
        "int32",
        "a bool mask",
        "outside of the vocabulary",
    ],
)
def test_what_a_runner_refuses_of_a_first_step(runner: OrtRunner, given: dict[str, Any], text: str) -> None:
    with pytest.raises(MELoRAError, match=text):
        runner.run(given)


def test_a_runner_refuses_a_step_with_a_part_of_its_past(runner: OrtRunner) -> None:
    first = runner.run({"input_ids": np.array([[5, 9, 4]])})
    with pytest.raises(MELoRAError, match=r"missing \['attention_mask', 'position_ids'"):
        runner.run({"input_ids": np.array([[5]]), "past_key_values.0.key": first["present.0.key"]})
    step = step_inputs(NAMES, np.array([[5]]), np.ones((1, 4)))
    with pytest.raises(MELoRAError, match=r"missing \['past_key_values\.1\.value'\]"):
        runner.run(step | {name: value for name, value in past_in(first).items() if name[-7:] != "1.value"})
    with pytest.raises(MELoRAError, match="ONNX Runtime cannot run"):
        runner.run(step | {name: value.astype(np.float16) for name, value in past_in(first).items()})


@pytest.mark.slow
def test_a_graph_in_half_precision_begins_with_tokens_too(exports: Exports) -> None:
    runner = OrtRunner(exports("adapted decoder", adapter="keep", target="ort-cuda").path)
    outputs = runner.run({"input_ids": np.array([[5, 9, 4]])})
    assert outputs["present.0.key"].dtype == np.float16
    assert outputs["logits"].dtype == np.float32


@pytest.mark.parametrize("columns", [2, 4])
def test_a_mask_is_of_the_past_and_the_new_tokens(exports: Exports, columns: int) -> None:
    runner = OrtRunner(exports("decoder").path)
    first = runner.run({TOKENS: np.array([[5, 9]])})
    cache = {past_of(name): value for name, value in first.items() if is_present(name)}
    step = step_inputs(runner.input_names, np.array([[4]]), np.ones((1, 3), np.int64))
    runner.run(step | cache)
    with pytest.raises(
        MELoRAError, match=f"`attention_mask` has {columns} columns: the cache has 2 tokens, and 1 are new"
    ):
        runner.run(step | cache | {MASK: np.ones((1, columns), np.int64)})
