"""The decode step: one forward pass over a flat token list, written once for every backend.

Read it top to bottom: intake, advance, embed, layers, head, sample, settle. Invariants: every
operation writes buffers it is given, so nothing allocates; the sequence of operations is the same
for every key; a token's bits depend on that token alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from barriers.transport import Received, Transport
from graphs.attention import Attention
from graphs.buffers import StaticBuffers, StepConfig, query_fuses
from graphs.keys import GraphKey
from graphs.model_config import ModelConfig
from graphs.ops import Ops
from graphs.weights import shared_joins
from kernels.triton.linear import linear_plan
from kernels.triton.overlap import Ahead

Buffers = Mapping[str, torch.Tensor]
Stamp = Callable[[str], None]


LAYER_PARTS = ("attention", "mlp")
AHEAD_BYTES = 30 << 20  # of weights that are asked for at once: L2 holds them till they are read
AHEAD_GRAIN = 64  # elements


def _no_stamp(_: str) -> None:
    """Steps are captured without timestamps unless a benchmark asks for them."""


@dataclass(frozen=True)
class Activation:
    """The input of a matrix product: plain, and where weights are FP8 also quantised by 1x128."""

    plain: torch.Tensor | None
    q: torch.Tensor | None
    scale: torch.Tensor | None

    @classmethod
    def of(cls, b: Buffers, name: str) -> Activation:
        return cls(b.get(name), b.get(f"{name}_q"), b.get(f"{name}_s"))

    @property
    def quantised_only(self) -> dict[str, torch.Tensor | None]:
        """Outputs for a producer whose only consumer is a linear in the checkpoint's format."""
        if self.q is None:
            return {"out": self.plain, "out_q": None, "out_scale": None}
        return {"out": None, "out_q": self.q, "out_scale": self.scale}


@dataclass(frozen=True)
class Delta:
    """What is to be added to the residual, still as the kernels left it.

    Attributes:
        rows: act [T, H]; the K splits of a product, fp32 [S, T, H]; or with `choices` the results
            of every token's experts, act [T*K, H].
        choices: (ids, weights) of those experts.
    """

    rows: torch.Tensor
    choices: tuple[torch.Tensor, torch.Tensor] | None = None


