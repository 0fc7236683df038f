"""What `match` found, and its table."""

import textwrap
from dataclasses import dataclass

from melora_fx.tables import table

_WIDTH = 100


@dataclass(frozen=True)
class LinearSite:
    """Public, in a MatchReport: a linear of the model, or a stack of them.

    Attributes:
        in_features, out_features: of one linear.
        num_parameters: trainable values that its adapter has, or would have.
        shared_with: names of other parameters of the model that share memory with the weight, as tied ones do.
        num_experts: how many linears a stack holds; each has an adapter of its own.
        is_used: False where a whole capture makes nothing that it gives of the linear's output, as of a pooler behind
            another head: an adapter would change nothing, and get no gradient.
    """

    name: str
    in_features: int
    out_features: int
    pattern: str
    lowering: str
    num_parameters: int
    shared_with: tuple[str, ...] = ()
    num_experts: int = 1
    is_used: bool = True


@dataclass(frozen=True)
class MatchReport:
    """What `match` found. `str()` is a table.

    Attributes:
        sites: the linears that `rewrite` would adapt.
        untargeted: the linears that `targets` does not ask for.
        skipped: (name, reason) of each linear that cannot be adapted, and of each other parameter, of two dimensions or
            more, that takes part in a product.
        heads: names of the linears that "all-linear" leaves out as heads.
    """

    sites: tuple[LinearSite, ...]
    untargeted: tuple[LinearSite, ...]
    skipped: tuple[tuple[str, str], ...]
    heads: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("site", "in", "out", "pattern", "lowering", "parameters")]
        rows += [_row(site, site.lowering, f"{site.num_parameters:,}") for site in self.sites]
        rows += [_row(site, "-", "-") for site in self.untargeted]
        total = sum(site.num_parameters for site in self.sites)
        summary = f"{len(self.sites)} sites, {total:,} parameters; {len(self.untargeted)} untargeted (-)"
        notes = [
            f"shared {site.name}: in one memory with {', '.join(site.shared_with)}"
            for site in self.sites + self.untargeted
            if site.shared_with
        ]
        if self.heads:
            notes.append(
                f'heads, which "all-linear" leaves out: {", ".join(self.heads)}; train a new one by `keep_trainable`, '
                "adapt another by its name"
            )
        notes += [
            f"unused {site.name}: no output is made of it, an adapter would change nothing"
            for site in self.sites + self.untargeted
            if not site.is_used
        ]
        notes += [f"skipped {name}: {reason}" for name, reason in self.skipped]
        wrapped = [line for note in notes for line in textwrap.wrap(note, _WIDTH, subsequent_indent="  ")]
        return "\n".join(
            [*table(rows, right=(1, 2, 5), max_width=_WIDTH), "", f"{summary}, {len(self.skipped)} skipped", *wrapped]
        )


def _row(site: LinearSite, lowering: str, num_parameters: str) -> tuple[str, ...]:
    pattern = site.pattern if site.num_experts == 1 else f"{site.pattern} × {site.num_experts}"
    return site.name, str(site.in_features), str(site.out_features), pattern, lowering, num_parameters
