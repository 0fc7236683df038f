"""Conditions on sizes: read, simplified, checked, and taken from files."""

import pickle
from typing import Any

import pytest
from support.models import randn

from melora_fx import MELoRAError
from melora_fx.whole_capture.conditions import Condition, Shaped, readable
from melora_fx.whole_capture.tried_sizes import with_single_entries

X = {"x": randn(2, 5)}


@pytest.mark.parametrize(
    ("guard", "text"),
    [
        ("L['x'].size()[0] > 1", "x.shape[0] > 1"),
        ("(-1)*L['x'].size()[1] > -16", "x.shape[1] <= 15"),
        ("L['x'].size()[1] == min(12, L['x'].size()[1])", "x.shape[1] <= 12"),
        ("24*L['x'].size()[1] == 24*max(0, L['x'].size()[1] - max(0, (-16) + L['x'].size()[1]))", "x.shape[1] <= 16"),
        ("L['i'].size()[1] == min(32, L['i'].size()[1]) or min(32, L['i'].size()[1]) == 1", "i.shape[1] <= 32"),
        ("min(8, L['x'].size()[1]) <= L['x'].size()[1]", ""),
        ("(-5) + L['x'].size()[1] > -6", ""),
        ("3*L['x'].size()[1] >= 7 and L['x'].size()[1] <= 9", "x.shape[1] > 2 and x.shape[1] <= 9"),
        ("L['x'].size()[1] != 7", "x.shape[1] != 7"),
        ("L['x'].size()[1] == 7", "x.shape[1] == 7"),
        ("10*(L['x'].size()[1] - 100) > 9*L['x'].size()[1]", "10*(x.shape[1] - 100) > 9*x.shape[1]"),
        ("L['x'].size()[1] == min(999999, L['x'].size()[1])", "x.shape[1] == min(999999, x.shape[1])"),
        ("(L['x'].size()[1] % 4) == 0", "(x.shape[1] % 4) == 0"),
        ("(-1)*L['x'].size()[0] + L['y'].size()[0] >= 0", "x.shape[0] - y.shape[0] <= 0"),
        ("L['x']['a'].size()[0] == L['y'][0].size()[1]", "x['a'].shape[0] == y[0].shape[1]"),
    ],
)  # fmt: skip
def test_guards_are_made_readable(guard: str, text: str) -> None:
    """The simplified condition is true for the same sizes."""
    assert readable(guard) == text
    if "y" not in guard and "['a']" not in guard:
        name = "i" if "L['i']" in guard else "x"
        before = Condition(guard.replace(f"L['{name}']", name).replace(".size()[", ".shape["))
        for size in (*range(40), 500, 1000, 1001, 999_999, 1_000_000):
            values = {name: _Sized((size, size))}
            assert before.holds(values) == (not text or Condition(text).holds(values)), size


def test_minima_and_maxima_of_torch_2_15_are_readable() -> None:
    size = "L['x'].size()[1]"
    assert readable(f"{size} == torch.sym_min(32, {size}) or torch.sym_min(32, {size}) == 1") == "x.shape[1] <= 32"
    assert readable(f"torch.sym_max(4, {size}) == 4") == "x.shape[1] <= 4"


@pytest.mark.parametrize("name", ["float", "min", "math"])
def test_an_argument_may_have_the_name_of_a_function(name: str) -> None:
    condition = Condition(f"{name}.shape[0] <= max(2, 3)")
    assert condition.names == (name,)
    assert condition.holds({name: Shaped((3,))})
    assert not condition.holds({name: Shaped((4,))})


class _Sized:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def test_a_condition() -> None:
    condition = Condition("x.shape[1] % 5 == 0 and min(x.shape[0], 7) < 3")
    assert condition.holds(X)
    assert condition.names == ("x",)
    assert pickle.loads(pickle.dumps(condition)) == condition
    assert not Condition("x.shape[1] % (x.shape[0] - 2) == 0").holds(X), "a remainder by 0"


@pytest.mark.parametrize(
    "text",
    [
        "x.shape[0] >",
        "__import__('os').system('true') == 0",
        "x.__class__ == 1",
        "[y for y in x] == 1",
        "(lambda: 1)() == 1",
        "x.shape[0] == print(1)",
        "math.__loader__ == 1",
        "x.shape[0]; 1",
        "min(x.shape, key=x) == 1",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    """They may come from a file."""
    with pytest.raises(MELoRAError, match="is not a condition on sizes"):
        Condition(text)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["x.shape[0] > 1"], []),
        (["x.shape[0] != 1", "x.shape[1] <= 9"], ["x.shape[1] <= 9"]),
        (["x.shape[0]*x.shape[1] > 6"], ["(x.shape[0]*x.shape[1] > 6) or (x.shape[0] == 1)"]),
    ],
)
def test_one_entry_that_is_right_is_allowed(before: list[str], after: list[str]) -> None:
    values: dict[str, Any] = {"x": randn(1, 5)}
    assert [each.text for each in with_single_entries(map(Condition, before), ["x.shape[0]"], values)] == after
