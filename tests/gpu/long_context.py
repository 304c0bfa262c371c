"""States of long rows for a captured runtime, and what its kernels should have computed from them.

A state is written past the driver: rows of given lengths on scattered pages of a random cache, and
NaN in every slot that no row owns, so that a read of one shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphs.keys import Ladder
from graphs.ops import Ops
from kernels.triton.mla_absorb_v import takes_parts
from kernels.triton.mla_decode import merge_ref
from kernels.triton.rows import RowState
from kernels.triton.state import DECODE
from runtime import Runtime
from runtime.assemble import listed_transport, make_step
from runtime.engine import Engine, reset_state
from runtime.selection import Selection

Tensors = dict[str, torch.Tensor]
# Operations that keep a row's books or draw its token, not its numbers.
BOOKS = ("intake", "advance", "copy_masks", "count_tokens", "sample", "answer", "settle")
GIVEN = ("tok_row", "tok_pos", "tok_id", "kv_slot", "kv_len", "sample_tok", "page_table", "poison")


@dataclasses.dataclass
class LongRows:
    """Rows of a captured runtime, about to decode; `replay` always starts from this state.

    Args:
        lengths: tokens that each row attends to, the one that the step appends included.
    """

    runtime: Runtime
    lengths: Sequence[int]
    seed: int = 0

    def __post_init__(self) -> None:
        self.engine: Engine = self.runtime.engine
        step = self.engine.graphs.step
        self.config, self.buffers = self.engine.config, step.buffers
        self.key = next(k for k in self.engine.ladder.keys if k.rows >= len(self.lengths))
        self.kv = [self.buffers[f"kv.{i}"] for i in range(step.cfg.num_layers)]
        self.device = self.kv[0].device
        with self.engine.graphs.backend.on_stream():
            self._write()
            self.saved = {n: self.buffers[n].clone() for n in (*RowState.names(), "step")}
        self._wait()

    def _write(self) -> None:
        b, size = self.buffers, self.config.page_size
        rng = torch.Generator().manual_seed(self.seed)
        reset_state(b)
        params = b.for_key(self.key)
        for name in ("top_p", "repetition"):
            params[name].fill_(1.0)
        pages = torch.randperm(self.config.num_pages - 1, generator=rng) + 1
        self.slots = []
        for row, length in enumerate(self.lengths):
            count = -(-length // size)
            mine, pages = pages[:count], pages[count:]
            b["page_table"][row, :count] = mine.to(self.device, torch.int32)
            at = torch.arange(length)
            self.slots.append((mine[at // size] * size + at % size).to(self.device))
            b["phase"][row], b["seq_len"][row] = DECODE, length - 1
        vocab = self.engine.model_config.vocab_size
        tokens = torch.randint(0, vocab, (self.config.max_rows,), generator=rng)
        b["last_token"].copy_(tokens.to(torch.int32))
        b["limit"].fill_(self.config.max_seq_len)
        gen = torch.Generator(self.device).manual_seed(self.seed)
        for kv in self.kv:
            kv.fill_(float("nan"))
            for slots in self.slots:
                values = torch.randn(len(slots), kv.shape[1], generator=gen, device=self.device)
                kv[slots] = values.to(kv.dtype)

    def replay(self, *, eagerly: bool = False) -> Tensors:
        """One step from the state; all buffers as it left them, scratch of the last layer.

        Splits that attention left to `absorb_v` are merged in `o_latent`, by the oracle.
        """
        graphs = self.engine.graphs
        self._wait()
        with graphs.backend.on_stream():
            for name, value in self.saved.items():
                self.buffers[name].copy_(value)
            for slots in self.slots:  # what the step is to append is not there before
                for kv in self.kv:
                    kv[slots[-1]] = float("nan")
            if eagerly:
                graphs.backend.eager(lambda: graphs.step.run(self.key))
            else:
                graphs.replay(self.key)
        self._wait()
        found = self.buffers.for_key(self.key)
        assert int(found["fault"]) == 0
        if self._leaves_splits(found["part_o"]):
            found["o_latent"] = self._merged(found)
        return found

    def _merged(self, found: Tensors) -> torch.Tensor:
        """Token by token: the oracle's bits could depend on how many it is given."""
        merged = found["o_latent"].clone()
        names = ("kv_len", "part_o", "part_lse")
        with self.device:  # oracles make their helpers on the default device
            for t in range(len(merged)):
                one = slice(t, t + 1)
                merge_ref(*(found[n][one] for n in names), cut=self.config.cut, out=merged[one])
        return merged

    def _leaves_splits(self, part_o: torch.Tensor) -> bool:
        """Whether `o_latent` has no result of rows that are longer than the cut."""
        tokens, splits, _, dc = part_o.shape
        dv = self.engine.graphs.step.cfg.v_head_dim
        left = takes_parts(tokens, splits, dv=dv, dc=dc, act_bytes=2)
        return left and self.config.attention != "triton"

    def _wait(self) -> None:
        """For every stream: tests write and read beside the one that replays."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def token_of(self, row: int, found: Mapping[str, torch.Tensor]) -> int:
        """Index of a row's token in the step."""
        at = (found["tok_row"] == row).nonzero().flatten().tolist()
        assert len(at) == 1, f"row {row} has tokens {at} in {found['tok_row'].tolist()}"
        return int(at[0])


def attention_of(q: torch.Tensor, kv: torch.Tensor, scale: float, latent: int) -> torch.Tensor:
    """float64 [H, latent] from one token's query act [H, D] and its row's KV act [L, D]."""
    wide = kv.double()
    weight = (q.double() @ wide.T * scale).softmax(-1)
    return weight @ wide[:, :latent]


def oracle_step(rows: LongRows, found: Mapping[str, torch.Tensor]) -> Tensors:
    """The same step through every operation's oracle, on the device; the token list is given."""
    engine, on_device = rows.engine, rows.device
    selection: Selection = dataclasses.replace(
        engine.selection,
        step=dataclasses.replace(engine.config, attention="triton"),
        ladder=Ladder([rows.key]),
    )
    weights = engine.graphs.step.weights
    views = {}
    for place in selection.layout.places:
        entry = place.entry
        shared = weights.get(entry.name)
        dtype = getattr(torch, entry.dtype)
        views[entry.name] = (
            torch.zeros(entry.shape, dtype=dtype, device=on_device) if shared is None else shared
        )
    for name in GIVEN:
        views[name].copy_(found[name])
    for i, kv in enumerate(rows.kv):
        views[f"kv.{i}"].copy_(kv)
        for slots in rows.slots:
            views[f"kv.{i}"][slots[-1]] = float("nan")
    step = make_step(selection, _numbers_only(), views, _local(selection, views))
    with on_device:  # oracles make their helpers on the default device
        step.run(rows.key)
    return step.buffers.for_key(rows.key)


def _numbers_only() -> Ops:
    ops = Ops(None)
    for name in BOOKS:
        setattr(ops, name, _nothing)
    return ops


def _nothing(*_: Any, **__: Any) -> None:
    """Books are kept already."""


def _local(selection: Selection, views: Tensors) -> Any:
    no_launcher: Any = None
    return listed_transport(selection, no_launcher, views)
