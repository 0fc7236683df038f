"""The calls of the models of `composed_modules`."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from support.composed_modules import NARROW, ComposedModel
from support.models import randn


@dataclass(frozen=True)
class Call:
    """The size of an input, and what decides branches: the sign of its sum, the mode, the modules' `flag`.

    `length` is the number of positions. `has_second`: the second argument, if the forward accepts one, is passed.
    """

    length: int
    sign: int
    training: bool
    flag: bool = True
    batch: int = 2
    has_second: bool = False

    def run(self, model: nn.Module, composed: ComposedModel) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the input (B, S, 12) and the output of `model`: `composed` itself, a graph of it or its float64 copy.

        Random numbers are the same each time. In training the input requires a gradient. Autocast, if `composed` is
        for it, is off in float64.
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
        """Returns the arguments that a model is called with."""
        x = self.sign * (randn(self.batch, self.length, NARROW, seed=self.length).abs() - 0.4)
        second = {"mask": randn(self.batch, self.length, 1, seed=3) > 0, "scale": 2.0}
        more = [second[composed.second]] if composed.second and self.has_second else []
        return (x.to(dtype).requires_grad_(self.training), *more)


IN_PLACE = (Call(5, 1, False), Call(3, -1, True, False, has_second=True), Call(5, -1, True, batch=1))
"""The calls of a model that is rewritten in place."""

EXAMPLES = (Call(5, 1, True), Call(6, -1, False, has_second=True), Call(2, 1, False), Call(4, 1, True, batch=1))
"""The calls that whole models are captured with."""

OF_GRAPHS = (Call(3, -1, True), Call(8, 1, False, batch=3), Call(1, -1, False), Call(4, -1, True, batch=1))
"""The calls of a whole capture, in addition to its example."""
