"""A whole MoE layer with real experts, over any transport, and what float64 makes of it.

FP8 weights are random as a preset's are, each expert's from its own number, so whoever needs one
makes it anew: a rank holds its own experts, and checks the output of its own tokens against all of
them. Given are the same quantised inputs: of gate_up the e4m3 tokens, of down the e4m3 hidden
activation, as the kernel makes it of one expert alone (`hidden_of`), which is itself held against
float64 within e4m3's own step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from barriers.rdep_ref import dequantize_ref, quantize_ref
from barriers.transport import GROUP, Received, Transport, TransportConfig
from bench.transport_cases import Tokens
from graphs.fp8_blocks import E4M3_MAX, dequantise_blocks
from graphs.ops import Ops
from kernels.triton.random_init import fill_random, fill_random_ref

Quantize = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
POISON = 0x7F  # of every byte: NaN in e4m3, and far from any value in bf16
# Of the group's greatest magnitude: how far a hidden value may be from float64 beyond e4m3's step.
# The tensor cores keep about 14 bits of a sum of 128 products.
HIDDEN_SLACK = 2e-3


@dataclass(frozen=True)
class Weights:
    """Some experts: gate_up e4m3 [E, 2I, H] and down e4m3 [E, H, I], with their block scales."""

    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor


class Experts:
    """Every expert of a layer, made when it is asked for.

    Args:
        ops: bound to a device or to the oracles.
        inter: width of an expert.
    """

    def __init__(
        self, ops: Ops, config: TransportConfig, inter: int, device: torch.device, *, seed: int = 0
    ) -> None:
        self.ops, self.inter, self.device = ops, inter, device
        self._hidden, self._seed = config.hidden, seed
        self._num_experts = config.num_experts

    def make(self, first: int, count: int) -> Weights:
        """Experts `first` to `first + count - 1` of the layer."""
        assert 0 <= first < first + count <= self._num_experts
        hidden, inter = self._hidden, self.inter
        shapes = ((2 * inter, hidden), (hidden, inter))
        made = []
        for rows, cols in shapes:
            groups = (-(-rows // GROUP), -(-cols // GROUP))
            if rows == 2 * inter:  # gate and up have scale rows of their own
                groups = (2 * -(-inter // GROUP), groups[1])
            made.append(self._empty(torch.float8_e4m3fn, count, rows, cols))
            made.append(self._empty(torch.float32, count, *groups))
        for i in range(count):
            for name, q, scale in (("gate_up", *made[:2]), ("down", *made[2:])):
                width = math.sqrt(3.0) / math.sqrt(q.shape[2])  # of unit deviation in, and out
                stream = f"{self._seed}/{first + i}/{name}"
                self._fill(q[i], stream, E4M3_MAX, 0.0)
                step = width / E4M3_MAX
                self._fill(scale[i], stream + "_scale", 0.25 * step, step)
        return Weights(*made)

    def _empty(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _fill(self, out: torch.Tensor, stream: str, scale: float, mean: float) -> None:
        seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
        if self.ops.launch is None:
            fill_random_ref(out, seed=seed, scale=scale, mean=mean)
        else:
            fill_random(self.ops.launch, out, seed=seed, scale=scale, mean=mean)


@dataclass(frozen=True)
class Lists:
    """What `align` makes of ids: the pairs of each expert, and the experts' counters."""

    offsets: torch.Tensor
    pairs: torch.Tensor
    ready: torch.Tensor

    @classmethod
    def of(cls, ops: Ops, ids: torch.Tensor, num_experts: int) -> Lists:
        made = (ids.new_empty(n) for n in (num_experts + 1, ids.numel(), num_experts))
        lists = cls(*made)
        ops.align(ids, expert_start=0, offsets=lists.offsets, pairs=lists.pairs, ready=lists.ready)
        return lists


