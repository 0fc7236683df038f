"""The weights of sites as folds need them: views in the orientation (O, I)."""

from collections.abc import Iterator

import torch

from melora_fx.adapter.tensors import diagonal_blocks, matrices
from melora_fx.adapter.update import Scratch, add_update
from melora_fx.distributed.tensors import is_sharded, own_part, put, whole
from melora_fx.rewriting.sites import AdapterSite


def oriented_weight(site: AdapterSite) -> torch.Tensor:
    """Returns the site's weight as (O, I) or (E, O, I): a view. A sharded weight is gathered, which is a collective."""
    return _oriented(site, whole(site.weight).detach())


def _oriented(site: AdapterSite, weight: torch.Tensor) -> torch.Tensor:
    """Returns `weight`, which has the site's layout, as (O, I) or (E, O, I): a view."""
    matrices = site.record.matrices_of(weight)
    return matrices.mT if site.weight_is_transposed else matrices


def merge(site: AdapterSite, scratch: Scratch) -> None:
    """Adds the update of a site, whose A and B are gathered, to its weight in place."""
    weight = whole(site.weight).detach()
    add_update(site.tensors, _oriented(site, weight), scratch)
    if is_sharded(site.weight):
        put(site.weight, weight)


def saved_values(site: AdapterSite) -> list[torch.Tensor]:
    """Returns copies of the values that `merge` changes in this process's part of the weight."""
    return [values.clone() for values in _changed(site)]


def restore(site: AdapterSite, saved: list[torch.Tensor]) -> None:
    """Restores the values that `saved_values` has returned."""
    for values, original in zip(_changed(site), saved, strict=True):
        values.copy_(original)


def _changed(site: AdapterSite) -> Iterator[torch.Tensor]:
    """Yields views of the parts of the weight that a fold changes; for a sharded weight, this process's whole part."""
    return iter([own_part(site.weight)]) if is_sharded(site.weight) else changed_blocks(site)


def changed_blocks(site: AdapterSite) -> Iterator[torch.Tensor]:
    """Yields views of the blocks of the site's weight that a fold changes: one (N, O_p/N, I/N) for each part of `split`
    and each matrix of a stack.
    """
    for matrix in matrices(oriented_weight(site)):
        yield from diagonal_blocks(matrix, site.config.num_blocks, site.config.parts(site.out_features))
