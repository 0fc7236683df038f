"""The weights of sites as a fold takes them: views, the right way up."""

from collections.abc import Iterator

import torch

from melora_fx.adapter.tensors import diagonal_blocks, matrices
from melora_fx.rewriting.sites import AdapterSite


def oriented_weight(site: AdapterSite) -> torch.Tensor:
    """The site's weight as (O, I) or (E, O, I), a view."""
    weight = site.record.matrices_of(site.weight.detach())
    return weight.mT if site.weight_is_transposed else weight


def changed_blocks(site: AdapterSite) -> Iterator[torch.Tensor]:
    """Views of the blocks of the site's weight that a fold changes, one (N, O_p/N, I/N) for each part of `split`
    and each matrix of a stack.
    """
    for matrix in matrices(oriented_weight(site)):
        yield from diagonal_blocks(matrix, site.config.num_blocks, site.config.parts(site.out_features))
