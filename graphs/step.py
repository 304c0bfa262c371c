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
from barriers.vocabulary import Vocabulary
from graphs.attention import Attention, attend
from graphs.branch import Branch
from graphs.buffers import StaticBuffers, query_fuses
from graphs.keys import GraphKey
from graphs.model_config import ModelConfig
from graphs.ops import Ops
from graphs.step_config import StepConfig
from graphs.weights import shared_joins
from kernels.triton.rows import RowState

Buffers = Mapping[str, torch.Tensor]
Stamp = Callable[[str], None]


LAYER_PARTS = ("attention", "mlp")


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
        branch: where the shared expert runs with `config.overlap`.
        vocabulary: where ranks share the head, and only there.
    Raises:
        ValueError: a shared head without it, or it without one.
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
        branch: Branch,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        if (cfg.head_shards > 1) != (vocabulary is not None):
            raise ValueError(
                f"a head of {cfg.head_shards} parts: expected "
                f"{'no exchange' if vocabulary else 'the exchange'} between the ranks that have "
                f"it, got {vocabulary}; make both from one selection"
            )
        self.cfg, self.config = cfg, config
        self.vocabulary = vocabulary
        self.ops, self.buffers, self.weights = ops, buffers, weights
        self.attention, self._transport = attention, transport
        self.on_device = on_device
        self.shared_joins = shared_joins(cfg, config.transport)
        self._branch, self._beside = branch, ops.ordinary()

    @property
    def transport_or_none(self) -> Transport | None:
        """As `transport`; None for a model without experts."""
        return self._transport

    @property
    def transport(self) -> Transport:
        """Carries tokens to experts; a model without experts has none."""
        assert self._transport is not None
        return self._transport

    @property
    def live(self) -> str:
        """Why a capture of this step serves this process alone; "" if it can be stored."""
        exchanges = (self._transport, self.vocabulary)
        return next((e.live for e in exchanges if e is not None and e.live), "")

    @property
    def allocates(self) -> bool:
        """A capture of this step needs a pool of memory of its own."""
        return self._transport is not None and self._transport.allocates

    def require_settled(self, doing: str) -> None:
        """Raises a named error where the transport's host state forbids `doing`."""
        if self._transport is not None:
            self._transport.require_settled(doing)

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
            *(b[n] for n in ("mailbox", "forced_tokens", "step")),
            RowState.of(b),
            layout=self.buffers.mailbox_layout,
            **{n: b[n] for n in ("tok_row", "tok_pos", "tok_id")},
            **{n: b[n] for n in ("sample_tok", "sample_row", "sample_pos", "forced")},
            fault=b["fault"],
            begin_ns=b["begin_ns"],
            **{n: b[n] for n in ("pending", "ring", "ring_step")},
            on_device=self.on_device,
        )
        self.ops.copy_masks(b["step"], b["mask_step"], b["masks"], token_mask=b["token_mask"])
        self.ops.count_tokens(
            *(b[n] for n in ("tok_row", "tok_pos", "tok_id")),
            **{n: b[n] for n in ("prompt_len", "repetition", "presence", "frequency")},
            **{n: b[n] for n in ("fresh", "counts")},
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

    def _linear(
        self,
        b: Buffers,
        name: str,
        x: Activation,
        out: torch.Tensor,
        *,
        ops: Ops | None = None,
        workspace: str = "workspace",
    ) -> None:
        ops = ops or self.ops
        weight, scale = self.weights[name], self.weights.get(f"{name}_scale")
        if scale is None:
            ops.linear(x.plain, weight, out=out, workspace=b[workspace])
        else:
            ops.linear_fp8(x.q, x.scale, weight, scale, out=out, workspace=b[workspace])

    def _norm(
        self,
        b: Buffers,
        name: str,
        delta: Delta | None,
        *,
        plain: bool,
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
            **outs,
        )
        return norm

    def _attention(self, b: Buffers, layer: int, delta: Delta | None) -> None:
        cfg, w, name = self.cfg, self.weights, f"layers.{layer}."
        x = self._norm(b, name + "attn_norm", delta, plain=False)
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
            kv_cache=b[f"kv.{layer}"],
            **(q_norm.quantised_only if compressed else {}),
        )
        self._query(b, name, q_norm)
        attend(self.attention, self.ops, b, b[f"kv.{layer}"], w[name + "w_uv"])
        self._linear(b, name + "o", Activation.of(b, "o"), b["o_out"])

    def _query(self, b: Buffers, name: str, q_norm: Activation) -> None:
        """From the normed, compressed query to that of every head in the latent space."""
        cfg, w = self.cfg, self.weights
        places = (b["tok_pos"], b["tok_row"], w["rope_table"])
        rest = {"interleave": cfg.rope_interleave, "out": b["q_latent"]}
        if query_fuses(cfg):
            weight, scale = w[name + "q_b"], w[name + "q_b_scale"]
            x = (q_norm.q, q_norm.scale)
            self.ops.latent_query(*x, weight, scale, w[name + "w_uk"], *places, **rest)
            return
        q = b["qkv"][:, : cfg.q_part_width]
        if cfg.q_lora_rank is not None:
            q = b["q"]
            self._linear(b, name + "q_b", q_norm, q)
        self.ops.absorb_q(q, w[name + "w_uk"], *places, **rest)

    def _mlp(
        self,
        b: Buffers,
        name: str,
        buffer: str,
        x: Activation,
        out: torch.Tensor,
        *,
        ops: Ops | None = None,
        workspace: str = "workspace",
    ) -> None:
        """`ops` and `workspace` are the branch's, where it runs in one."""
        ops, h = ops or self.ops, Activation.of(b, f"{buffer}_h")
        gate_up = b[f"{buffer}_gate_up"]
        self._linear(b, f"{name}gate_up", x, gate_up, ops=ops, workspace=workspace)
        ops.silu_mul(gate_up, **h.quantised_only)
        self._linear(b, f"{name}down", h, out, ops=ops, workspace=workspace)

    def _is_last(self, layer: int) -> bool:
        """The final norm takes its residual whole, for it takes some rows only."""
        return layer == self.cfg.num_layers - 1

    def _dense(self, b: Buffers, layer: int) -> Delta:
        name = f"layers.{layer}."
        x = self._norm(b, name + "mlp_norm", Delta(b["o_out"]), plain=False)
        out = b["delta" if self._is_last(layer) else "dense_out"]
        self._mlp(b, name, "dense", x, out)
        return Delta(out)

    def _moe(self, b: Buffers, layer: int) -> Delta:
        cfg, name = self.cfg, f"layers.{layer}."
        x = self._route(b, name)
        shared = b["shared_out"] if cfg.num_shared_experts and not self.shared_joins else None
        if shared is not None and self.config.overlap:
            # Its weights stream while the exchange waits for other ranks.
            with self._branch.beside():
                self._shared(b, name, x, ops=self._beside, workspace="shared_workspace")
        received = self._dispatch(b, x, layer)
        self._experts(b, name, received)
        joined = self.shared_joins or not cfg.num_shared_experts
        if self.config.transport == "local" and joined and not self._is_last(layer):
            # The next norm reads every expert's result anyway: it does the sum as well.
            return Delta(b["expert_y"], (received.ids, received.weights))
        if shared is not None:
            if self.config.overlap:
                self._branch.join()
            else:
                self._shared(b, name, x, ops=self.ops, workspace="workspace")
        self.transport.combine(
            b["delta"], b["expert_y"], received, b["topk_ids"], shared, layer=layer
        )
        return Delta(b["delta"])

    def _route(self, b: Buffers, name: str) -> Activation:
        """What goes to the experts; to which of them, is in `topk_ids` and `topk_weights`."""
        cfg, w = self.cfg, self.weights
        x = self._norm(b, name + "mlp_norm", Delta(b["o_out"]), plain=True)
        self.ops.router(x.plain, w[name + "router"], out=b["router_logits"])
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
        return x

    def _shared(self, b: Buffers, name: str, x: Activation, *, ops: Ops, workspace: str) -> None:
        name += "shared_"
        self._mlp(b, name, "shared", x, b["shared_out"], ops=ops, workspace=workspace)

    def _dispatch(self, b: Buffers, x: Activation, layer: int) -> Received:
        plain = x.q is None or self.transport.takes_act
        x_in = x.plain if plain else x.q
        assert x_in is not None
        return self.transport.dispatch(
            x_in,
            None if plain else x.scale,
            b["topk_ids"],
            b["topk_weights"],
            layer=layer,
            opens_step=layer == self.cfg.first_k_dense_replace,
        )

    def _experts(self, b: Buffers, name: str, received: Received) -> None:
        """This rank's experts over the received rows; `expert_y` gets a line per (row, choice)."""
        w, h = self.weights, Activation.of(b, "expert_h")
        name += "all_" if self.shared_joins else "experts_"
        lists = {field: b[field] for field in ("offsets", "pairs", "ready")}
        self.ops.align(received.ids, expert_start=0, **lists)
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
            ready=b["ready"],
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
            ready=b["ready"],
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
        if self.vocabulary is None:
            self.ops.linear(b["final"], head, out=b["logits"], workspace=b["workspace"])
        else:
            part = self.vocabulary.part
            self.ops.linear(
                self.vocabulary.gather(b["final"]), head, out=part, workspace=b["workspace"]
            )
            self.vocabulary.scatter(part, b["logits"])
        self.ops.sample(b)
        self.ops.answer(
            *(b[n] for n in ("sample_row", "sample_pos", "row_params", "step")),
            *(b[n] for n in ("top_ids", "top_logprobs", "logits")),
            ring_top=b["ring_top"],
            ring_logits=b["ring_logits"],
        )

    def _settle(self, b: Buffers) -> None:
        self.ops.settle(
            *(b[n] for n in ("sample_row", "sample_pos", "out_token", "out_logprob", "step")),
            RowState.of(b),
            b["fault"],
            b["begin_ns"],
            **{n: b[n] for n in ("mailbox", "pending", "ring", "ring_step")},
            on_device=self.on_device,
        )
