"""Describes what a stand-in shows: an adapted weight, or a view of it."""

from typing import Any, NamedTuple

import torch
from torch import nn

from melora_fx.patterns.stacks import Stack, stack_shown
from melora_fx.patterns.views import WeightView, block_shown, view_shown

PLAIN = (torch.Tensor, nn.Parameter)
"""The types of plain tensors; all others are tensor subclasses."""


class Shown(NamedTuple):
    """The weight, or the view of it, that a stand-in shows.

    Attributes:
        owner: the module that owns the weight.
        parameter: the weight's name on `owner`.
        weight: the weight.
        value: the weight, or the view of it.
        plain: one key for the weight as stored, another for its transpose; None for other views.
        is_recorded: whether gradients were recorded when the weight was read.
        twin: the same view of a contiguous meta tensor; None for the weight itself and for its transpose.
        offset: how many elements after the start of that meta tensor the view begins.
        is_flipped: if there is no twin: whether the value is the weight's transpose.
        choice: for a stack, the indices by which a matrix was gathered for each row; else None.
        is_cast, is_copy: whether a cast, or a copy, is among the steps from the weight to the value.
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
    """The base class of stand-ins for a weight. `shown`: the weight or view that the stand-in shows."""

    shown: Shown


def view_text(shown: Shown) -> str:
    """Returns everything about a view that products depend on, as text."""
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
    """Returns the twin; creates one if there is none yet."""
    if shown.twin is not None:
        return shown.twin
    whole = torch.empty(tuple(shown.weight.shape), device="meta")
    return whole.t() if shown.is_flipped else whole


def weight_shown(shown: Shown) -> WeightView | Stack | None:
    """Returns the part of the weight that `shown` shows; None if it is not a matrix or a stack of the weight."""
    shape = tuple(shown.weight.shape)
    twin = twin_of(shown)
    if len(shape) == 3:
        stack = stack_shown(shown.parameter, twin, torch.empty(shape, device="meta"), is_cast=shown.is_cast)
        if stack is not None or not shown.weight.is_contiguous():
            return stack
    return view_shown(shown.parameter, twin, shown.offset, shape, is_cast=shown.is_cast, is_copy=shown.is_copy)
