"""What `rewrite` stores on modules in addition to adapters: a mark on each rewritten module, one on the model's root.

`fold` removes both. The name of the first is in `adapter/site.py`, since `matching` looks for it.
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
"""The attribute with the RootMark, on the module that `rewrite` was called with."""


@dataclass
class ModuleMark:
    """The mark on each rewritten module.

    Attributes:
        records: the module's sites.
        path: the module's dotted name in the model that `rewrite` was called with.
        runs_base: whether the module temporarily runs its base.
        adapted_graph: the graph with adapters while the module runs its base; otherwise None.
        is_folded: whether the weights are temporarily folded.
    """

    records: list[SiteRecord]
    path: str = ""
    runs_base: bool = False
    adapted_graph: fx.Graph | None = None
    is_folded: bool = False


@dataclass
class Patches:
    """Temporary attributes of an instance, and the values that they replace.

    An attribute counts as ours while it is the very object that was put there; a copy of the model copies both alike.
    """

    ours: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)

    def put(self, model: nn.Module, name: str, value: Any) -> None:
        """Replaces an attribute with `value`, and remembers the old value unless it was ours."""
        own = vars(model)
        if name in own and not self._is_ours(own, name):
            self.before[name] = own[name]
        own[name] = self.ours[name] = value

    def take_off(self, model: nn.Module, *names: str) -> None:
        """Restores the previous attributes of these names; an attribute that someone else has set since stays."""
        own = vars(model)
        for name in names:
            before = {name: self.before.pop(name)} if name in self.before else {}
            if self._is_ours(own, name):
                del own[name]
                own.update(before)
            self.ours.pop(name, None)

    def take_all_off(self, model: nn.Module) -> None:
        """Calls `take_off` for all names."""
        self.take_off(model, *tuple(self.ours))

    def _is_ours(self, own: Mapping[str, Any], name: str) -> bool:
        return name in self.ours and name in own and own[name] is self.ours[name]

    @contextmanager
    def lifted(self, model: nn.Module) -> Iterator[None]:
        """Takes all our attributes off inside the block."""
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
    """The mark on a rewritten model's root, and on a model around it that a Trainer trains.

    Attributes:
        requires_grad: name of every base parameter → its `requires_grad` before `rewrite`.
        kept: names of the modules and parameters kept trainable.
        values: the sums that tensors are recognised by, as `record_values` returned them in `rewrite`.
        sites: names of the adapted sites.
        patches: the temporary attributes of a Hugging Face model.
        watched: the modes, `training` or not, in which a forward has been watched.
    """

    requires_grad: dict[str, bool] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    values: dict[str, Sums] = field(default_factory=dict)
    patches: Patches = field(default_factory=Patches)
    watched: set[bool] = field(default_factory=set)


def root_mark(model: nn.Module) -> RootMark:
    """Returns the mark of `model`; adds an empty one if it has none."""
    return vars(model).setdefault(ROOT_MARK, RootMark())


def root_marks(model: nn.Module) -> Iterator[tuple[str, nn.Module, RootMark]]:
    """Yields (path, module, mark) for each root in `model`."""
    for path, module in unwrap(model).named_modules():
        mark = vars(module).get(ROOT_MARK)
        if mark is not None:
            yield without_wrappers(path), module, mark