def run_layer(
    ops: Ops, transport: Transport, weights: Weights, tokens: Tokens
) -> tuple[torch.Tensor, Received, list[torch.Tensor]]:
    """One layer as the decode step runs it: output, what was received, and the buffers of
    `run_experts`."""
    t = tokens
    sent = (t.x, None) if transport.takes_act else quantize_ref(t.x)
    received = transport.dispatch(*sent, t.ids, t.weights, layer=1, opens_step=True)
    buffers = run_experts(ops, weights, received, t.x.dtype)
    out = torch.full_like(t.x, float("nan"))
    transport.combine(out, buffers[-1], received, t.ids, t.shared, layer=1)
    return out, received, buffers


def run_experts(
    ops: Ops, weights: Weights, received: Received, act: torch.dtype
) -> list[torch.Tensor]:
    """The decode step's products: hidden activation, its scale, and result, [pairs, ...] each.

    In them only listed pairs may be written; all is poisoned before.
    """
    pairs, top_k = received.ids.numel(), received.ids.shape[1]
    h, scale = _poisoned_hidden(pairs, weights.down.shape[2], received.ids.device)
    y = torch.empty(pairs, received.x.shape[1], dtype=act, device=received.ids.device)
    y.view(torch.uint8).fill_(POISON)
    lists = Lists.of(ops, received.ids, weights.down.shape[0])
    listed = (lists.offsets, lists.pairs)
    ops.grouped_gate_up(
        received.x,
        received.scale,
        weights.gate_up,
        weights.gate_up_scale,
        *listed,
        top_k=top_k,
        out=h,
        out_scale=scale,
        ready=lists.ready,
    )
    ops.grouped_down(
        h,
        scale,
        weights.down,
        weights.down_scale,
        *listed,
        top_k=top_k,
        out=y,
        ready=lists.ready,
    )
    return [h, scale, y]


