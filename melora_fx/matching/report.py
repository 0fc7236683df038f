"""MatchReport: the result of `match`, and its table."""

import textwrap
from dataclasses import dataclass

from melora_fx.tables import table

_WIDTH = 100


@dataclass(frozen=True)
class LinearSite:
    """A linear of the model, or a stack of linears, in a MatchReport.

    Attributes:
        name: name of the linear in the model.
        in_features: number of inputs of one linear.
        out_features: number of its outputs.
        pattern: the class of a linear module, else the operator that multiplies by the weight.
        lowering: how the adapter is computed in training, as in `MELoRAConfig.lowering`; "-" if no lowering fits.
        num_parameters: number of trainable values that its adapter has, or would have.
        shared_with: names of other parameters of the model that share memory with the weight, as tied weights do.
        num_experts: number of linears in a stack, each with its own adapter; 1 for a single linear.
        is_used: False if no output of a whole capture depends on the linear's output, as with a pooler behind another
            head: an adapter would change nothing and get no gradient.
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
    """The result of `match`. `str()` is a table.

    Attributes:
        sites: the linears that `rewrite` would adapt.
        untargeted: the linears that `targets` does not select.
        skipped: (name, reason) of each linear that cannot be adapted, and of each other parameter with two or more
            dimensions that takes part in a product.
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
            f"shared {site.name}: same memory as {', '.join(site.shared_with)}"
            for site in self.sites + self.untargeted
            if site.shared_with
        ]
        if self.heads:
            notes.append(
                f'heads, which "all-linear" leaves out: {", ".join(self.heads)}; train a new one with '
                "`keep_trainable`, or name a pretrained one to adapt it"
            )
        notes += [
            f"unused {site.name}: no output depends on it, so an adapter would change nothing"
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
