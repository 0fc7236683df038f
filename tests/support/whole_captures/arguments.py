"""How a model is called, and arguments that are not tensors."""

from typing import Any

import torch

from support.whole_captures.case import Child, whole, x

AREA = "Arguments"
WITHOUT = "the capture was made without"


@whole(
    AREA,
    "`flag=True` in the example",
    {"x": x(2, 5, 24), "flag": True},
    right={"`flag` by position": (x(2, 5, 24), True)},
    refused={
        "`flag=False`": ({"x": x(2, 5, 24), "flag": False}, "for `flag=True`, here it is False"),
        "no `flag`, so it is False": ((x(2, 5, 24),), "for `flag=True`, here it is False"),
    },
)
class Flag(Child):
    def forward(self, x: torch.Tensor, flag: bool = False) -> torch.Tensor:
        return self.fc(x) if flag else -self.fc(x)


@whole(
    AREA,
    "a flag that the example leaves out",
    (x(2, 5, 24),),
    right={"its default": (x(2, 5, 24), False)},
    refused={"the other value": ((x(2, 5, 24), True), f"{WITHOUT} `flag`")},
)
class FlagLeftOut(Flag):
    pass


@whole(
    AREA,
    "a number, `scale=2.0`",
    {"x": x(2, 5, 24), "scale": 2.0},
    refused={
        "`scale=3.0`": ({"x": x(2, 5, 24), "scale": 3.0}, r"for `scale=2\.0`, here it is 3\.0"),
        "a tensor": ({"x": x(2, 5, 24), "scale": torch.tensor(3.0)}, r"for `scale=2\.0`"),
    },
)
class Scale(Child):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.fc(x) * scale


