"""The example of `exporters/graph/stand_ins.py`, and initializers that are not a row of stand-ins."""

import numpy as np
import onnx_ir
import pytest

from exporters.graph.stand_ins import joined_name, put_stand_ins, take_stand_ins
from exporters.spelling.values import add_initializer
from melora_fx import MELoRAError

NAMES = ["q.weight.T", "k.weight.T", "v.weight.T"]


def graph_of(arrays: dict[str, np.ndarray]) -> onnx_ir.Graph:
    graph = onnx_ir.Graph([], [], nodes=[])
    for name, array in arrays.items():
        add_initializer(graph, name, array)
    return graph


def values(graph: onnx_ir.Graph, name: str) -> np.ndarray:
    tensor = graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def packed(graph: onnx_ir.Graph, names: list[str]) -> onnx_ir.Graph:
    """Packs like a fusion: one initializer replaces several, side by side."""
    return graph_of({"val_7": np.concatenate([values(graph, name) for name in names], axis=1)})


def test_the_example_of_the_docstring() -> None:
    arrays = {name: np.full((2, 5), 0.5, np.float32) for name in NAMES}  # equal values are distinguished
    graph = graph_of(arrays)
    weights = put_stand_ins(graph, NAMES)
    assert list(weights) == NAMES
    np.testing.assert_array_equal(values(graph, "k.weight.T"), np.array([[2, 0, 0, 0, 0]] * 2, np.uint8))
    fused = packed(graph, NAMES)
    places = take_stand_ins(fused, weights)
    assert {name: place.columns for name, place in places.items()} == {
        "q.weight.T": (0, 5),
        "k.weight.T": (5, 10),
        "v.weight.T": (10, 15),
    }
    assert {place.initializer for place in places.values()} == {"{q,k,v}.weight.T"} == set(fused.initializers)
    np.testing.assert_array_equal(values(fused, "{q,k,v}.weight.T"), np.concatenate([*arrays.values()], axis=1))


def test_numbers_above_255_take_a_second_byte() -> None:
    arrays = {f"{index}.weight": np.full((1, 4), index, np.float32) for index in range(300)}
    graph = graph_of(arrays)
    weights = put_stand_ins(graph, [*arrays])
    np.testing.assert_array_equal(values(graph, "299.weight"), [[300 - 256, 1, 0, 0]])
    assert take_stand_ins(graph, weights) == {}
    np.testing.assert_array_equal(values(graph, "299.weight"), arrays["299.weight"])


def test_what_is_no_wide_matrix_stays() -> None:
    arrays = {"narrow": np.ones((5, 3), np.float32), "bias": np.ones(5, np.float32)}
    graph = graph_of(arrays)
    assert put_stand_ins(graph, ["narrow", "bias", "missing"]) == {}
    np.testing.assert_array_equal(values(graph, "narrow"), arrays["narrow"])


@pytest.mark.parametrize("change", ["cut", "unequal_rows", "unknown_number"])
def test_rows_of_anything_else_are_an_error(change: str) -> None:
    graph = graph_of({name: np.ones((2, 5), np.float32) for name in NAMES})
    weights = put_stand_ins(graph, NAMES)
    row = packed(graph, NAMES).initializers["val_7"].const_value
    assert row is not None
    array = row.numpy().copy()
    if change == "cut":
        array = array[:, :-1]
    elif change == "unequal_rows":
        array[1, 0] = 2
    else:
        array[:, 0] = 4
    with pytest.raises(MELoRAError, match="fusions built `val_7` from weights"):
        take_stand_ins(graph_of({"val_7": array}), weights)


def test_joined_names_say_what_differs() -> None:
    names = ["a.query.weight.T", "a.key.weight.T", "a.value.weight.T"]
    assert joined_name(names) == "a.{query,key,value}.weight.T"
    assert joined_name(["a.weight.T", "b.c.weight.T"]) == "{a,b.c}.weight.T"
