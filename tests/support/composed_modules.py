"""Models composed at random from pieces that people write by hand, as Python source.

A block owns a matrix and multiplies by it in one of many ways. A parent owns modules and calls them, or reads their
weights itself. Both are among modules of torch, up to three levels deep. An input is (B, S, 12), a weight (O, I) or
(I, O) with I = 12 and O = 12 or 24. Each piece that is drawn is recorded as "kind: name", so that a test can count.
"""

import hashlib
import itertools
import linecache
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import indent

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from support.composed_pieces import (
    ARGUMENTS,
    CONTROLS,
    FLIPS,
    FROZEN,
    INPUTS,
    PARENTS,
    PARTS,
    PRODUCTS,
    READERS,
    REGIONS,
    STATES,
    VIEWS,
)

NARROW = 12
WIDE = 24

_HEADER = """import random

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def weight_of(module):
    return module.weight


def through(module, x):
    return F.linear(x, module.weight, module.bias)
"""

_HAND_WRITTEN = ("block", "wide block", "parent", "nested")
_LINEAR = f"nn.Linear({NARROW}, {NARROW})"
_OF_TORCH = {
    "Linear": _LINEAR,
    "LayerNorm": f"nn.LayerNorm({NARROW})",
    "Tanh": "nn.Tanh()",
    "Sequential": f"nn.Sequential(nn.Linear({NARROW}, {WIDE}), nn.GELU(), nn.Linear({WIDE}, {NARROW}))",
}


class ComposedModel:
    """`source` defines a class `Model` composed of `pieces`; it is shown as code if a test fails."""

    def __init__(self, source: str, pieces: frozenset[str]) -> None:
        self.source = source
        self.pieces = pieces

    def __repr__(self) -> str:
        return f"\n{self.source}"

    @property
    def is_for_autocast(self) -> bool:
        """Whether a piece needs autocast around the model."""
        return "region: autocast off" in self.pieces

    @property
    def second(self) -> str:
        """The name of the second argument that the model's forward accepts, "" if there is none."""
        return next((name for piece, name in _SECONDS.items() if piece in self.pieces), "")

    @property
    def is_followed(self) -> bool:
        """Whether a whole capture can follow all of its pieces."""
        return not self.pieces & FROZEN

    @contextmanager
    def maker(self) -> Iterator[Callable[[], nn.Module]]:
        """Yields a function that builds the model, always with the same values. The block can read its source."""
        name = f"composed_{hashlib.sha256(self.source.encode()).hexdigest()[:12]}"
        module = types.ModuleType(name)
        module.__file__ = f"<{name}>"
        sys.modules[name] = module
        linecache.cache[module.__file__] = (len(self.source), None, self.source.splitlines(True), module.__file__)

        def make() -> nn.Module:
            torch.manual_seed(0)
            return module.Model()

        try:
            exec(compile(self.source, module.__file__, "exec"), vars(module))
            yield make
        finally:
            del sys.modules[name], linecache.cache[module.__file__]


_SECONDS = {"argument: mask": "mask", "argument: number": "scale"}

_OF_BLOCKS = {
    "control": CONTROLS,
    "input": INPUTS,
    "part": PARTS,
    "product": PRODUCTS,
    "reader": READERS,
    "region": REGIONS,
    "state": STATES,
    "stored": ("oi", "io"),
    "view": (*VIEWS, *FLIPS),
}
PIECES = tuple(
    f"{kind}: {name}"
    for kind, names in (_OF_BLOCKS | {"argument": ARGUMENTS, "parent": PARENTS}).items()
    for name in names
)


@st.composite
def composed_models(draw: st.DrawFn, piece: str = "") -> ComposedModel:
    """Draws a model, with `piece` if one of `PIECES` is passed; shrinks towards one block with a plain product."""
    composer = _Composer(draw, piece)
    composer.container("Model", depth=1)
    assume(not piece or piece in composer.pieces)
    return ComposedModel("\n\n".join([_HEADER, *composer.classes]), frozenset(composer.pieces))


