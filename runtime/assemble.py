"""The step put together over bound views, and the list of what a capture of it launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch

from barriers.rdep import Rdep
from barriers.transport import Local, Transport
from graphs.attention import Attention, FlashinferAttention, TritonAttention
from graphs.attention_choice import run_every_cut
from graphs.buffers import StaticBuffers, transport_config
from graphs.calls import Call, Hook, RecordingOps
from graphs.candidates import run_every
from graphs.checkpoint import random_weights
from graphs.choices import ChosenOps, KernelChoices
from graphs.compile import RecordingLauncher
from graphs.devices import bind_views, torch_dtype
from graphs.ops import Ops
from graphs.step import DecodeStep
from graphs.weights import add_part_views, stored_table
from kernels.triton.launch import Launcher
from kernels.triton.overlap import MODES
from kernels.triton.settle import stamp
from runtime.selection import Selection


def make_step(
    selection: Selection,
    ops: Ops,
    views: Mapping[str, torch.Tensor],
    transport: Transport | None,
) -> DecodeStep:
    """The step over bound views; on `meta` views it can be listed but not run."""
    model, step = selection.model, selection.step
    stored = stored_table(model, ep_size=step.ep_size, transport=step.transport)
    names = [*stored, "rope_table"]
    weights = MappingProxyType({name: views[name] for name in names})
    buffers = StaticBuffers(model, step, selection.ladder, views)
    kind = FlashinferAttention if step.attention == "flashinfer" else TritonAttention
    attention: Attention = kind(model, step, ops)
    return DecodeStep(
        model, step, ops, buffers, weights, attention, transport, on_device=selection.on_device
    )


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
        step = make_step(chosen, ops, views, listed_transport(chosen, launcher))
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


class _Unlaunched:
    """Stands where a loaded CUDA kernel would, on a machine that has none."""

    def launch(
        self, grid: tuple[int, ...], values: Sequence[int | float | bytes], stream: int
    ) -> None:
        """CUDA C++ kernels are listed by their module, not by their launches."""


def listed_transport(selection: Selection, launcher: Launcher) -> Transport | None:
    """A transport that moves nothing and waits for nobody, to list what a step calls."""
    model, step = selection.model, selection.step
    if model.first_k_dense_replace >= model.num_layers:
        return None
    config = transport_config(model, step, selection.ladder.max_tokens)
    if step.ep_size == 1:
        return Local(config, launcher)
    buffers = {
        name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
        for _, name, shape, dtype in Rdep.buffers(config)
    }
    kernels = {f"rdep_{part}": _Unlaunched() for part in ("send", "send_quantized", "sum", "pull")}
    return Rdep(config, buffers, kernels, base=0, stride=0, stream=lambda: 0)