class DecodeStep:
    """The whole step of one rank over its static buffers.

    Args:
        weights: packed tensors by the names of `graphs.weights.stored_table`, plus `rope_table`.
        transport: None for a model without experts.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        config: StepConfig,
        ops: Ops,
        buffers: StaticBuffers,
        weights: Mapping[str, torch.Tensor],
        attention: Attention,
        transport: Transport | None,
        *,
        on_device: bool,
    ) -> None:
        self.cfg, self.config = cfg, config
        self.ops, self.buffers, self.weights = ops, buffers, weights
        self.attention, self._transport = attention, transport
        self.on_device = on_device
        self.shared_joins = shared_joins(cfg, config.transport)

    @property
    def transport(self) -> Transport:
        """Carries tokens to experts; a model without experts has none."""
        assert self._transport is not None
        return self._transport

    def replace_transport(self, transport: Transport) -> None:
        """For measurements: what is captured from now on goes through `transport`."""
        self._transport = transport

    def run(self, key: GraphKey, stamp: Stamp = _no_stamp) -> None:
        """Launch one step for `key` on the current stream.

        Capture-safe: no sync, no allocation.
        """
        b = self.buffers.for_key(key)
        self._begin(b)
        stamp("begin")
        self.ops.embed(b["tok_id"], self.weights["embed"], b["poison"], out=b["x"])
        self.attention.plan(b)
        stamp("embed")
        delta = None
        for layer in range(self.cfg.num_layers):
            self._attention(b, layer, delta)
            stamp(f"layer {layer} attention")
            delta = self._moe(b, layer) if self.cfg.is_moe(layer) else self._dense(b, layer)
            stamp(f"layer {layer} mlp")
        self._sample(b)
        stamp("head")
        self._settle(b)
        stamp("settle")

    def part_names(self) -> list[str]:
        """The names that `run` stamps, in order: each marks the end of its part."""
        layers = [f"layer {i} {part}" for i in range(self.cfg.num_layers) for part in LAYER_PARTS]
        return ["begin", "embed", *layers, "head", "settle"]

    def _begin(self, b: Buffers) -> None:
        self.ops.intake(
            b["mailbox"],
            b["step"],
            *(b[n] for n in ("phase", "seq_len", "last_token", "limit", "stop_ids", "page_table")),
            layout=self.buffers.mailbox_layout,
            **{n: b[n] for n in ("tok_row", "tok_pos", "tok_id", "sample_tok", "sample_row")},
            fault=b["fault"],
            begin_ns=b["begin_ns"],
            on_device=self.on_device,
        )
        self.ops.advance(
            b["tok_row"],
            b["tok_pos"],
            b["page_table"],
            page_size=self.config.page_size,
            kv_slot=b["kv_slot"],
            kv_len=b["kv_len"],
            fault=b["fault"],
        )

    def _linear(self, b: Buffers, name: str, x: Activation, out: torch.Tensor) -> None:
        weight, scale = self.weights[name], self.weights.get(f"{name}_scale")
        if scale is None:
            self.ops.linear(x.plain, weight, out=out, workspace=b["workspace"])
        else:
            self.ops.linear_fp8(x.q, x.scale, weight, scale, out=out, workspace=b["workspace"])

    def _ahead(self, weight: torch.Tensor, *, bands: int = 0) -> Ahead | None:
        """The begin of `weight`, or of every row and band of it: AHEAD_BYTES at most."""
        most = AHEAD_BYTES // weight.element_size()
        span = min(weight.numel(), most)
        if bands:
            span = min(weight.shape[1] // bands, most // (weight.shape[0] * bands))
        span -= span % AHEAD_GRAIN
        return Ahead(weight, span, bands) if self.config.prefetch and span else None

    def _norm(
        self,
        b: Buffers,
        name: str,
        delta: Delta | None,
        *,
        plain: bool,
        ahead: Ahead | None = None,
    ) -> Activation:
        """x += delta, then RMSNorm, as the consumers want it."""
        norm = Activation.of(b, "norm")
        outs = norm.quantised_only
        if plain:
            outs["out"] = norm.plain
        self.ops.add_rmsnorm(
            b["x"],
            None if delta is None else delta.rows,
            self.weights[name],
            eps=self.cfg.rms_eps,
            choices=None if delta is None else delta.choices,
            ahead=ahead,
            **outs,
        )
        return norm

    def _attention(self, b: Buffers, layer: int, delta: Delta | None) -> None:
        cfg, w, name = self.cfg, self.weights, f"layers.{layer}."
        ahead = self._ahead(w[name + "qkv_a"])
        x = self._norm(b, name + "attn_norm", delta, plain=False, ahead=ahead)
        self._linear(b, name + "qkv_a", x, b["qkv"])
        compressed = cfg.q_lora_rank is not None
        q_norm = Activation.of(b, "q_norm")
        self.ops.mla_prep(
            b["qkv"],
            b["tok_row"],
            b["tok_pos"],
            b["kv_slot"],
            w["rope_table"],
            w[name + "q_a_norm"] if compressed else None,
            w[name + "kv_a_norm"],
            eps=cfg.latent_rms_eps,
            kv_start=cfg.q_part_padded,
            interleave=cfg.rope_interleave,
            ahead=self._ahead(w[name + "q_b"]) if compressed else None,
            kv_cache=b[f"kv.{layer}"],
            **(q_norm.quantised_only if compressed else {}),
        )
        self._query(b, name, q_norm)
        self.attention.run(b, b[f"kv.{layer}"])
        o = Activation.of(b, "o")
        if o.plain is None:
            weight = w[name + "o"]
            splits = linear_plan(*weight.shape, elem_bytes=weight.element_size()).splits
            ahead = self._ahead(weight, bands=splits)
            self.ops.absorb_v(b["o_latent"], w[name + "w_uv"], ahead=ahead, **o.quantised_only)
        else:
            self.ops.absorb_v(b["o_latent"], w[name + "w_uv"], out=o.plain)
            if o.q is not None:
                self.ops.quantize(o.plain, out_q=o.q, out_scale=o.scale)
        self._linear(b, name + "o", o, b["o_out"])

    def _query(self, b: Buffers, name: str, q_norm: Activation) -> None:
        """From the normed, compressed query to that of every head in the latent space."""
        cfg, w = self.cfg, self.weights
        places = (b["tok_pos"], b["tok_row"], w["rope_table"])
        rest = {"interleave": cfg.rope_interleave, "out": b["q_latent"]}
        if query_fuses(cfg):
            weight, scale = w[name + "q_b"], w[name + "q_b_scale"]
            x = (q_norm.q, q_norm.scale)
            # Attention leaves the memory half idle: what follows it can come meanwhile.
            ahead = self._ahead(w[name + "w_uv"].flatten(0, 1))
            self.ops.latent_query(*x, weight, scale, w[name + "w_uk"], *places, ahead=ahead, **rest)
            return
        q = b["qkv"][:, : cfg.q_part_width]
        if cfg.q_lora_rank is not None:
            q = b["q"]
            self._linear(b, name + "q_b", q_norm, q)
        self.ops.absorb_q(q, w[name + "w_uk"], *places, **rest)

    def _mlp(self, b: Buffers, name: str, buffer: str, x: Activation, out: torch.Tensor) -> None:
        h = Activation.of(b, f"{buffer}_h")
        self._linear(b, f"{name}gate_up", x, b[f"{buffer}_gate_up"])
        self.ops.silu_mul(b[f"{buffer}_gate_up"], **h.quantised_only)
        self._linear(b, f"{name}down", h, out)

    def _is_last(self, layer: int) -> bool:
        """The final norm takes its residual whole, for it takes some rows only."""
        return layer == self.cfg.num_layers - 1

    def _dense(self, b: Buffers, layer: int) -> Delta:
        name = f"layers.{layer}."
        ahead = self._ahead(self.weights[name + "gate_up"])
        x = self._norm(b, name + "mlp_norm", Delta(b["o_out"]), plain=False, ahead=ahead)
        out = b["delta" if self._is_last(layer) else "dense_out"]
        self._mlp(b, name, "dense", x, out)
        return Delta(out)

    def _moe(self, b: Buffers, layer: int) -> Delta:
        cfg, w, name = self.cfg, self.weights, f"layers.{layer}."
        # Whatever is routed where, the shared expert is needed, and until then the memory is idle.
        ahead = self._ahead(w[name + "all_gate_up"][-1]) if self.shared_joins else None
        x = self._norm(b, name + "mlp_norm", Delta(b["o_out"]), plain=True, ahead=ahead)
        self.ops.linear(
            x.plain, w[name + "router"], out=b["router_logits"], workspace=b["workspace"]
        )
        self.ops.route(
            b["router_logits"],
            w.get(name + "router_bias"),
            b["tok_row"],
            num_groups=cfg.n_group,
            topk_groups=cfg.topk_group,
            top_k=cfg.experts_per_token,
            normalize=cfg.norm_topk_prob,
            scaling=cfg.routed_scaling_factor,
            shared_id=cfg.num_experts if self.shared_joins else None,
            out_ids=b["topk_ids"],
            out_weights=b["topk_weights"],
        )
        first = cfg.first_k_dense_replace
        x_in = x.plain if x.q is None else x.q
        assert x_in is not None
        received = self.transport.dispatch(
            x_in,
            x.scale,
            b["topk_ids"],
            b["topk_weights"],
            layer=layer,
            opens_step=layer == first,
        )
        self._experts(b, name, received)
        joined = self.shared_joins or not cfg.num_shared_experts
        if self.config.transport == "local" and joined and not self._is_last(layer):
            # The next norm reads every expert's result anyway: it does the sum as well.
            return Delta(b["expert_y"], (received.ids, received.weights))
        shared = None
        if cfg.num_shared_experts and not self.shared_joins:
            shared = b["shared_out"]
            self._mlp(b, name + "shared_", "shared", x, shared)
        self.transport.combine(
            b["delta"], b["expert_y"], received, b["topk_ids"], shared, layer=layer
        )
        return Delta(b["delta"])

    def _experts(self, b: Buffers, name: str, received: Received) -> None:
        """This rank's experts over the received rows; `expert_y` gets a line per (row, choice)."""
        w, h = self.weights, Activation.of(b, "expert_h")
        name += "all_" if self.shared_joins else "experts_"
        self.ops.align(received.ids, expert_start=0, offsets=b["offsets"], pairs=b["pairs"])
        hidden = h.plain if h.q is None else h.q
        self.ops.grouped_gate_up(
            received.x,
            received.scale,
            w[name + "gate_up"],
            w.get(name + "gate_up_scale"),
            b["offsets"],
            b["pairs"],
            top_k=received.ids.shape[1],
            out=hidden,
            out_scale=h.scale,
        )
        self.ops.grouped_down(
            hidden,
            h.scale,
            w[name + "down"],
            w.get(name + "down_scale"),
            b["offsets"],
            b["pairs"],
            top_k=received.ids.shape[1],
            out=b["expert_y"],
        )

    def _sample(self, b: Buffers) -> None:
        w = self.weights
        self.ops.gather_add_rmsnorm(
            b["x"],
            b["delta"],
            b["sample_tok"],
            w["final_norm"],
            eps=self.cfg.rms_eps,
            out=b["final"],
        )
        head = w["embed"] if self.cfg.tie_word_embeddings else w["head"]
        self.ops.linear(b["final"], head, out=b["logits"], workspace=b["workspace"])
        self.ops.greedy(
            b["logits"],
            b["sample_tok"],
            **{n: b[n] for n in ("part_max", "part_arg", "part_sum", "out_token", "out_logprob")},
        )

    def _settle(self, b: Buffers) -> None:
        self.ops.settle(
            *(b[n] for n in ("sample_row", "out_token", "out_logprob", "step", "phase")),
            *(b[n] for n in ("seq_len", "last_token", "limit", "stop_ids", "fault", "begin_ns")),
            ring=b["ring"],
            ring_step=b["ring_step"],
            on_device=self.on_device,
        )