class _Composer:
    """Writes classes from the choices of `draw` and records the pieces; chooses `piece` whenever it can."""

    def __init__(self, draw: st.DrawFn, piece: str) -> None:
        self.draw = draw
        self.kind, _, self.preferred = piece.partition(": ")
        self.classes: list[str] = []
        self.pieces: list[str] = []
        self.numbers = itertools.count(1)

    def choose(self, kind: str, options: Iterable[str]) -> str:
        options = list(options)
        is_preferred = kind == self.kind and self.preferred in options
        name = self.preferred if is_preferred else self.draw(st.sampled_from(options))
        self.pieces.append(f"{kind}: {name}")
        return name

    def choose_rarely(self, kind: str, options: Iterable[str]) -> str:
        """Chooses the first of `options` in two of three cases."""
        options = list(options)
        is_free = kind == self.kind or self.draw(st.integers(0, 2)) == 2
        return self.choose(kind, options if is_free else options[:1])

    def container(self, name: str, depth: int) -> None:
        """Writes a class with one hand-written stage, and at most one other stage before and one after it."""
        before, after = (self.draw(st.integers(0, 1)) for _ in range(2))
        stages = [self.of_torch() for _ in range(before)]
        free = {"": _HAND_WRITTEN, "argument": _HAND_WRITTEN, "parent": _HAND_WRITTEN[2:3]}
        needed = free.get(self.kind, _HAND_WRITTEN[:2])
        stages.append(self.hand_written(depth, needed))
        for _ in range(after):
            is_torchs = self.draw(st.booleans())
            stages.append(self.of_torch() if is_torchs else self.hand_written(depth, _HAND_WRITTEN))
        made = [f"self.stage{index} = {stage}" for index, stage in enumerate(stages)]
        calls = [f"x = self.stage{index}(x)" for index in range(len(stages))]
        arguments, lines = ARGUMENTS[self.choose_rarely("argument", ARGUMENTS)] if depth == 1 else ARGUMENTS["none"]
        self.write(name, made, [*lines.splitlines(), *calls, "return x"], arguments=arguments)

    def of_torch(self) -> str:
        """Returns an expression that creates one of torch's modules."""
        return _OF_TORCH[self.choose("nesting", _OF_TORCH)]

    def hand_written(self, depth: int, kinds: Sequence[str]) -> str:
        """Writes a class of one of `kinds`, at most three levels deep; returns an expression that creates it."""
        kind = self.choose("nesting", [kind for kind in kinds if depth < 3 or kind != "nested"])
        if kind == "block":
            return f"{self.block(NARROW)}()"
        if kind == "wide block":
            return f"nn.Sequential({self.block(WIDE)}(), nn.SiLU(), nn.Linear({WIDE}, {NARROW}))"
        if kind == "parent":
            return f"{self.parent()}()"
        name = f"Nested{next(self.numbers)}"
        self.container(name, depth + 1)
        return f"{name}()"

    def parent(self) -> str:
        """Writes a class that calls its children (linears or blocks) or reads their weights; returns its name."""
        made, forward = PARENTS[self.choose("parent", PARENTS)]
        child = projector = _LINEAR
        if "{projector}" in made:
            projector = f"{self.block(NARROW, stored='oi', reader='another method')}()"
        elif self.draw(st.booleans()):
            child = f"{self.block(NARROW, stored='oi')}()"
        name = f"Parent{next(self.numbers)}"
        self.write(name, made.format(child=child, projector=projector).splitlines(), forward.splitlines())
        return name

    def block(self, width_out: int, stored: str = "", reader: str = "") -> str:
        """Writes a class with a matrix, (O, I) if `stored` is "oi", else (I, O), and a product; returns its name."""
        stored = stored or self.choose("stored", ["oi", "io"])
        reader = reader or self.choose_rarely("reader", READERS)
        input_made, before = INPUTS[self.choose_rarely("input", INPUTS)]
        control = CONTROLS[self.choose_rarely("control", CONTROLS)]
        region = REGIONS[self.choose_rarely("region", REGIONS)]
        state_made, state_after = STATES[self.choose_rarely("state", STATES)]
        reader_made, read, more = READERS[reader]
        bodies = [self.product(stored, width_out, read) for _ in range(control.count("BODY"))]
        lines = _with_bodies(control, [_with_bodies(region, [body]) for body in bodies])
        lines = lines.replace("WEIGHT", "self.weight" if stored == "oi" else "self.weight.t()")
        shape = (width_out, NARROW) if stored == "oi" else (NARROW, width_out)
        made = [
            f"self.weight = nn.Parameter(torch.randn{shape} / 4)",
            f"self.bias = nn.Parameter(torch.randn({width_out}))",
            "self.flag = True",
            *reader_made.splitlines(),
            *input_made.splitlines(),
            *state_made.splitlines(),
        ]
        name = f"Block{next(self.numbers)}"
        method = "project" if reader == "another method" else "forward"
        lines = "\n".join([before, lines, state_after, "return y"]).strip()
        self.write(name, made, lines.splitlines(), method, more)
        return name

    def product(self, stored: str, width_out: int, read: str) -> str:
        """Returns lines that set `y` to a product of `x` and the weight that the expression `read` returns."""
        rows, columns = (width_out, NARROW) if stored == "oi" else (NARROW, width_out)
        count = self.draw(st.integers(1 if self.kind == "view" else 0, 2))
        views = [self.choose("view", VIEWS) for _ in range(count)]
        views.sort(key="float".__eq__)  # last, as `x` is cast with it
        lines = [f"w = {read}", *(f"w = {VIEWS[view].format(rows=rows, columns=columns)}" for view in views)]
        parts = [name for name, part in PARTS.items() if width_out == NARROW or not part.needs_square]
        part = PARTS[self.choose_rarely("part", parts)]
        if part.needs_rows and stored == "io":
            lines.append(f"w = w{self.choose('view', FLIPS)}")
            stored = "oi"
        x = "x.float()" if "float" in views else "x"
        before = ":, " if stored == "io" else ""
        sizes = {"third": width_out // 3, "two_thirds": width_out * 2 // 3, "middle": width_out // 2}
        sizes |= {"dim": 1 if stored == "io" else 0}
        rows_of = {"first": f"[{before}:{sizes['third']}]", "rest": f"[{before}{sizes['third']}:]"}
        rows_of |= {"half": f"[{before}:{sizes['middle']}]"}
        products = [
            self.multiplied(x, weight.format(**rows_of), stored, twelfths * width_out // 12, width_out)
            for weight, twelfths in zip(part.weights, part.twelfths, strict=True)
        ]
        lines += part.lines.format(*products, **sizes).splitlines()
        return "\n".join([*lines, "y = y.to(x.dtype)"] if "float" in views else lines)

    def multiplied(self, x: str, weight: str, stored: str, size: int, width_out: int) -> str:
        """Returns an expression of `x` times `weight`, which computes `size` of the features."""
        needed, template = PRODUCTS[self.choose("product", PRODUCTS)]
        if needed != stored:
            weight += self.choose("view", FLIPS)
        bias = "self.bias" if size == width_out else f"self.bias[:{size}]"
        return template.format(x=x, w=weight, b=f"{bias}.float()" if x != "x" else bias)

    def write(
        self,
        name: str,
        made: list[str],
        lines: list[str],
        method: str = "forward",
        more: str = "",
        arguments: str = "x",
    ) -> None:
        """Adds a class: the lines `made` of `__init__`, `lines` of its forward or a method it calls, and `more`."""
        methods = [
            "def __init__(self):\n" + indent("\n".join(["super().__init__()", *made]), "    "),
            f"def {method}(self, {arguments}):\n" + indent("\n".join(lines), "    "),
            *([f"def forward(self, x):\n    return self.{method}(x)"] if method != "forward" else []),
            *([more] if more else []),
        ]
        self.classes.append(f"class {name}(nn.Module):\n" + indent("\n\n".join(methods), "    ") + "\n")


def _with_bodies(template: str, bodies: list[str]) -> str:
    """Returns `template` with each of its lines `BODY` replaced by the lines of one body."""
    left = iter(bodies)
    lines = []
    for line in template.splitlines():
        is_body = line.strip() == "BODY"
        lines.append(indent(next(left), line[: -len("BODY")]) if is_body else line)
    return "\n".join(lines)
