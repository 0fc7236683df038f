"""What does a site in a custom forward cost, compared with the same product in a graph?

One site of 64 × 64 and one token, so that Python costs more than the arithmetic. The sides are the module's own forward
with a stand-in for its weight; the whole capture of the same module, which is a graph; an `nn.Linear` in place; and the
plain module. Writes site_speed.csv.
"""

import functools
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import melora_fx
from exporters.measuring.timing import time_in_turn
from melora_fx import MELoRAConfig

from .common.cases import Case, Row, run_cases, timed_rows

FEATURES = 64
CALLS = 50
"""Forward passes per timing."""

FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear(x, w)": lambda x, w: F.linear(x, w),
    "x @ w.T": lambda x, w: x @ w.T,
}


def run(options: Namespace) -> int:
    torch.set_num_threads(1)
    cases = [
        Case(f"{form}, {mode}", functools.partial(measure, form, mode == "training", options.rounds))
        for form in FORMS
        for mode in ("evaluation", "training")
    ]
    return run_cases(options, cases, settings=f"rounds {options.rounds}")


class Product(nn.Module):
    """A product with its own weight."""

    def __init__(self, form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(FEATURES, FEATURES))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.w)


class Around(nn.Module):
    """A model with one child."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.child(x)
        return output


def sides(form: str) -> dict[str, nn.Module]:
    """Returns the models that are timed in turn."""
    config = MELoRAConfig(rank=1, num_blocks=8)
    x = torch.empty(2, FEATURES)
    return {
        "by graph": melora_fx.rewrite(Around(Product(FORMS[form])), "child.w", config, example_inputs=(x,)),
        "own forward": melora_fx.rewrite(Around(Product(FORMS[form])), "child.w", config),
        "nn.Linear": melora_fx.rewrite(Around(nn.Linear(FEATURES, FEATURES, bias=False)), "child", config),
        "plain": Around(Product(FORMS[form])).requires_grad_(False),
    }


def measure(form: str, training: bool, rounds: int) -> list[Row]:
    """Returns the rows of one form, with the microseconds of one forward pass."""
    x = torch.randn(1, FEATURES)

    def repeated(model: nn.Module) -> Callable[[], None]:
        model.train(training)

        def forwards() -> None:
            with torch.set_grad_enabled(training):
                for _ in range(CALLS):
                    model(x)

        return forwards

    actions = {name: repeated(model) for name, model in sides(form).items()}
    rows = timed_rows(time_in_turn(actions, rounds=rounds, warmup=4), "by graph", {})
    return [row | {"microseconds_a_forward": round(1e3 * row["median_ms"] / CALLS, 1)} for row in rows]
