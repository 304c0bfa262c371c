"""The oracle of the wire: n ranks in one process, in plain torch, rounding where the device rounds.

Lists are indexed by rank. Every result is bit-exact to what `rdep` computes on a device, except
rows that are undefined there and zeros here. `moe_fp64` is the other oracle: what the exchange is
for, without any rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from barriers.transport import GROUP, Received, TransportConfig
from kernels.triton import activation

Expert = Callable[[int, torch.Tensor], torch.Tensor]  # (expert id, tokens [N, H]) → [N, H]


def ranks_of(config: TransportConfig) -> list[TransportConfig]:
    """The same sizes as each rank of the world sees them."""
    return [replace(config, rank=rank) for rank in range(config.world)]


def quantize_ref(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [T, H], fp32 [T, ceil(H/128)]) of act [T, H], by the rule that holds everywhere."""
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(x.shape[0], -(-x.shape[1] // GROUP))
    if x.shape[0]:
        # On the CPU: torch on CUDA divides by a number as if it multiplied by its reciprocal.
        activation.quantize_ref(x.cpu(), out_q=q, out_scale=scale)
    return q.to(x.device), scale.to(x.device)


def dequantize_ref(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float64 [T, H], exact."""
    return q.double() * scale.double().repeat_interleave(GROUP, dim=1)[:, : q.shape[1]]


def dispatch_ref(
    config: TransportConfig,
    xs: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> list[Received]:
    """What each rank receives.

    Args:
        xs: act [T_s, H] of each source; quantised here if config.fp8. T_s may differ, down to 0.
        ids: int32 [T_s, K].
        weights: fp32 [T_s, K].
    """
    return [_receive(c, xs, ids, weights) for c in ranks_of(config)]


def _receive(
    config: TransportConfig,
    xs: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> Received:
    rows, device = config.recv_rows, xs[0].device
    out = Received(
        torch.zeros(rows, config.hidden, device=device).to(getattr(torch, config.row_dtype)),
        torch.zeros(rows, config.groups, device=device) if config.fp8 else None,
        torch.full((rows, config.top_k), -1, dtype=torch.int32, device=device),
        torch.zeros(rows, config.top_k, device=device),
    )
    for source, (x, id_, weight) in enumerate(zip(xs, ids, weights, strict=True)):
        at = slice(source * config.capacity, source * config.capacity + x.shape[0])
        local = id_ - config.expert_start
        mine = (id_ >= 0) & (local >= 0) & (local < config.local_experts)
        out.ids[at] = local.masked_fill(~mine, -1)
        out.weights[at] = weight.masked_fill(~mine, 0.0)
        wanted = mine.any(1)
        if out.scale is None:
            out.x[at][wanted] = x[wanted]
        else:
            q, scale = quantize_ref(x)
            # Boolean assignment knows no e4m3: copy its bytes.
            out.x[at].view(torch.uint8)[wanted] = q.view(torch.uint8)[wanted]
            out.scale[at][wanted] = scale[wanted]
    return out


def experts_ref(config: TransportConfig, received: Received, expert: Expert) -> torch.Tensor:
    """act [R*K, H]: `expert` of every listed pair, computed in float64 and rounded once."""
    x = _tokens_fp64(received)
    y = torch.zeros(received.ids.numel(), config.hidden, device=x.device)
    y = y.to(getattr(torch, config.act_dtype))
    flat = received.ids.flatten()
    for e in torch.unique(flat).tolist():
        if e >= 0:
            pairs = (flat == e).nonzero().flatten()
            tokens = x[pairs // received.ids.shape[1]]
            y[pairs] = expert(config.expert_start + e, tokens).to(y.dtype)
    return y


def partial_ref(config: TransportConfig, received: Received, y: torch.Tensor) -> torch.Tensor:
    """act [R, H]: the weighted sum of a row's experts in k order, fp32, rounded once."""
    rows = y.view(*received.ids.shape, -1)
    total = torch.zeros(rows.shape[0], rows.shape[2], device=y.device)
    for k in range(received.ids.shape[1]):
        term = received.weights[:, k, None] * rows[:, k].float()
        total += term.masked_fill((received.ids[:, k] < 0)[:, None], 0.0)
    return total.to(y.dtype)


def combine_ref(
    config: TransportConfig,
    partials: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """act [T_s, H] of each source: its experts' ranks in rank order, then shared."""
    outs = []
    for source, (id_, extra) in enumerate(zip(ids, shared, strict=True)):
        at = slice(source * config.capacity, source * config.capacity + id_.shape[0])
        total = torch.zeros(id_.shape[0], config.hidden, device=id_.device)
        for rank, partial in enumerate(partials):
            used = ((id_ >= 0) & (id_ // config.local_experts == rank)).any(1)
            total += partial[at].float().masked_fill(~used[:, None], 0.0)
        if extra is not None:
            total += extra.float()
        outs.append(total.to(partials[0].dtype))
    return outs


def moe_fp64(
    config: TransportConfig,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    expert: Expert,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    """float64 [T, H]: the layer's output for one rank's tokens, given the quantised inputs."""
    tokens = dequantize_ref(*quantize_ref(x)) if config.fp8 else x.double()
    total = torch.zeros(tokens.shape, dtype=torch.float64, device=x.device)
    for e in torch.unique(ids).tolist():
        if e >= 0:
            t, k = (ids == e).nonzero(as_tuple=True)
            # index_put with accumulation: a token may name an expert once per choice.
            term = weights[t, k, None].double() * expert(e, tokens[t])
            total.index_put_((t,), term, accumulate=True)
    return total if shared is None else total + shared.double()


def relative_error(got: torch.Tensor, reference: torch.Tensor) -> float:
    """|got - reference| / |reference| in float64; NaN counts as infinite."""
    difference = (got.double() - reference).norm()
    error = float(difference / reference.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def _tokens_fp64(received: Received) -> torch.Tensor:
    if received.scale is None:
        return received.x.double()
    return dequantize_ref(received.x, received.scale)
