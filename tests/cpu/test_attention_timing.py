"""What a choice of attention is timed by: the launches of a step, each over its own data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from graphs.attention_choice import AttentionCut, choose_attention
from graphs.attention_timing import LayerTimes, bind_layers, copies_for, example
from graphs.devices import bind_views
from graphs.keys import GraphKey
from graphs.model_config import ModelConfig
from graphs.ops import Ops
from graphs.step_config import StepConfig
from graphs.timing import HostTimer, Run, Timing
from graphs.weights import add_part_views
from kernels.triton.launch import Arg
from runtime.assemble import make_step
from runtime.config import RuntimeConfig
from runtime.selection import Selection, choose

META = torch.device("meta")
CPU = torch.device("cpu")
Launch = tuple[str, tuple[int, ...], tuple[tuple[str, str], ...]]


class _Noted:
    """Launches nothing, and says what it was to launch."""

    arch, num_sms, pdl = "sm_90", 132, 1

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Arg, **options: Any) -> None:
        sizes = tuple(sorted((name, str(value)) for name, value in options.items()))
        self.launches.append((kernel.__name__, grid, sizes))

    def taken(self) -> list[Launch]:
        """What was launched since it was last asked."""
        found, self.launches = self.launches, []
        return found


def _selection(model: str = "deepseek-v3", **options: Any) -> Selection:
    given: dict[str, Any] = {"bs": 64, "layers": 2, "max_seq_len": 4096, "num_pages": 3} | options
    return choose(RuntimeConfig.of(model=model, device="cpu", **given), compile_only=True)


def _layer(choice: AttentionCut, model: ModelConfig, step: StepConfig, rows: int) -> list[Launch]:
    """Launches of one layer as they are timed, after those that plan."""
    noted = _Noted()
    calls = example(model, step, rows, 2000, META, 1)
    (run,) = bind_layers(choice, Ops(noted), model, step, calls)
    noted.taken()
    run()
    return noted.taken()


# ------------------------------------------------------------------ what is timed


@pytest.mark.parametrize("quantization", ["fp8", "none"])
@pytest.mark.parametrize(
    ("choice", "rows", "merges"),
    [
        (AttentionCut("hopper", 128), 1, False),
        (AttentionCut("hopper", 320), 8, False),
        (AttentionCut("hopper", 512), 32, True),
        (AttentionCut("hopper", 1088), 32, False),
        (AttentionCut("hopper", 4096), 64, False),
        (AttentionCut("triton", 256), 8, True),
    ],
    ids=str,
)
def test_a_layer_is_timed_as_a_step_has_it(
    choice: AttentionCut, rows: int, merges: bool, quantization: str
) -> None:
    selection = _selection(overrides=(f"quantization={quantization}",))
    timed = _layer(choice, selection.model, selection.step, rows)
    assert ("_merge" in [name for name, _, _ in timed]) is merges
    step = dataclasses.replace(selection.step, attention=choice.backend, cut=choice.cut)
    selection = dataclasses.replace(selection, step=step)
    views = bind_views(None, selection.layout, META)
    add_part_views(views)
    noted = _Noted()
    captured = make_step(selection, Ops(noted), views, None)
    captured.run(GraphKey(rows, rows))
    launches = noted.taken()
    found = [i for i in range(len(launches)) if launches[i : i + len(timed)] == timed]
    assert len(found) == selection.model.num_layers


def test_layers_share_scratch_and_nothing_that_they_read() -> None:
    selection = _selection("tiny", bs=2, layers=None, max_seq_len=256, num_pages=None)
    model, step = selection.model, selection.step
    seen: list[tuple[torch.Tensor, ...]] = []

    class Watched(Ops):
        """Notes what the products by W_UV read and write."""

        def __init__(self) -> None:
            super().__init__(None)
            self.absorb_v = lambda o, _, w, **outs: seen.append((o, w, outs["out"]))

    calls = example(model, step, 2, 130, CPU, 3)
    for run in bind_layers(AttentionCut("triton", 128), Watched(), model, step, calls):
        run()
    o, w, out = ({t.data_ptr() for t in tensors} for tensors in zip(*seen, strict=True))
    assert (len(o), len(w), len(out)) == (1, 3, 1)
    used = [c.args[2][c.args[3].long(), :3].flatten().tolist() for c in calls]
    pages = list(itertools.chain(*used))
    assert len(set(pages)) == len(pages) == 18
    assert 0 not in pages
    assert max(pages) * step.page_size < calls[0].args[1].shape[0]


def test_copies_pass_the_cache() -> None:
    model = _selection().model
    layer = 2000 * 576 * 2 + 128 * 128 * 512 * 2
    for cache_bytes in (0, 50 << 20, 200 << 20):
        copies = copies_for(model, 1, 2000, cache_bytes)
        assert copies * layer >= 2 * cache_bytes
        assert copies == 1 or (copies - 1) * layer < 2 * cache_bytes
    assert copies_for(model, 1, 2000, 1 << 40) == 32


def test_the_twin_runs_what_is_timed() -> None:
    selection = _selection("tiny", bs=2, layers=None, max_seq_len=256, num_pages=None)
    times = LayerTimes(
        *(Ops(None), selection.model, selection.step, HostTimer()), device=CPU, cache_bytes=0
    )
    assert times(AttentionCut("triton", 128), 2, 130) > 0


# ------------------------------------------------------------------ what is chosen


class _Priced:
    """A timer that adds up what each launch costs, by the kernel's name."""

    def __init__(self, noted: _Noted, prices: dict[str, float]) -> None:
        self._noted, self._prices = noted, prices

    def __call__(self, calls: Sequence[Run]) -> Timing:
        self._noted.taken()  # the plan, made once a step
        for call in calls:
            call()
        us = sum(self._prices[name] for name, _, _ in self._noted.taken()) / len(calls)
        return Timing(us, us, us, 1)


def _chosen(merge_us: float, attention_us: dict[int, float]) -> AttentionCut:
    """The choice for 8 rows among cuts 1024 (the default) and 128; 13 splits at the latter."""
    selection, noted = _selection(bs=8, max_seq_len=1664), _Noted()

    def measure(choice: AttentionCut, rows: int, context: int) -> float:
        prices = {"hopper_mla": attention_us[choice.cut], "_merge": merge_us}
        timer = _Priced(noted, prices | {"_absorb_v_few": 7.0})
        sizes = (Ops(noted), selection.model, selection.step, timer)
        return LayerTimes(*sizes, device=META, cache_bytes=50 << 20)(choice, rows, context)

    cuts = [AttentionCut("hopper", cut) for cut in (1024, 128)]
    return choose_attention(cuts, [(8, 1600)], measure)[0]


def test_a_merge_that_a_step_does_not_launch_costs_nothing() -> None:
    """With a merge of its own the shorter cut would take 32 us, and be refused."""
    assert _chosen(10.0, {1024: 20.0, 128: 15.0}).cut == 128


def test_what_absorb_v_takes_counts() -> None:
    """Attention alone is faster by 4 %, the layer is not."""
    assert _chosen(0.0, {1024: 20.0, 128: 19.2}).cut == 1024
