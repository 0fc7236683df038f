"""The table of docs/ADAPTERS.md is still correct, and its errors are small."""

import pytest
from support.conversion_table import FORMS, documented, measure
from support.travelling import CASES

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT reads it
_FLOAT16_TABLE = ("llama.cpp", "GPT-2, split")
"""llama.cpp's GELU: its own base differs from torch's by as much."""
AGAIN = [
    (form, name)
    for form, run in FORMS.items()
    if not isinstance(run, str) and form[0] not in ("vLLM", "llama.cpp", "MLX")
    for name in ("BERT, a head", "Llama", "Mixtral")
]


def error_in(cell: str) -> float | None:
    try:
        return float(cell.rstrip("†"))
    except ValueError:
        return None


def test_the_page_lists_every_case() -> None:
    assert list(documented()) == list(FORMS)
    assert {len(cells) for cells in documented().values()} == {len(CASES)}


def test_the_documented_errors_are_small() -> None:
    for (program, direction), cells in documented().items():
        for name, cell in zip(CASES, cells, strict=True):
            error = error_in(cell)
            if error is not None:
                assert error <= (1e-3 if (program, name) == _FLOAT16_TABLE else 1e-5), (program, direction, name)
        if not isinstance(FORMS[program, direction], str):
            assert any(error_in(cell) is not None for cell in cells), (program, direction)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "name"), AGAIN, ids=lambda value: str(value))
def test_a_cell_is_as_documented(form: tuple[str, str], name: str) -> None:
    expected = documented()[form][list(CASES).index(name)]
    found = measure(form, name)
    error = error_in(found)
    if error is None:
        assert found == expected
    else:
        assert error <= max(20 * (error_in(expected) or 0.0), 1e-6)
