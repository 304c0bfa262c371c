"""A cut head over peer memory without a GPU: its code compiles for both chips without spills, its
launches fit it, and as many ranks as are wanted run it on emulated warps."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from barriers.device_code import cuda_source
from barriers.rdep import TAG
from barriers.vocabulary import VocabularyConfig
from barriers.vocabulary_peers import PARAMS, HeadTuning, VocabularyPeers, compile_head, defines
from barriers.watch import OPERATIONS
from capture_cache.errors import CudaError
from capture_cache.kernel import param_bytes
from capture_cache.nvrtc import nvrtc_version

DEEPSEEK = VocabularyConfig(rank=0, world=8, capacity=64, hidden=7168, vocab=129280)
# The stack that the waits' slow path may take for its calls; the rest lives in registers.
MAX_STACK_BYTES = 16
VARIANTS: dict[str, tuple[VocabularyConfig, HeadTuning]] = {
    "deepseek, 8 ranks": (DEEPSEEK, HeadTuning()),
    "deepseek, 2 ranks": (replace(DEEPSEEK, world=2), HeadTuning()),
    "wide blocks": (DEEPSEEK, HeadTuning(send_threads=896, pull_threads=1024)),
    "fp32, odd vocabulary": (
        replace(DEEPSEEK, world=3, act_dtype="float32", hidden=144, vocab=1003),
        HeadTuning(send_threads=32, pull_threads=32),
    ),
    "ranks without columns": (replace(DEEPSEEK, vocab=130), HeadTuning()),
    "one rank": (replace(DEEPSEEK, world=1), HeadTuning()),
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
    module = compile_head(config, arch, tuning)
    assert set(module.kernels) == set(PARAMS)
    for name, facts in module.kernels.items():
        record_property(f"{name} registers", facts.registers)
        assert facts.local_bytes <= MAX_STACK_BYTES, (name, facts)
        assert facts.registers <= 64, (name, facts)
        assert facts.param_bytes == param_bytes(PARAMS[name]), name


@pytest.mark.usefixtures("nvrtc")
def test_rank_makes_no_difference_to_the_code() -> None:
    first, other = (compile_head(replace(DEEPSEEK, rank=r), "sm_90a") for r in (0, 7))
    assert first.cubin == other.cubin


# -- what is launched ----------------------------------------------------------------------------


class Recorded:
    """A kernel that writes down its launches."""

    def __init__(self, name: str, launches: list[tuple[str, int, tuple[int, ...]]]) -> None:
        self.name, self.launches = name, launches

    def launch(
        self, grid: tuple[int, ...], values: Sequence[int | float | bytes], stream: int
    ) -> None:
        assert len(values) == len(PARAMS[self.name]), self.name
        assert stream == 7
        self.launches.append((self.name, grid[0], tuple(int(v) for v in values)))


def make(
    config: VocabularyConfig, tuning: HeadTuning
) -> tuple[VocabularyPeers, list[tuple[str, int, tuple[int, ...]]], dict[str, torch.Tensor]]:
    buffers = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype))
        for _, name, shape, dtype in VocabularyPeers.buffers(config)
    }
    launches: list[tuple[str, int, tuple[int, ...]]] = []
    kernels = {name: Recorded(name, launches) for name in PARAMS}
    exchange = VocabularyPeers(
        config, buffers, kernels, base=1 << 40, stride=1 << 21, tuning=tuning, stream=lambda: 7
    )
    return exchange, launches, buffers


SMALL = VocabularyConfig(rank=2, world=4, capacity=64, hidden=1024, vocab=10000)  # slices of 2560


def test_a_step_is_two_launches_whatever_the_rows() -> None:
    tuning = HeadTuning(send_threads=64, pull_threads=32, pull_blocks=300, share_blocks=100)
    exchange, launches, buffers = make(SMALL, tuning)
    assert buffers["head_words"].tolist() == [2, 0, 0, 0]
    assert exchange.part is buffers["head_part"]
    for count in (60, 1):
        rows = exchange.gather(torch.zeros(count, 1024).bfloat16(), opens_step=count == 1)
        assert rows is buffers["head_rows"]
        exchange.scatter(exchange.part, torch.zeros(count, 10001)[:, :10000])
    assert [name for name, *_ in launches] == ["head_send", "head_pull"] * 2
    # 1024 bf16 are 128 pieces of 16 bytes; 2560 fp32 are 640, five blocks' worth, of three peers.
    assert [grid for _, grid, _ in launches] == [120, 300, 2, 15]
    (_, _, send), (_, _, pull), (_, _, second), _ = launches
    where = (-1, OPERATIONS.index("head"))
    assert send[5:] == (60, 0, *where, 0), "120 blocks: the last one signals"
    assert second[5:] == (1, TAG // 2, *where, 1)
    assert send[:2] == pull[:2] == (1 << 40, 1 << 21)
    assert pull[4] == 10001, "the pitch"
    assert pull[6:] == (60, -1, OPERATIONS.index("sample"))


def test_what_does_not_fit_is_refused_before_a_launch() -> None:
    exchange, launches, _ = make(SMALL, HeadTuning())
    with pytest.raises(ValueError, match="65 rows do not fit the capacity 64"):
        exchange.gather(torch.zeros(65, 1024).bfloat16())
    with pytest.raises(ValueError, match="begin at a multiple of 16 bytes"):
        exchange.gather(torch.zeros(1025).bfloat16()[1:].view(1, 1024))
    with pytest.raises(ValueError, match="the exchange's own `part`"):
        exchange.scatter(exchange.part.clone(), torch.zeros(1, 10000))
    assert not launches


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"send_threads": 100}, "send_threads must be a multiple of 32 up to 1024, got 100"),
        ({"pull_threads": 2048}, "pull_threads must be a multiple of 32 up to 1024, got 2048"),
        ({"pull_blocks": 0}, "pull_blocks of at least 1"),
        ({"share_blocks": 2000}, "share_blocks of 0 to 1024"),
    ],
)
def test_tuning_refuses(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(HeadTuning(), **change)


def test_constants_are_those_of_the_code() -> None:
    source = cuda_source("head.cu")
    assert "constexpr int kInFlight = 4;" in source, "_IN_FLIGHT of barriers/vocabulary_peers.py"
    for name in defines(SMALL, HeadTuning()):
        assert name.startswith("LOCKSTEP_") or name in source, name
    emulated = (Path(__file__).parent / "emulated_head.cpp").read_text()
    head, sample = OPERATIONS.index("head"), OPERATIONS.index("sample")
    assert f"kHead = {head}, kSample = {sample};" in emulated


# -- the code itself, on emulated warps ----------------------------------------------------------

EMULATED = {
    "one rank": VocabularyConfig(rank=0, world=1, capacity=3, hidden=16, vocab=200),
    "two ranks, two parts a slice": VocabularyConfig(0, 2, capacity=4, hidden=16, vocab=1800),
    "three ranks, odd vocabulary": VocabularyConfig(0, 3, capacity=5, hidden=272, vocab=1003),
    "four ranks, two without columns": VocabularyConfig(0, 4, capacity=2, hidden=32, vocab=130),
    "eight ranks": VocabularyConfig(0, 8, capacity=3, hidden=16, vocab=1500),
}
EMULATED_STEPS = 40


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("name", EMULATED)
def test_device_code_on_emulated_warps(name: str, tmp_path: Path) -> None:
    """cuda/head.cu as it is, a block as a thread; emulated_head.cpp says what is checked."""
    here, binary = Path(__file__).parent, tmp_path / "emulated_head"
    constants = defines(EMULATED[name], HeadTuning(send_threads=32, pull_threads=32))
    build = ["g++", "-std=c++17", "-O1", "-pthread", "-Wno-unknown-pragmas", "-o", str(binary)]
    build += [f"-D{name}={value}" for name, value in constants.items()]
    include = here.parents[1] / "barriers" / "cuda"
    subprocess.run([*build, f"-I{include}", str(here / "emulated_head.cpp")], check=True)
    steps = str(EMULATED_STEPS)
    done = subprocess.run([binary, steps], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
