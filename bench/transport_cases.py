"""What transports are checked and timed with: seeded tokens of every rank, and cheap experts.

An expert scales each column by its own random number: no expert, rank, row or column can be taken
for another without an error, and no matrix product hides the transport.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from barriers import rdep_ref
from barriers.transport import Received, TransportConfig
from bench.routing import expert_ids, expert_weights


@dataclass(frozen=True)
class Tokens:
    """One rank's step: x, shared act [T, H]; ids int32, weights fp32 [T, K]."""

    x: torch.Tensor
    shared: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return self.x.shape[0]


def make_tokens(
    config: TransportConfig,
    rank: int,
    count: int,
    device: torch.device,
    *,
    routing: str = "random",
    path: Path | None = None,
    seed: int = 0,
) -> Tokens:
    """The tokens of `rank`, the same whoever makes them."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    act = getattr(torch, config.act_dtype)
    draw = seed * config.world + rank
    x, shared = (
        torch.randn(count, config.hidden, generator=generator).to(act).to(device) for _ in range(2)
    )
    ids = expert_ids(
        routing,
        tokens=count,
        num_experts=config.num_experts,
        top_k=config.top_k,
        seed=draw,
        path=path,
    )
    weights = expert_weights(count, config.top_k, seed=draw)
    return Tokens(x, shared, ids.to(device), weights.to(device))


def make_gains(config: TransportConfig, device: torch.device) -> torch.Tensor:
    """fp32 [E, H]: what each expert multiplies by."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(config.num_experts, config.hidden, generator=generator).to(device)


def run_experts(
    config: TransportConfig, received: Received, gains: torch.Tensor, y: torch.Tensor
) -> None:
    """y act [R*K, H] of the received rows; NaN where there is no choice, for nobody may read it."""
    rows = received.x.float()
    if received.scale is not None:
        rows *= received.scale.repeat_interleave(128, dim=1)[:, : config.hidden]
    choices = y.view(received.ids.shape[0], received.ids.shape[1], config.hidden)
    local = gains[config.expert_start : config.expert_start + config.local_experts]
    for k in range(received.ids.shape[1]):
        ids = received.ids[:, k].long()
        choices[:, k] = (rows * local[ids.clamp_min(0)]).to(y.dtype)
        choices[:, k].masked_fill_((ids < 0)[:, None], float("nan"))


def oracle(
    config: TransportConfig, tokens: list[Tokens], gains: torch.Tensor
) -> list[torch.Tensor]:
    """act [T, H] of each rank, to the bit."""
    ids = [t.ids for t in tokens]
    sent = rdep_ref.dispatch_ref(config, [t.x for t in tokens], ids, [t.weights for t in tokens])
    partials = []
    for ranked, received in zip(rdep_ref.ranks_of(config), sent, strict=True):
        y = tokens[0].x.new_empty(received.ids.numel(), config.hidden)
        run_experts(ranked, received, gains, y)
        partials.append(rdep_ref.partial_ref(ranked, received, y))
    return rdep_ref.combine_ref(config, partials, ids, [t.shared for t in tokens])


def reference(config: TransportConfig, tokens: Tokens, gains: torch.Tensor) -> torch.Tensor:
    """float64 [T, H], given the same quantised inputs."""

    def expert(e: int, rows: torch.Tensor) -> torch.Tensor:
        return rows * gains[e].double()

    return rdep_ref.moe_fp64(config, tokens.x, tokens.ids, tokens.weights, expert, tokens.shared)


def wire_bytes(config: TransportConfig, ids: torch.Tensor) -> tuple[int, int]:
    """(bytes this rank sends in dispatch, bytes it gets in combine), one copy of a token a rank."""
    ranks = torch.where(ids >= 0, ids // config.local_experts, -1)
    copies = sum(
        int((ranks == rank).any(1).sum()) for rank in range(config.world) if rank != config.rank
    )
    token = config.hidden + 4 * config.groups if config.fp8 else config.hidden * config.act_bytes
    choices = 4 * config.top_k
    sent = copies * (token + choices) + (config.world - 1) * ids.shape[0] * choices
    return sent, copies * config.hidden * config.act_bytes
