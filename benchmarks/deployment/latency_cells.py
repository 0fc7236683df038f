"""The forms that latency compares, and the cells in which it does so."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Form:
    """A form that is compared. `kind`: as for `build`; `equals`: the form whose outputs it must have."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    gives_adapter: bool = False
    equals: str = "merged"


FORMS = (
    Form("base", "base", equals="base"),
    Form("merged", "unmerged", {"adapter": "fold"}),
    Form("unmerged, block", "unmerged", {"adapter": "keep", "form": "block"}),
    Form("unmerged, dense", "unmerged", {"adapter": "keep", "form": "dense"}),
    Form("swap, no adapter", "unmerged", {"adapter": "swap"}, equals="base"),
    Form("swap, one adapter", "unmerged", {"adapter": "swap"}, gives_adapter=True),
    Form("PEFT unmerged", "peft"),
)
TORCH_FORMS = (
    Form("base", "base", equals="base"),
    Form("merged", "merged"),
    Form("unmerged", "unmerged"),
    Form("PEFT unmerged", "peft"),
)
WITHOUT = dict.fromkeys(("cuda graph", "tensorrt"), ("swap, no adapter", "swap, one adapter"))
"""Forms that a provider or target does not support: it has no optional inputs."""
TARGETS = {"cpu": "portable", "cuda": "ort-cuda", "cuda graph": "ort-cuda", "tensorrt": "tensorrt"}
"""The export target for each provider, unless a cell names one."""


@dataclass(frozen=True)
class Cell:
    """A setting in which all forms are measured together."""

    model: str
    provider: str
    batch: int = 8
    sequence: int = 64
    threads: int = 1
    targets: str = "q,v"
    num_blocks: int = 8
    rank: int = 8
    precision: str = "fp32"
    target: str = ""

    @property
    def name(self) -> str:
        """The model and the label."""
        return f"{self.model}, {self.label}"

    @property
    def label(self) -> str:
        """The provider, the shape, and what differs from the centre."""
        parts = [f"{self.batch} × {self.sequence}", self.targets]
        parts += [f"{self.threads} threads"] * (self.threads > 1) + [f"r = {self.rank}"] * (self.rank != 8)
        parts += [self.precision] * (self.precision != "fp32")
        parts += [self.target] * (self.target not in ("", TARGETS.get(self.provider, "")))
        return f"{self.provider}: {', '.join(parts)}"

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms that this cell compares; the first is the reference."""
        if self.provider.startswith("torch"):
            return TORCH_FORMS
        without = WITHOUT.get(self.provider) or WITHOUT.get(self.target, ())
        return tuple(form for form in FORMS if form.name not in without)

    @property
    def session(self) -> dict[str, Any]:
        """Arguments of its `OrtRunner`: on TensorRT and in a CUDA graph each axis has one size."""
        provider, _, graph = self.provider.partition(" ")
        shapes = {"batch": (self.batch,) * 3, "sequence": (self.sequence,) * 3}
        options: dict[str, Any] = {"provider": provider, "threads": self.threads}
        options |= {"shapes": shapes} if self.provider in WITHOUT else {}
        return options | ({"provider_options": {"enable_cuda_graph": True}} if graph else {})


def _each(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Returns one change for every value."""
    return [{name: value} for name, found in values.items() for value in found]


_SMALL = {"batch": 1, "sequence": 16}
_ALL = {"targets": "all-linear"}
CHANGES: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("MiniLM-L6", "cpu"): [
        {},
        *_each(batch=(1, 32), sequence=(16, 128, 256), threads=(2,), rank=(1,)),
        *_each(precision=("fp16",), target=("ort-cpu",)),
        _SMALL,
        _ALL,
        *(_ALL | change for change in _each(batch=(1,), sequence=(16, 128))),
        _ALL | _SMALL,
        *(_ALL | change for change in _each(rank=(1,), target=("ort-cpu",))),
    ],
    ("MPNet-base", "cpu"): [
        *({}, {"batch": 1}, {"sequence": 16}, _SMALL, {"batch": 1, "threads": 2}),
        *(_ALL | {"batch": 1}, _ALL | _SMALL),
    ],
    ("MiniLM-L6", "torch eager"): [{}, {"batch": 1}, {"sequence": 128}, _SMALL, _ALL],
    ("MPNet-base", "torch eager"): [{}, {"batch": 1}],
    ("MiniLM-L6", "torch compile"): [{}, {"sequence": 128}, _ALL],
    ("MPNet-base", "torch compile"): [],
}
"""Changes to the centre, one cell each. MPNet's cells that take more than 20 s, or minutes to compile, are left out."""

QUICK = (
    Cell("Tiny", "cpu", batch=2, sequence=8, num_blocks=4, rank=2),
    Cell("Tiny", "torch eager", batch=2, sequence=8, num_blocks=4, rank=2),
)


def cells(providers: list[str]) -> list[Cell]:
    """Returns the cells of the given providers; those without cells of their own have the cells of the CPU."""
    return [
        Cell(model, provider, **change)
        for provider in providers
        for model in dict.fromkeys(model for model, _ in CHANGES)
        for change in CHANGES.get((model, provider), CHANGES[model, "cpu"])
    ]
