"""The ledger: what every captured key costs, in bytes, nodes, seconds and lost KV tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from capture_cache.kernel import CompiledKernel
from graphs.buffers import arena_layout, kv_bytes_per_token, scratch_bytes
from graphs.capture import Captured
from graphs.choices import KernelChoices
from graphs.keys import GraphKey, Ladder
from graphs.model_config import ModelConfig
from graphs.prove import Proof
from graphs.step_config import StepConfig
from kernels.triton.launch import KernelSpec

# Buffers that exist because a row may ask for more than greedy tokens.
CONTRACT_BUFFERS = (
    *("counts", "token_mask", "bias_ids", "bias_values", "processed", "top_part"),
    *("forced_tokens", "masks", "ring_top", "ring_logits"),
)


@dataclass(frozen=True)
class KeyCost:
    """One captured key.

    Attributes:
        nodes: graph nodes by type; empty on the CPU twin.
        graph_bytes: device memory taken by instantiating it.
        scratch_bytes: scratch it needs; shared, so that only the largest key's counts.
        extra_scratch_bytes: what the ladder's scratch would shrink by without this key.
        kv_tokens: KV tokens that fit into what this key alone costs.
        replays_proved: replays shown equal to the eager step; 0 if not verified.
    """

    key: str
    tokens: int
    rows: int
    nodes: dict[str, int]
    graph_bytes: int
    scratch_bytes: int
    extra_scratch_bytes: int
    kv_tokens: int
    capture_seconds: float
    replays_proved: int


@dataclass(frozen=True)
class KernelUse:
    """One compiled kernel that the graphs launch.

    Attributes:
        variant: its compile-time parameters.
        general: it takes a path for shapes that the fast one cannot: no bulk copies, or masked
            tiles.
    """

    name: str
    variant: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    general: bool

    @classmethod
    def of(cls, spec: KernelSpec, kernel: CompiledKernel) -> KernelUse:
        flags = dict(spec.constexprs)
        slow = any(flags.get(name) is False for name in ("W_TMA", "EVEN_N", "EVEN_K"))
        variant = " ".join(f"{k}={v}" for k, v in spec.constexprs)
        numbers = (kernel.registers, kernel.spill_bytes, kernel.shared_bytes)
        return cls(spec.name, variant, *numbers, slow)


@dataclass(frozen=True)
class Ledger:
    """Costs of a whole capture.

    Attributes:
        section_bytes: of the arena.
        contract_bytes: of the larger buffers behind what a row may ask for, by name; the last four
            lie in pinned host memory.
        kv_capacity_tokens: KV tokens that the cache holds.
        kernels: empty on the CPU twin.
        choices: which plan each operation took, its time and the runner-up's; see
            `graphs.choices.KernelChoices`.
        live: why these graphs serve the process that captured them alone, or "".
    """

    section_bytes: dict[str, int]
    contract_bytes: dict[str, int]
    kv_bytes_per_token: int
    kv_capacity_tokens: int
    attention: str
    keys: tuple[KeyCost, ...]
    kernels: tuple[KernelUse, ...]
    live: str = ""
    choices: dict[str, Any] = field(default_factory=dict)

    @property
    def general_kernels(self) -> list[str]:
        """Names of kernels of which a general variant is in use."""
        return sorted({k.name for k in self.kernels if k.general})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_ledger(
    cfg: ModelConfig,
    step: StepConfig,
    ladder: Ladder,
    graphs: Mapping[GraphKey, Captured],
    proofs: Mapping[GraphKey, Proof],
    kernels: Mapping[KernelSpec, CompiledKernel],
    *,
    choices: KernelChoices | None = None,
    live: str = "",
) -> Ledger:
    """Sum up a capture."""
    need = {key: scratch_bytes(cfg, step, key) for key in ladder.keys}
    per_token = kv_bytes_per_token(cfg)
    largest, rest = max(need, key=lambda k: need[k]), sorted(need.values())[:-1]
    costs = []
    for key in ladder.keys:
        graph = graphs[key]
        extra = need[key] - (rest[-1] if rest else 0) if key == largest else 0
        proof = proofs.get(key)
        costs.append(
            KeyCost(
                key=str(key),
                tokens=key.tokens,
                rows=key.rows,
                nodes=graph.nodes,
                graph_bytes=graph.graph_bytes,
                scratch_bytes=need[key],
                extra_scratch_bytes=extra,
                kv_tokens=(graph.graph_bytes + extra) // per_token,
                capture_seconds=graph.seconds,
                replays_proved=proof.replays if proof else 0,
            )
        )
    layout = arena_layout(cfg, step, ladder)
    places = layout.by_name
    return Ledger(
        section_bytes=layout.section_bytes,
        contract_bytes={name: places[name].nbytes for name in CONTRACT_BUFFERS},
        kv_bytes_per_token=per_token,
        kv_capacity_tokens=(step.num_pages - 1) * step.page_size,
        attention=step.attention,
        keys=tuple(costs),
        kernels=tuple(KernelUse.of(*used) for used in kernels.items()),
        live=live,
        choices=(choices or KernelChoices()).to_json(),
    )
