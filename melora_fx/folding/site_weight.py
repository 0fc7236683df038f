"""The weights of sites as a fold takes them: views, the right way up."""

from collections.abc import Iterator

import torch

from melora_fx.adapter.tensors import diagonal_blocks, matrices
from melora_fx.adapter.update import Scratch, add_update
from melora_fx.distributed.tensors import is_sharded, own_part, put, whole
from melora_fx.rewriting.sites import AdapterSite


def oriented_weight(site: AdapterSite) -> torch.Tensor:
    """The site's weight as (O, I) or (E, O, I): a view; of a sharded one all of it, gathered by all processes."""
    return _oriented(site, whole(site.weight).detach())


def _oriented(site: AdapterSite, weight: torch.Tensor) -> torch.Tensor:
    """`weight`, as the site's is stored, as (O, I) or (E, O, I): a view."""
    matrices = site.record.matrices_of(weight)
    return matrices.mT if site.weight_is_transposed else matrices


def merge(site: AdapterSite, scratch: Scratch) -> None:
    """Adds the update of a site, whose A and B are whole, to its weight in place."""
    weight = whole(site.weight).detach()
    add_update(site.tensors, _oriented(site, weight), scratch)
    if is_sharded(site.weight):
        put(site.weight, weight)


def saved_values(site: AdapterSite) -> list[torch.Tensor]:
    """Copies of what `merge` changes of the weight, as far as this process holds it."""
    return [values.clone() for values in _changed(site)]


def restore(site: AdapterSite, saved: list[torch.Tensor]) -> None:
    """Puts back what `saved_values` gave."""
    for values, original in zip(_changed(site), saved, strict=True):
        values.copy_(original)


def _changed(site: AdapterSite) -> Iterator[torch.Tensor]:
    """Views of what a fold changes of the weight; of a sharded one what this process holds."""
    return iter([own_part(site.weight)]) if is_sharded(site.weight) else changed_blocks(site)


def changed_blocks(site: AdapterSite) -> Iterator[torch.Tensor]:
    """Views of the blocks of the site's weight that a fold changes, one (N, O_p/N, I/N) for each part of `split`
    and each matrix of a stack.
    """
    for matrix in matrices(oriented_weight(site)):
        yield from diagonal_blocks(matrix, site.config.num_blocks, site.config.parts(site.out_features))