def warm_up(ops: Ops, weights: Weights, hidden: int, rows: int, choices: int) -> None:
    """Compile the products for received [rows, choices], before a rank can wait for another."""
    device = weights.down.device
    nothing = Received(
        torch.zeros(rows, hidden, device=device).to(torch.float8_e4m3fn),
        torch.zeros(rows, -(-hidden // GROUP), device=device),
        torch.full((rows, choices), -1, dtype=torch.int32, device=device),
        torch.zeros(rows, choices, device=device),
    )
    run_experts(ops, weights, nothing, torch.bfloat16)


def _poisoned_hidden(
    pairs: int, inter: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    h = torch.empty(pairs, inter, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(pairs, -(-inter // GROUP), device=device)
    for tensor in (h, scale):
        tensor.view(torch.uint8).fill_(POISON)
    return h, scale


def check_touched(
    config: TransportConfig,
    every: Sequence[Tokens],
    received: Received,
    buffers: Sequence[torch.Tensor],
) -> None:
    """Raises AssertionError unless this rank's experts took the pairs of live tokens and no others.

    Args:
        every: the tokens of all ranks; a padded token has ids of -1 alone.
        buffers: as from `run_experts`.
    """
    first, end = config.expert_start, config.expert_start + config.local_experts
    wanted = sum(int(((t.ids >= first) & (t.ids < end)).sum()) for t in every)
    listed = received.ids.flatten() >= 0
    assert int(listed.sum()) == wanted, f"{int(listed.sum())} pairs are listed, expected {wanted}"
    for buffer in buffers:
        written = (buffer.view(torch.uint8) != POISON).view(len(listed), -1).any(1)
        assert not (written & ~listed).any(), f"{int((written & ~listed).sum())} pairs too many"
        assert written[listed].all(), f"{int((listed & ~written).sum())} pairs were left out"


def hidden_of(
    experts: Experts, weights: Weights, q: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [N, I], fp32 [N, ceil(I/128)]): one expert's hidden activation of tokens [N, H]."""
    ids = torch.zeros(len(q), 1, dtype=torch.int32, device=q.device)
    lists = Lists.of(experts.ops, ids, 1)
    h, h_scale = _poisoned_hidden(len(q), experts.inter, q.device)
    experts.ops.grouped_gate_up(
        q,
        scale,
        weights.gate_up,
        weights.gate_up_scale,
        lists.offsets,
        lists.pairs,
        top_k=1,
        out=h,
        out_scale=h_scale,
    )
    return h, h_scale


@dataclass(frozen=True)
class Reference:
    """What float64 makes of one rank's tokens.

    Attributes:
        out: float64 [T, H], given the kernel's own hidden activations.
        hidden_excess: how far the worst of these is from float64 beyond e4m3's step, as a part of
            its group's greatest magnitude.
        pairs: (token, choice) pairs that were computed.
    """

    out: torch.Tensor
    hidden_excess: float
    pairs: int


def quantize_deepep_ref(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_ref`, by the rule of DeepEP's low-latency dispatch, which quantises by itself.

    It multiplies where we divide. Of random bf16, three values in ten thousand lie halfway between
    two of e4m3 and go to the other one; the hidden activation, quantised in its turn, makes an
    error of 7e-3 of that.
    """
    groups = x.cpu().float().view(len(x), -1, GROUP)
    amax = groups.abs().amax(-1).clamp(min=1e-4)
    # Not `E4M3_MAX / amax`, which torch makes of the reciprocal, with two roundings for one.
    factor = torch.full_like(amax, E4M3_MAX) / amax
    q = (groups * factor[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    q8 = q.view(x.shape).to(torch.float8_e4m3fn)
    return q8.to(x.device), (amax * (1.0 / E4M3_MAX)).to(x.device)


def reference(experts: Experts, tokens: Tokens, quantize: Quantize = quantize_ref) -> Reference:
    """The layer's output for one rank's tokens, expert by expert, with every rank's experts."""
    q, scale = quantize(tokens.x)
    total, worst, pairs = tokens.shared.double(), 0.0, 0
    for e in torch.unique(tokens.ids).tolist():
        if e < 0:
            continue
        t, k = (tokens.ids == e).nonzero(as_tuple=True)
        own = experts.make(e, 1)
        rows = q.view(torch.uint8)[t].view(q.dtype)  # indexing knows no e4m3
        h, h_scale = hidden_of(experts, own, rows, scale[t])
        hidden = dequantize_ref(h, h_scale)
        wanted = _swiglu(own, dequantize_ref(rows, scale[t]), experts.inter)
        worst = max(worst, _excess(hidden, wanted, h_scale))
        y = hidden @ _wide(own.down[0], own.down_scale[0]).T
        total.index_add_(0, t, tokens.weights[t, k, None].double() * y)
        pairs += len(t)
    return Reference(total, worst, pairs)


def _swiglu(own: Weights, x: torch.Tensor, inter: int) -> torch.Tensor:
    """float64 [N, I]."""
    rows = own.gate_up_scale.shape[1] // 2
    gate, up = (
        x @ _wide(own.gate_up[0, i * inter : (i + 1) * inter], scale).T
        for i, scale in enumerate(own.gate_up_scale[0].split(rows))
    )
    return gate / (1.0 + torch.exp(-gate)) * up


def _wide(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float64 of an e4m3 matrix with block scales; one product is exact in float64, not in fp32."""
    ones = dequantise_blocks(q, torch.ones_like(scale)).double()
    spread = scale.double().repeat_interleave(GROUP, 0)[: q.shape[0]]
    return ones * spread.repeat_interleave(GROUP, 1)[:, : q.shape[1]]


def _excess(hidden: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> float:
    """Beyond half a step of e4m3, 2^-4 of a value and 2^-10 of the scale; NaN is infinite."""
    spread = scale.double().repeat_interleave(GROUP, 1)[:, : hidden.shape[1]]
    step = wanted.abs() / 16 + spread / 1024
    beyond = float((((hidden - wanted).abs() - step) / (E4M3_MAX * spread)).max())
    return beyond if beyond == beyond else math.inf
