"""The step put together over bound views, and the list of what a capture of it launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from barriers.deepep import DeepEpLowLatency, DeepEpNormal
from barriers.rdep import Rdep
from barriers.transport import Local, Transport, TransportConfig, deepep_capacity
from barriers.vocabulary import Vocabulary, VocabularyConfig
from graphs.attention import ATTENTION
from graphs.attention_choice import run_every_cut
from graphs.branch import Branch, InLine
from graphs.buffers import StaticBuffers, transport_config, vocabulary_config
from graphs.calls import Call, Hook, RecordingOps
from graphs.candidates import run_every
from graphs.checkpoint import random_weights
from graphs.choices import ChosenOps, KernelChoices
from graphs.compile import RecordingLauncher
from graphs.devices import bind_views, torch_dtype
from graphs.ops import Ops
from graphs.step import DecodeStep
from graphs.weights import add_part_views, stored_table
from kernels.triton.launch import Launcher, Ordinary
from kernels.triton.overlap import MODES
from kernels.triton.settle import stamp
from runtime.selection import Selection


def make_step(
    selection: Selection,
    ops: Ops,
    views: Mapping[str, torch.Tensor],
    transport: Transport | None,
    branch: Branch | None = None,
    vocabulary: Vocabulary | None = None,
) -> DecodeStep:
    """The step over bound views; on `meta` views it can be listed but not run."""
    model, step = selection.model, selection.step
    stored = stored_table(model, ep_size=step.ep_size, transport=step.transport)
    names = [*stored, "rope_table"]
    weights = MappingProxyType({name: views[name] for name in names})
    buffers = StaticBuffers(model, step, selection.ladder, views)
    attention = ATTENTION[step.attention](model, step, ops)
    return DecodeStep(
        model,
        step,
        ops,
        buffers,
        weights,
        attention,
        transport,
        on_device=selection.on_device,
        branch=branch or InLine(),
        vocabulary=vocabulary,
    )


def exchange_launcher(selection: Selection, launch: Launcher) -> Launcher:
    """What a transport launches with: its first kernel may be the one after a join."""
    return Ordinary(launch) if selection.step.overlap else launch


def list_kernels(
    selection: Selection,
    arch: str,
    attentions: Iterable[str],
    *,
    every: bool = False,
    choices: KernelChoices | None = None,
) -> RecordingLauncher:
    """Every Triton kernel of a capture, random weights and timestamps included, run by nobody.

    Args:
        attentions: list for each of these.
        every: list every candidate of each operation, too, and every cut of attention.
        choices: list the kernels that these choose.
    """
    launcher = RecordingLauncher(arch, pdl=MODES[selection.step.pdl])
    ops: Ops = ChosenOps(Ops(launcher), choices or KernelChoices())
    if every:
        ops = RecordingOps(ops, _run_every(ops, selection))
    meta = torch.device("meta")
    for attention in attentions:
        chosen = dataclasses.replace(
            selection, step=dataclasses.replace(selection.step, attention=attention)
        )
        views = bind_views(None, chosen.layout, meta)
        add_part_views(views)
        transport = listed_transport(chosen, exchange_launcher(selection, launcher), views)
        vocabulary = listed_vocabulary(chosen, views)
        step = make_step(chosen, ops, views, transport, vocabulary=vocabulary)
        for key in chosen.ladder.keys:
            step.run(key)
        stamp(launcher, views["stamps"], 0)
        stamp(launcher, views["stamps"], 1)
        if chosen.source.is_preset:
            random_weights(
                chosen.model, views, seed=0, launch=launcher, ep_size=chosen.step.ep_size
            )
    return launcher


def _run_every(ops: Ops, selection: Selection) -> Hook:
    run = run_every(ops)

    def hook(call: Call) -> None:
        run(call)
        if call.op == "mla_decode":
            run_every_cut(ops, selection.model, call)

    return hook


class _Unmoved:
    """Stands where ranks would share the head: buffers of those shapes, and nothing in them."""

    name, live = "none", ""

    def __init__(self, config: VocabularyConfig, device: torch.device) -> None:
        self.config = config
        dtype = torch_dtype(config.act_dtype)
        self._rows = torch.empty(config.rows, config.hidden, dtype=dtype, device=device)
        self.part = torch.empty(config.rows, config.per, device=device)

    def gather(self, final: torch.Tensor, *, opens_step: bool = False) -> torch.Tensor:
        return self._rows

    def scatter(self, part: torch.Tensor, out: torch.Tensor) -> None:
        """There is nobody."""


class _Unlaunched:
    """Stands where a loaded CUDA kernel would, on a machine that has none."""

    def launch(
        self, grid: tuple[int, ...], values: Sequence[int | float | bytes], stream: int
    ) -> None:
        """CUDA C++ kernels are listed by their module, not by their launches."""


class _UnmadeBuffer:
    """Stands where DeepEP's buffer would: tensors of the shapes that it would give."""

    def __init__(self, config: TransportConfig) -> None:
        self._config = config

    def low_latency_dispatch(self, x: torch.Tensor, *_: Any, use_fp8: bool) -> Any:
        c = self._config
        shape = (c.local_experts, c.world * deepep_capacity(c))
        rows = torch.empty(*shape, c.hidden, dtype=torch_dtype(c.row_dtype), device=x.device)
        counts = x.new_empty(c.local_experts, dtype=torch.int32)
        scales = x.new_empty(*shape, c.groups, dtype=torch.float32)
        return (rows, scales) if use_fp8 else rows, counts, None, None, None

    def low_latency_combine(self, *_: Any, **__: Any) -> None:
        """Writes out, which exists."""

    def get_dispatch_layout(self, *_: Any) -> Any:
        return (None,) * 5

    def dispatch(self, x: Any, *, topk_weights: torch.Tensor, **_: Any) -> Any:
        c = self._config
        parts = x if isinstance(x, tuple) else (x,)
        rows = tuple(part.new_empty(c.recv_rows, part.shape[1]) for part in parts)
        ids = topk_weights.new_empty(c.recv_rows, c.top_k, dtype=torch.int64)
        got = rows if len(rows) > 1 else rows[0]
        return got, ids, topk_weights.new_empty(c.recv_rows, c.top_k), [], None, None

    def combine(self, x: torch.Tensor, _: Any, *, bias: torch.Tensor | None) -> Any:
        return (x[:1] if bias is None else bias), None, None

    def destroy(self) -> None:
        """There is nothing."""


