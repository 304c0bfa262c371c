"""The shared expert beside the exchange: what is launched where, how, and when it may run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from barriers.rdep import Rdep
from graphs.branch import InLine
from graphs.buffers import transport_config
from graphs.devices import bind_views, torch_dtype
from graphs.ops import Ops
from graphs.weights import add_part_views
from kernels.triton.launch import Launcher
from kernels.triton.overlap import EARLY
from runtime.assemble import make_step
from runtime.config import RuntimeConfig
from runtime.selection import Selection, choose
from tests.cpu.twins import load_micro
from tests.serving import Answer, make_requests, serve


class Journal:
    """Notes every launch as (name, dependent), and what the branch and the exchange do."""

    arch, num_sms, pdl = "sm_90", 132, EARLY

    def __init__(self) -> None:
        self.lines: list[tuple[str, bool]] = []

    def __call__(self, kernel: Any, *args: Any, pdl: bool = False, **options: Any) -> None:
        self.lines.append((kernel.__name__, pdl))

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.lines.append(("fork", False))
        yield
        self.lines.append(("end", False))

    def join(self) -> None:
        self.lines.append(("join", False))


class Noted:
    """Stands where a kernel of the exchange would."""

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal, self._name = journal, name

    def launch(self, *_: object) -> None:
        self._journal.lines.append((self._name, False))


def select(**options: Any) -> Selection:
    bs = 2 * options.get("ep_size", 1)
    common = {"model": "tiny", "bs": bs, "max_seq_len": 256, "ladder": "2", "layers": 3}
    return choose(RuntimeConfig.of(**(common | options)), compile_only=True)


def launches(selection: Selection) -> list[tuple[str, bool]]:
    """Of one step on `meta` tensors."""
    journal, views = Journal(), bind_views(None, selection.layout, torch.device("meta"))
    add_part_views(views)
    config = transport_config(selection.model, selection.step, selection.ladder.max_tokens)
    buffers = {
        name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
        for _, name, shape, dtype in Rdep.buffers(config)
    }
    names = ("rdep_send", "rdep_send_quantized", "rdep_sum", "rdep_pull")
    kernels = {name: Noted(journal, name) for name in names}
    transport = Rdep(config, buffers, kernels, base=0, stride=0, stream=lambda: 0)
    step = make_step(selection, Ops(journal), views, transport, journal)
    step.run(selection.ladder.keys[0])
    return journal.lines


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_the_shared_expert_is_forked_before_dispatch_and_joined_before_combine(
    quantization: str,
) -> None:
    overrides = () if quantization == "none" else ("quantization=fp8",)
    selection = select(ep_size=2, overrides=overrides)
    lines = launches(selection)
    names = [name for name, _ in lines]
    layers = selection.model.num_layers - selection.model.first_k_dense_replace
    assert names.count("fork") == names.count("join") == layers > 0
    at = 0
    for _ in range(layers):
        fork = names.index("fork", at)
        end, at = names.index("end", fork), names.index("join", fork)
        assert names[end + 1].startswith("rdep_send")
        assert names[at + 1] == "rdep_sum"
        inside = lines[fork + 1 : end]
        assert len(inside) >= 3
        assert not any(dependent for _, dependent in inside), inside
        assert all(dependent for name, dependent in lines[end + 2 : at]), "experts still overlap"
    assert "fork" not in [name for name, _ in launches(select(ep_size=2, overlap=False))]


class Late:
    """A branch and its operations that run when they are joined, as late as they may."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []
        self.joined = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        op = getattr(Ops(None), name)
        return lambda *args, **options: self._waiting.append(lambda: op(*args, **options))

    def beside(self) -> Any:
        return InLine().beside()

    def join(self) -> None:
        assert self._waiting
        for run in self._waiting:
            run()
        self._waiting.clear()
        self.joined += 1


def answers(checkpoint: Path, late: Late | None = None, **options: Any) -> list[Answer]:
    requests = make_requests(np.random.default_rng(3), (1, 5, 9, 12), 64, [6, 9])
    with load_micro(checkpoint, transport="allgather", **options) as runtime:
        step = runtime.engine.graphs.step
        if late is not None:
            step._branch = late
            step._beside = late  # type: ignore[assignment]
        return serve(runtime, requests)


def test_it_may_run_at_any_time_between_fork_and_join(checkpoint: Path) -> None:
    """Nothing between reads or writes what the branch does: the bits stay."""
    late = Late()
    plain, beside = answers(checkpoint, overlap=False), answers(checkpoint, overlap=True)
    assert [a.bits for a in beside] == [a.bits for a in plain]
    assert [a.bits for a in answers(checkpoint, late)] == [a.bits for a in plain]
    assert late.joined > 0


def test_overlap_is_settled_before_capture() -> None:
    assert select(ep_size=2).step.overlap
    assert not select(ep_size=2, overlap=False).step.overlap
    assert not select().step.overlap
    with pytest.raises(ValueError, match="--overlap runs a shared expert beside an exchange"):
        select(overlap=True)
    assert "shared_workspace" in {p.entry.name for p in select(ep_size=2).layout.places}
    assert "shared_workspace" not in {p.entry.name for p in select().layout.places}


def test_ordinary_launches_never_overlap() -> None:
    journal = Journal()
    ordinary: Launcher | None = Ops(journal).ordinary().launch
    assert ordinary is not None
    assert (ordinary.pdl, ordinary.arch, ordinary.num_sms) == (0, journal.arch, journal.num_sms)
