"""Parameters that overlap in memory: tied ones and views, and no others."""

import torch
from torch import nn

from melora_fx.shared_memory import sharing_parameters


class Holder(nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
            self.register_parameter(name, own)


def test_tied_parameters_and_modules_used_twice() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["again"] = model["c"]
    assert sharing_parameters(model) == {"a.weight": ("b.weight",), "b.weight": ("a.weight",)}


def test_views_overlap_and_neighbours_do_not() -> None:
    flat = torch.randn(64)
    shared = sharing_parameters(Holder(left=flat[:32], right=flat[32:], middle=flat[16:48], alone=torch.randn(4)))
    assert shared == {"left": ("right", "middle"), "right": ("left", "middle"), "middle": ("left", "right")}
    assert sharing_parameters(Holder(left=flat[:32], right=flat[32:])) == {}
    square = torch.randn(6, 6)
    assert sharing_parameters(Holder(rows=square[2:4], columns=square.t()[:, 3:])).keys() == {"rows", "columns"}


def test_parameters_without_memory_share_none() -> None:
    assert sharing_parameters(nn.Sequential(*(nn.Linear(4, 4, device="meta") for _ in range(3)))) == {}
    assert sharing_parameters(Holder(a=torch.empty(0, 4), b=torch.empty(0, 4))) == {}
    tied = nn.Parameter(torch.empty(4, 4, device="meta"))
    assert sharing_parameters(Holder(a=tied, b=tied, c=torch.empty(4, device="meta"))) == {"a": ("b",), "b": ("a",)}
