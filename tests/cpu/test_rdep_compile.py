"""`rdep` without a GPU: its code compiles for both chips without spills; its launches fit it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from barriers.rdep import PARAMS, TAG, Rdep, RdepTuning, compile_rdep
from barriers.transport import TransportConfig
from capture_cache.errors import CudaError
from capture_cache.kernel import param_bytes
from capture_cache.nvrtc import nvrtc_version

DEEPSEEK = TransportConfig(
    rank=0, world=4, capacity=544, hidden=7168, num_experts=256, top_k=8, fp8=True
)
# The stack that the waits' slow path may take for its calls; the rest lives in registers.
MAX_STACK_BYTES = 16
VARIANTS: dict[str, tuple[TransportConfig, RdepTuning]] = {
    "deepseek, 4 ranks": (DEEPSEEK, RdepTuning()),
    "deepseek, 8 ranks": (replace(DEEPSEEK, world=8), RdepTuning()),
    "wide blocks": (DEEPSEEK, RdepTuning(send_threads=448, sum_threads=448, pull_threads=448)),
    "bulk pull": (replace(DEEPSEEK, world=8), RdepTuning(bulk_pull=True)),
    "plain bf16": (replace(DEEPSEEK, fp8=False), RdepTuning()),
    "fp32, odd width": (
        replace(DEEPSEEK, world=2, fp8=False, act_dtype="float32", hidden=144, top_k=16),
        RdepTuning(send_threads=32, sum_threads=32, pull_threads=32),
    ),
    "fp16, one rank": (replace(DEEPSEEK, world=1, act_dtype="float16", hidden=144), RdepTuning()),
}


@pytest.fixture(scope="module")
def nvrtc() -> None:
    try:
        nvrtc_version()
    except CudaError as e:
        pytest.skip(f"no NVRTC here: {e}")


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_compiles_without_spills(
    variant: str, arch: str, record_property: Callable[[str, object], None]
) -> None:
    config, tuning = VARIANTS[variant]
    module = compile_rdep(config, arch, tuning)
    expected = {n for n in PARAMS if config.fp8 or n != "rdep_send_quantized"}
    assert set(module.kernels) == expected
    for name, facts in module.kernels.items():
        record_property(f"{name} registers", facts.registers)
        assert facts.local_bytes <= MAX_STACK_BYTES, (name, facts)
        assert facts.registers <= 64, (name, facts)
        assert facts.static_shared_bytes <= 48 << 10, (name, facts)
        assert facts.param_bytes == param_bytes(PARAMS[name]), name


@pytest.mark.usefixtures("nvrtc")
def test_rank_makes_no_difference_to_the_code() -> None:
    first, other = (compile_rdep(replace(DEEPSEEK, rank=r), "sm_90a") for r in (0, 3))
    assert first.cubin == other.cubin


# -- what is launched ----------------------------------------------------------------------------


class Recorder:
    """Kernels that write down their launches."""

    def __init__(self, names: Mapping[str, tuple[str, ...]]) -> None:
        self.launches: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.kernels = {name: _Recorded(self, name) for name in names}


class _Recorded:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def launch(
        self, grid: tuple[int, ...], values: Sequence[int | float | bytes], stream: int
    ) -> None:
        assert len(values) == len(PARAMS[self.name]), self.name
        assert stream == 7
        numbers = tuple(int(v) for v in values)
        self.recorder.launches.append((self.name, grid, numbers))


def make(
    config: TransportConfig, tuning: RdepTuning
) -> tuple[Rdep, Recorder, dict[str, torch.Tensor]]:
    buffers = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype))
        for _, name, shape, dtype in Rdep.buffers(config)
    }
    recorder = Recorder(PARAMS)
    transport = Rdep(
        config,
        buffers,
        recorder.kernels,
        base=1 << 40,
        stride=1 << 21,
        tuning=tuning,
        stream=lambda: 7,
    )
    return transport, recorder, buffers


def run_layer(transport: Rdep, tokens: int) -> None:
    config = transport.config
    x = torch.zeros(tokens, config.hidden, dtype=torch.bfloat16)
    ids = torch.full((tokens, config.top_k), -1, dtype=torch.int32)
    weights = torch.zeros(tokens, config.top_k)
    received = transport.dispatch(x, None, ids, weights, layer=5, opens_step=True)
    y = torch.zeros(config.recv_rows * config.top_k, config.hidden, dtype=torch.bfloat16)
    transport.combine(torch.empty_like(x), y, received, ids, x, layer=5)


SMALL = TransportConfig(rank=2, world=4, capacity=64, hidden=1024, num_experts=8, top_k=2, fp8=True)


def test_a_layer_is_three_launches_whatever_the_tokens() -> None:
    tuning = RdepTuning(send_threads=32, pull_threads=64, sum_blocks=200, share_blocks=100)
    transport, recorder, buffers = make(SMALL, tuning)
    assert buffers["ep_words"].tolist() == [2, 0, 0, 0]
    run_layer(transport, 60)
    run_layer(transport, 1)
    names = ["rdep_send_quantized", "rdep_sum", "rdep_pull"]
    assert [n for n, _, _ in recorder.launches] == names * 2
    grids = [g for _, g, _ in recorder.launches]
    # 1024 e4m3 are 64 pieces of 16 bytes, 1024 bf16 are 128.
    assert grids == [(120,), (200,), (120,), (2,), (200,), (2,)]
    send = dict(zip(("tokens", "share", "layer"), recorder.launches[0][2][12:15], strict=True))
    assert send == {"tokens": 60, "share": 0, "layer": 5}  # 120 blocks: the last one signals
    assert recorder.launches[3][2][12:14] == (1, TAG // 2)


@pytest.mark.parametrize("blocks", [1, 2, 7, 132, 1000, TAG])
def test_shares_of_a_grid_add_up_to_the_tag(blocks: int) -> None:
    share = RdepTuning(share_blocks=TAG).share(blocks)
    first = TAG - share * (blocks - 1)  # as signal_share has it
    assert share >= 1
    assert first >= share


def test_no_token_at_all_is_refused() -> None:
    transport, _, _ = make(SMALL, RdepTuning())
    with pytest.raises(ValueError, match="at least one token, got none"):
        run_layer(transport, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"send_threads": 100}, "send_threads must be a multiple of 32 up to 1024, got 100"),
        ({"bulk_pull": True, "pull_threads": 448}, "at most 256 pull_threads, got 448"),
        ({"share_blocks": 2000}, "share_blocks of 0 to 1024"),
    ],
)
def test_tuning_refuses(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RdepTuning(), **change)
