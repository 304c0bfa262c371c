"""How a head that is cut by vocabulary serves every rank's sampling rows.

Rank r holds the head's rows [r * per, (r + 1) * per). A step ends with `gather` (all ranks get all
ranks' final hidden rows), the product of those rows with this rank's slice, and `scatter` (each
rank reads its own rows' slices from all ranks).

Wire layout, the same for every graph key: `[src_rank, capacity]` rows, row (s, t) being sampling
row t of rank s. Ranks may run different keys in one step: a row that its rank did not send holds
whatever was there, and nobody reads what the product makes of it.

Invariants: once made, an exchange allocates nothing and its host reads nothing; each call is the
same launches whatever the rows are; it moves bits and computes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from barriers.transport import MAX_WORLD, BufferSpec
from barriers.vocabulary_parts import part_of, part_rows


@dataclass(frozen=True)
class VocabularyConfig:
    """Sizes that all ranks of a cut head share, and this rank's place among them.

    Attributes:
        rank, world: this rank and how many there are, 1 to 8.
        capacity: sampling rows of the largest key of any rank.
        hidden: width of a row; a multiple of 16.
        vocab: columns of the whole head.
        act_dtype: of the final hidden rows: "bfloat16", "float16" or "float32".
    """

    rank: int
    world: int
    capacity: int
    hidden: int
    vocab: int
    act_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if not 1 <= self.world <= MAX_WORLD or not 0 <= self.rank < self.world:
            raise ValueError(
                f"expected 1 to {MAX_WORLD} ranks of one node and a rank below their number, got "
                f"rank {self.rank} of {self.world}; start one process a GPU of one node"
            )
        if self.capacity < 1:
            raise ValueError(f"capacity must be at least 1 sampling row, got {self.capacity}")
        # Rows travel in pieces of 16 bytes, whatever their type.
        if self.hidden < 1 or self.hidden % 16:
            raise ValueError(f"hidden must be a positive multiple of 16, got {self.hidden}")
        if self.vocab < 1:
            raise ValueError(f"vocab must be at least 1 column, got {self.vocab}")
        if self.act_dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(
                f"act_dtype must be bfloat16, float16 or float32, got {self.act_dtype!r}"
            )

    @property
    def per(self) -> int:
        """Columns of every rank's slice, padding included."""
        return part_rows(self.vocab, self.world)

    def columns_of(self, rank: int) -> tuple[int, int]:
        """(begin, end) of the columns that `rank` holds, without padding; the last ranks of a
        small vocabulary may hold none."""
        held = part_of(self.vocab, self.world, rank)
        return held.start, held.stop

    @property
    def begin(self) -> int:
        """This rank's first column."""
        return self.columns_of(self.rank)[0]

    @property
    def end(self) -> int:
        """One past this rank's last column that is in the vocabulary."""
        return self.columns_of(self.rank)[1]

    @property
    def rows(self) -> int:
        """Rows of the wire layout."""
        return self.world * self.capacity

    @property
    def act_bytes(self) -> int:
        return 4 if self.act_dtype == "float32" else 2


class Vocabulary(Protocol):
    """A step calls, in this order: `gather`, the product into `part`, `scatter`; never one alone.

    Shapes: S sampling rows of this rank's key, 1 <= S <= capacity.

    Attributes:
        live: why a graph with it serves only the process that captured it; "" if it can be stored.
        part: fp32 [world * capacity, per], the exchange's own: where the product goes. Columns past
            the vocabulary, and rows that were not sent, may hold anything.
    """

    name: str
    live: str
    config: VocabularyConfig
    part: torch.Tensor

    def gather(self, final: torch.Tensor, *, opens_step: bool = False) -> torch.Tensor:
        """Give every rank this rank's rows.

        Args:
            final: act [S, H].
            opens_step: the first exchange of a step, where no layer has experts: ranks that are in
                different steps find out.
        Returns:
            act [world * capacity, H], the exchange's own buffer, the same at every call.
        Raises:
            ValueError: shapes or dtypes that do not fit.
        Capture-safe, as is `scatter`; see each implementation for exceptions.
        """

    def scatter(self, part: torch.Tensor, out: torch.Tensor) -> None:
        """out[t, column] = what the rank that holds `column` has in its part for this rank's row t.

        Args:
            part: the attribute, written by the product.
            out: fp32 [S, vocab], S as gathered; columns contiguous, rows may be further apart.
        Raises:
            ValueError: shapes or dtypes that do not fit; another tensor than `part`.
        """


def head_buffers(config: VocabularyConfig, section: str) -> Iterator[BufferSpec]:
    """All ranks' rows, and the product that answers them row by row."""
    yield section, "head_rows", (config.rows, config.hidden), config.act_dtype
    yield section, "head_part", (config.rows, config.per), "float32"


def check_gather(config: VocabularyConfig, final: torch.Tensor) -> None:
    """Raises ValueError where gather's rows are not what the config says."""
    act, count = getattr(torch, config.act_dtype), final.shape[0]
    shape = (count, config.hidden)
    if tuple(final.shape) != shape or final.dtype != act or not final.is_contiguous():
        raise ValueError(
            f"gather: final must be {act} {shape}, contiguous, got {_told(final)}; give the rows "
            "of the final norm as they are"
        )
    _check_count("gather", config, count)


def check_scatter(
    config: VocabularyConfig, part: torch.Tensor, out: torch.Tensor, own: torch.Tensor
) -> None:
    """Raises ValueError where scatter's arguments are not what the config says.

    Args:
        own: the exchange's `part`.
    """
    shape = (config.rows, config.per)
    if tuple(part.shape) != shape or part.dtype != torch.float32 or not part.is_contiguous():
        raise ValueError(
            f"scatter: part must be torch.float32 {shape}, contiguous, got {_told(part)}"
        )
    if part.data_ptr() != own.data_ptr():
        raise ValueError(
            "scatter: expected the exchange's own `part`, which peers read, got another tensor; "
            "let the product write `part`"
        )
    count = out.shape[0]
    shape = (count, config.vocab)
    fits = tuple(out.shape) == shape and out.dtype == torch.float32
    if not fits or out.stride(1) != 1 or (count > 1 and out.stride(0) < config.vocab):
        raise ValueError(
            f"scatter: out must be torch.float32 {shape} with contiguous columns, got {_told(out)}"
        )
    _check_count("scatter", config, count)


def _check_count(doing: str, config: VocabularyConfig, count: int) -> None:
    if count < 1:
        raise ValueError(
            f"{doing}: expected at least one row, got none; an idle rank runs its smallest key "
            "with padded rows, so that it signals like every other"
        )
    if count > config.capacity:
        raise ValueError(
            f"{doing}: {count} rows do not fit the capacity {config.capacity}, which is the rows "
            "of the largest key of the ladder on every rank"
        )


def _told(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"