def listed_vocabulary(selection: Selection, views: Mapping[str, torch.Tensor]) -> Vocabulary | None:
    """A shared head that moves nothing and waits for nobody, to list what a step calls."""
    config = vocabulary_config(selection.model, selection.step, selection.ladder.max_rows)
    return None if config is None else _Unmoved(config, views["logits"].device)


def listed_transport(
    selection: Selection, launcher: Launcher, views: Mapping[str, torch.Tensor]
) -> Transport | None:
    """A transport that moves nothing and waits for nobody, to list what a step calls."""
    model, step = selection.model, selection.step
    if model.first_k_dense_replace >= model.num_layers:
        return None
    config = transport_config(model, step, selection.ladder.max_tokens)
    if step.transport == "local":
        return Local(config, launcher)
    if step.transport == "deepep":
        return DeepEpLowLatency(config, views, _UnmadeBuffer(config))
    if step.transport == "deepep-normal":
        return DeepEpNormal(config, views, _UnmadeBuffer(config), launcher)
    buffers = {
        name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
        for _, name, shape, dtype in Rdep.buffers(config)
    }
    kernels = {f"rdep_{part}": _Unlaunched() for part in ("send", "send_quantized", "sum", "pull")}
    return Rdep(config, buffers, kernels, base=0, stride=0, stream=lambda: 0)
