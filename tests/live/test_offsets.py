"""Offsets of views, found without `storage_offset`, equal `storage_offset`."""

from collections.abc import Callable

import pytest
import torch

from melora_fx.live.offsets import first_elements

VIEWS: dict[str, tuple[str, tuple, dict]] = {
    "rows": ("getitem", (slice(3, 8),), {}),
    "last_rows": ("getitem", (slice(-4, None),), {}),
    "past_the_end": ("getitem", (slice(5, 50),), {}),
    "one_row": ("getitem", (2,), {}),
    "last_row": ("getitem", (-1,), {}),
    "rows_and_columns": ("getitem", ((slice(1, None, 2), slice(2, 4)),), {}),
    "columns": ("getitem", ((..., slice(1, 3)),), {}),
    "new_dimension": ("getitem", ((None, slice(4, 6)),), {}),
    "narrow": ("narrow", (0, 4, 5), {}),
    "narrow_columns": ("narrow", (1, 2, 3), {}),
    "narrow_from_the_end": ("narrow", (0, -3, 2), {}),
    "narrow_by_name": ("narrow", (), {"dim": 0, "start": 2, "length": 3}),
    "select": ("select", (0, 3), {}),
    "select_by_name": ("select", (), {"dim": 1, "index": -2}),
    "chunk": ("chunk", (4,), {}),
    "chunk_columns": ("chunk", (2, 1), {}),
    "split": ("split", (5,), {}),
    "split_sizes": ("split", ([3, 4, 5],), {"dim": 0}),
    "split_with_sizes": ("split_with_sizes", ([2, 10],), {}),
    "unbind": ("unbind", (), {}),
    "unbind_columns": ("unbind", (1,), {}),
    "transposed": ("transpose", (0, 1), {}),
}


@pytest.mark.parametrize("of", [lambda x: x, lambda x: x.t(), lambda x: x[1:, 1:]], ids=["whole", "columns", "part"])
@pytest.mark.parametrize(("name", "args", "options"), VIEWS.values(), ids=VIEWS)
def test_first_elements(name: str, args: tuple, options: dict, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    viewed = of(torch.arange(13.0 * 13).view(13, 13))[:12, :12]
    function = getattr(torch.Tensor, "__getitem__" if name == "getitem" else name)
    result = function(viewed, *args, **options)
    parts = list(result) if isinstance(result, tuple | list) else [result]
    offsets = [part.storage_offset() - viewed.storage_offset() for part in parts]
    assert first_elements(name, viewed, args, options, parts) == offsets


def test_a_number_that_is_not_known() -> None:
    with pytest.raises(NotImplementedError):
        first_elements("narrow", torch.zeros(3, 3), (0, torch.tensor(1), 2), {}, [torch.zeros(2, 3)])
