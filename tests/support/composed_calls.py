"""The calls that are made of the models of `composed_modules`."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from support.composed_modules import NARROW, ComposedModel
from support.models import randn


@dataclass(frozen=True)
class Call:
    """An input of so many positions and what decides branches: the sign of its sum, the mode, the modules' `flag`.

    `has_second` says whether the second argument, if the forward takes one, is given or has its default.
    """

    length: int
    sign: int
    training: bool
    flag: bool = True
    batch: int = 2
    has_second: bool = False

    def run(self, model: nn.Module, composed: ComposedModel) -> tuple[torch.Tensor, torch.Tensor]:
        """Input, (B, S, 12), and output of `composed`, of a graph of it or of its double in float64, without autocast.

        The same random numbers each time. In training the input wants a gradient.
        """
        model.train(self.training)
        for module in model.modules():
            if "flag" in vars(module):
                module.flag = self.flag
        dtype = next(model.parameters()).dtype
        args = self.arguments(composed, dtype)
        torch.manual_seed(5)
        random.seed(5)
        is_under_autocast = composed.is_for_autocast and dtype != torch.float64
        with torch.autocast("cpu", torch.bfloat16, enabled=is_under_autocast):
            return args[0], model(*args)

    def arguments(self, composed: ComposedModel, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """What a model is called with."""
        x = self.sign * (randn(self.batch, self.length, NARROW, seed=self.length).abs() - 0.4)
        second = {"mask": randn(self.batch, self.length, 1, seed=3) > 0, "scale": 2.0}
        more = [second[composed.second]] if composed.second and self.has_second else []
        return (x.to(dtype).requires_grad_(self.training), *more)


IN_PLACE = (Call(5, 1, False), Call(3, -1, True, False, has_second=True), Call(5, -1, True, batch=1))
"""Of a model that is rewritten in place."""

EXAMPLES = (Call(5, 1, True), Call(6, -1, False, has_second=True), Call(2, 1, False), Call(4, 1, True, batch=1))
"""That whole models are captured with."""

OF_GRAPHS = (Call(3, -1, True), Call(8, 1, False, batch=3), Call(1, -1, False), Call(4, -1, True, batch=1))
"""Of a whole capture, besides its example."""
