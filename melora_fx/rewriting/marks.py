"""What `rewrite` leaves on modules beside the adapters: one mark on each rewritten module, one on the model's root.

`fold` takes both away. `adapter/site.py` has the name of the first, since `matching` looks for it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from melora_fx.adapter.site import SiteRecord
from melora_fx.names import unwrap, without_wrappers

from .changes import Sums

ROOT_MARK = "melora_root"
"""Attribute of the module that `rewrite` was called with: its RootMark."""


@dataclass
class ModuleMark:
    """On each rewritten module.

    Attributes:
        records: its sites.
        path: the module's dotted name in the model that `rewrite` was given.
        runs_base: whether the base runs for a while.
        adapted_graph: the graph with adapters, which waits here meanwhile; else None.
        is_folded: whether the weights are folded for a while.
    """

    records: list[SiteRecord]
    path: str = ""
    runs_base: bool = False
    adapted_graph: fx.Graph | None = None
    is_folded: bool = False


@dataclass
class Patches:
    """Attributes of an instance that are ours for a while, and what stood there before.

    An attribute counts as ours while it is the very object that was put there; a copy of the model copies both alike.
    """

    ours: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)

    def put(self, model: nn.Module, name: str, value: Any) -> None:
        """Puts `value` in the place of an attribute, or of what was put there last."""
        own = vars(model)
        if name in own and not self._is_ours(own, name):
            self.before[name] = own[name]
        own[name] = self.ours[name] = value

    def take_off(self, model: nn.Module, *names: str) -> None:
        """Puts back what stood before under these names; what another has put there since stays."""
        own = vars(model)
        for name in names:
            before = {name: self.before.pop(name)} if name in self.before else {}
            if self._is_ours(own, name):
                del own[name]
                own.update(before)
            self.ours.pop(name, None)

    def take_all_off(self, model: nn.Module) -> None:
        """The same for all names."""
        self.take_off(model, *tuple(self.ours))

    def _is_ours(self, own: Mapping[str, Any], name: str) -> bool:
        return name in self.ours and name in own and own[name] is self.ours[name]

    @contextmanager
    def lifted(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model's attributes are its own."""
        own = vars(model)
        ours = {name: value for name, value in self.ours.items() if self._is_ours(own, name)}
        self.take_off(model, *ours)
        try:
            yield
        finally:
            for name, value in ours.items():
                self.put(model, name, value)


@dataclass
class RootMark:
    """On a rewritten model's root, and on a model around it that a Trainer trains.

    Attributes:
        requires_grad: of every base parameter before `rewrite`.
        kept: names of the modules and parameters kept trainable.
        values: what the tensors that were frozen are recognised by, as they were then.
        sites: names of what was adapted.
        patches: what a Hugging Face model says of itself meanwhile.
        watched: in which modes, `training` or not, a forward has been watched.
    """

    requires_grad: dict[str, bool] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    values: dict[str, Sums] = field(default_factory=dict)
    patches: Patches = field(default_factory=Patches)
    watched: set[bool] = field(default_factory=set)


def root_mark(model: nn.Module) -> RootMark:
    """The mark of `model`, which is given an empty one where it has none."""
    return vars(model).setdefault(ROOT_MARK, RootMark())


def root_marks(model: nn.Module) -> Iterator[tuple[str, nn.Module, RootMark]]:
    """(path, module, mark) of each root in `model`."""
    for path, module in unwrap(model).named_modules():
        mark = vars(module).get(ROOT_MARK)
        if mark is not None:
            yield without_wrappers(path), module, mark
