"""The oracle of a cut head: n ranks in one process, in plain torch. Lists are indexed by rank.

It moves bits and computes none, so every implementation must give exactly these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from barriers.vocabulary import VocabularyConfig


def ranks_of(config: VocabularyConfig) -> list[VocabularyConfig]:
    """The same sizes as each rank of the world sees them."""
    return [replace(config, rank=rank) for rank in range(config.world)]


def gather_ref(config: VocabularyConfig, finals: Sequence[torch.Tensor]) -> torch.Tensor:
    """act [world * capacity, H] that every rank gets; rows that nobody sent are zeros.

    Args:
        finals: act [S_s, H] of each source; S_s may differ.
    """
    rows = finals[0].new_zeros(config.world, config.capacity, config.hidden)
    for source, final in enumerate(finals):
        rows[source, : final.shape[0]] = final
    return rows.view(config.rows, config.hidden)


def product_ref(config: VocabularyConfig, rows: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """fp32 [world * capacity, per]: this rank's part, computed in float64 and rounded once; NaN in
    the columns past the vocabulary.

    Args:
        rows: act [world * capacity, H].
        head: act [vocab, H], whole.
    """
    part = rows.new_full((config.rows, config.per), float("nan"), dtype=torch.float32)
    slice_ = head[config.begin : config.end]
    part[:, : slice_.shape[0]] = (rows.double() @ slice_.double().T).float()
    return part


def scatter_ref(
    config: VocabularyConfig, parts: Sequence[torch.Tensor], counts: Sequence[int]
) -> list[torch.Tensor]:
    """fp32 [S_s, vocab] of each rank.

    Args:
        parts: fp32 [world * capacity, per] of each rank.
        counts: S_s.
    """
    outs = []
    for rank, count in enumerate(counts):
        at = slice(rank * config.capacity, rank * config.capacity + count)
        slices = []
        for holder, part in enumerate(parts):
            begin, end = config.columns_of(holder)
            slices.append(part[at, : end - begin])
        outs.append(torch.cat(slices, dim=1))
    return outs