@whole(
    AREA,
    "a count, `steps=2`",
    {"x": x(2, 5, 24), "steps": 2},
    refused={
        "`steps=3`": ({"x": x(2, 5, 24), "steps": 3}, "for `steps=2`, here it is 3"),
        "`steps=True`": ({"x": x(2, 5, 24), "steps": True}, "for `steps=2`, here it is True"),
    },
)
class Steps(Child):
    def forward(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        y = self.fc(x)
        for _ in range(steps):
            y = torch.tanh(y)
        return y


@whole(
    AREA,
    'a string, `mode="mean"`',
    {"x": x(2, 5, 24), "mode": "mean"},
    refused={'`mode="sum"`': ({"x": x(2, 5, 24), "mode": "sum"}, "for `mode='mean'`, here it is 'sum'")},
)
class Mode(Child):
    def forward(self, x: torch.Tensor, mode: str) -> torch.Tensor:
        return self.fc(x).mean(1) if mode == "mean" else self.fc(x).sum(1)


@whole(
    AREA,
    "an optional mask, None in the example",
    {"x": x(2, 5, 24), "mask": None},
    right={"no mask": (x(2, 5, 24),)},
    refused={"a mask": ((x(2, 5, 24), x(2, 5, 1)), "for `mask=None`, here it is tensor")},
)
class NoMask(Child):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.fc(x) if mask is None else self.fc(x * mask)


@whole(
    AREA,
    "an optional mask, a tensor in the example",
    (x(2, 5, 24), x(2, 5, 1)),
    right={"by name": {"mask": x(2, 7, 1), "x": x(2, 7, 24)}},
    refused={
        "none": ((x(2, 5, 24),), "for a tensor `mask`, here it is None"),
        "a number": ((x(2, 5, 24), 1.0), r"for a tensor `mask`, here it is 1\.0"),
    },
)
class WithMask(NoMask):
    pass


@whole(
    AREA,
    "a mask of numbers",
    (x(2, 5, 24), torch.ones(2, 5, 1, dtype=torch.int64)),
    right={"int32": (x(2, 7, 24), torch.ones(2, 7, 1, dtype=torch.int32))},
    refused={"bool": ((x(2, 5, 24), torch.ones(2, 5, 1, dtype=torch.bool)), r"`mask` is of torch\.bool, but")},
)
class MaskOfNumbers(Child):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.fc(x.masked_fill(mask, 0.0) if mask.dtype == torch.bool else x * mask)


@whole(
    AREA,
    "an optional mask that the example leaves out",
    (x(2, 5, 24),),
    right={"`mask=None`": {"x": x(2, 5, 24), "mask": None}},
    refused={"a mask": ((x(2, 5, 24), x(2, 5, 1)), f"{WITHOUT} `mask`")},
)
class MaskLeftOut(NoMask):
    pass


@whole(
    AREA,
    'the example names `b` before `a`, `example_inputs={"b": …, "a": …}`',
    {"b": x(2, 5, 24, seed=2), "a": x(2, 5, 24)},
    right={"by position": (x(2, 7, 24, seed=3), x(2, 7, 24, seed=4)), "by name": {"a": x(2, 7, 24), "b": x(2, 7, 24)}},
    refused={"an argument `c`": ({"a": x(2, 7, 24), "b": x(2, 7, 24), "c": x(2, 7, 24)}, "takes no argument `c`")},
)
class OtherOrder(Child):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.fc(a) - 2 * self.fc(b)


@whole(
    AREA,
    "a keyword-only argument",
    {"x": x(2, 5, 24), "bias": x(36)},
    right={"9 tokens": {"bias": x(36, seed=5), "x": x(2, 9, 24)}},
    refused={
        "by position": ((x(2, 5, 24), x(36)), "takes 1 positional argument"),
        "left out": ((x(2, 5, 24),), "`bias` is missing"),
    },
)
class KeywordOnly(Child):
    def forward(self, x: torch.Tensor, *, bias: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + bias


@whole(
    AREA,
    "`*args`: two more tensors",
    (x(2, 5, 24), x(2, 5, 24, seed=2), x(2, 5, 24, seed=3)),
    right={"7 tokens": (x(2, 7, 24), x(2, 7, 24, seed=2), x(2, 7, 24, seed=3))},
    refused={
        "only one more": ((x(2, 5, 24), x(2, 5, 24)), "`rest` has another structure"),
        "none": ((x(2, 5, 24),), "`rest` has another structure"),
    },
)
class Rest(Child):
    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        for each in rest:
            x = x + each
        return self.fc(x)


@whole(
    AREA,
    "`**kwargs`: `gain` in the example",
    {"x": x(2, 5, 24), "gain": x(2, 5, 1)},
    right={"7 tokens": {"gain": x(2, 7, 1), "x": x(2, 7, 24)}},
    refused={
        "another name": ({"x": x(2, 5, 24), "gain": x(2, 5, 1), "shift": x(2, 5, 1)}, f"{WITHOUT} `shift`"),
        "left out": ((x(2, 5, 24),), "`gain` is missing"),
    },
)
class OpenKeywords(Child):
    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        y = self.fc(x)
        if "gain" in kwargs:
            y = y * kwargs["gain"]
        return y + kwargs["shift"] if "shift" in kwargs else y


_ONE = x(2, 5, 24)


@whole(
    AREA,
    "the example passes one tensor twice, `example_inputs=(x, x)`",
    (_ONE, _ONE),
    right={"two tensors": (x(2, 7, 24), x(2, 7, 24, seed=4))},
    exported=True,
)
class OneTensorTwice(OtherOrder):
    pass


@whole(
    AREA,
    "a list of tensors",
    ([x(2, 5, 24), x(2, 5, 24, seed=2)],),
    right={"7 tokens": ([x(2, 7, 24), x(2, 7, 24, seed=2)],)},
    refused={
        "three tensors": (([x(2, 5, 24)] * 3,), "`parts` has another structure"),
        "a tuple": (((x(2, 5, 24), x(2, 5, 24)),), "`parts` has another structure"),
    },
)
class Parts(Child):
    def forward(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return self.fc(sum(parts[1:], parts[0]))


@whole(
    AREA,
    "a dict with a tensor and a number",
    ({"x": x(2, 5, 24), "power": 2},),
    right={"7 tokens": ({"x": x(2, 7, 24), "power": 2},)},
    refused={
        "another number": (({"x": x(2, 5, 24), "power": 3},), "here it is 3"),
        "another key": (({"x": x(2, 5, 24), "power": 2, "y": x(2, 5, 24)},), "`batch` has another structure"),
    },
)
class Batch(Child):
    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.fc(batch["x"]) ** batch["power"], "sum": batch["x"].sum()}


@whole(
    AREA,
    "a nested state, `(x, (h, c))`",
    (x(2, 24), (x(2, 36), x(2, 36, seed=2))),
    right={"a batch of 1": (x(1, 24), (x(1, 36), x(1, 36, seed=2)))},
    refused={"no state": ((x(2, 24), None), "`state` has another structure")},
)
class NestedState(Child):
    def forward(self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None = None) -> Any:
        hidden, cell = state if state is not None else (x.new_zeros(x.shape[0], 36),) * 2
        cell = torch.sigmoid(hidden) * cell + self.fc(x)
        return torch.tanh(cell), (hidden, cell)
