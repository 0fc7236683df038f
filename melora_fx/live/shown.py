"""What a stand-in shows: an adapted weight, or which view of it."""

from typing import Any, NamedTuple

import torch
from torch import nn

from melora_fx.patterns.stacks import Stack, stack_shown
from melora_fx.patterns.views import WeightView, block_shown, view_shown

PLAIN = (torch.Tensor, nn.Parameter)
"""Types of tensors that are of no kind of their own."""


class Shown(NamedTuple):
    """What a stand-in shows.

    Attributes:
        owner: the module that holds the weight.
        parameter: the weight's name on it.
        weight: the weight.
        value: the weight, or the view of it.
        plain: a key for the weight as it is stored, another for its transpose; None for other views.
        is_recorded: whether the weight was read where gradients are recorded.
        twin: the same view of a contiguous meta tensor; None for the weight itself.
        offset: how many elements after the start of that the view begins.
        is_flipped: without a twin, whether it is the weight's transpose.
        choice: of a stack, the numbers by which a matrix was gathered for each row; else None.
        is_cast, is_copy: whether it has had another dtype, or memory of its own, on the way.
    """

    owner: Any
    parameter: str
    weight: Any
    value: Any
    plain: str | None
    is_recorded: bool
    twin: Any = None
    offset: int = 0
    is_flipped: bool = False
    choice: Any = None
    is_cast: bool = False
    is_copy: bool = False


class Standing:
    """What stands for a weight. `shown`: what it shows."""

    shown: Shown


def view_text(shown: Shown) -> str:
    """What products depend on of a view."""
    if shown.plain:
        return " flipped" if shown.is_flipped else " whole"
    kind = f"{shown.is_cast} {shown.is_copy} {shown.choice is not None}"
    twin = shown.twin
    if twin is None:
        return f" {shown.is_flipped} {kind}"
    if shown.weight.dim() == 2:
        return f" {twin.dim()} {block_shown(twin, shown.offset, shown.weight.size(1))} {kind}"
    return f" {tuple(twin.shape)} {tuple(twin.stride())} {kind}"


def twin_of(shown: Shown) -> Any:
    """The twin, made where there is none yet."""
    if shown.twin is not None:
        return shown.twin
    whole = torch.empty(tuple(shown.weight.shape), device="meta")
    return whole.t() if shown.is_flipped else whole


def weight_shown(shown: Shown) -> WeightView | Stack | None:
    """What `shown` shows of the weight; None for what is no matrix of it."""
    shape = tuple(shown.weight.shape)
    twin = twin_of(shown)
    if len(shape) == 3:
        stack = stack_shown(shown.parameter, twin, torch.empty(shape, device="meta"), is_cast=shown.is_cast)
        if stack is not None or not shown.weight.is_contiguous():
            return stack
    return view_shown(shown.parameter, twin, shown.offset, shape, is_cast=shown.is_cast, is_copy=shown.is_copy)
