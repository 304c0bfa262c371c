"""Arena, compiler, loader and launches on a real device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

from capture_cache.arena import ARENA_BASE, DeviceArena
from capture_cache.driver import Device, driver_version, graph_nodes, memory_info, wait_stream
from capture_cache.errors import ArenaError, CaptureError, CudaError
from capture_cache.kernel import TensorMapSpec
from capture_cache.launch import LoadedKernel, encode_tensor_map
from capture_cache.layout import ITEM_BYTES, ArenaLayout, Entry
from capture_cache.store import Store
from graphs.aot import AotLauncher
from graphs.compile import KernelCompiler
from graphs.devices import bind_views, torch_dtype
from kernels.triton.launch import JitLauncher, Launcher, TensorMap
from tests.cpu.aot_kernels import gemm_nt, scale_add, tl

ENTRIES = [
    *(Entry("weights", f"w.{name}", (129, 257), name) for name in ITEM_BYTES),
    Entry("kv", "a", (64, 512), "float8_e4m3fn"),
    Entry("kv", "w", (256, 512), "float8_e4m3fn"),
    Entry("scratch", "out", (64, 256), "float32"),
    Entry("scratch", "x", (1000,), "float32"),
    Entry("scratch", "y", (1000,), "bfloat16"),
    Entry("ring", "inbox", (1000,), "float32"),
    Entry("ring", "outbox", (1000,), "bfloat16"),
]


@pytest.fixture
def views() -> Any:
    layout = ArenaLayout.build(ENTRIES)
    arena = DeviceArena(layout)
    bound = bind_views(arena, layout, "cuda")
    for view in bound.values():
        view.zero_()
    yield bound
    torch.cuda.synchronize()
    arena.close()
    arena.close()


@pytest.fixture
def launcher(tmp_path: Path) -> AotLauncher:
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return AotLauncher(KernelCompiler(Store(tmp_path), arch), num_sms=132)


def _step(launch: Launcher, v: dict[str, torch.Tensor]) -> None:
    launch(scale_add, (1,), v["x"], v["y"], 1000, 0.5, True, pdl=True, BLOCK=1024, OUT=tl.bfloat16)
    maps = TensorMap(v["a"], (64, 128)), TensorMap(v["w"], (128, 128))
    launch(gemm_nt, (1, 2), *maps, v["out"], 256, 512, BM=64, BN=128, BK=128)


def _fill(v: dict[str, torch.Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    v["x"].normal_()
    for name in ("a", "w"):
        v[name].copy_(torch.randn(v[name].shape, device="cuda").to(torch.float8_e4m3fn))


def test_views_are_separate_and_typed(views: dict[str, torch.Tensor]) -> None:
    assert views["w.bool"].data_ptr() == ARENA_BASE or views["w.bool"].data_ptr() % (2 << 20) == 0
    for entry in ENTRIES:
        view = views[entry.name]
        assert (tuple(view.shape), view.dtype) == (entry.shape, torch_dtype(entry.dtype))
        assert not view.view(torch.uint8).any()
        view.view(torch.uint8).fill_(1)
        torch.cuda.synchronize()
        others = [o for n, o in views.items() if n != entry.name]
        assert not any(bool(o.view(torch.uint8).any()) for o in others), entry.name
        view.view(torch.uint8).fill_(0)


def test_results_are_those_of_tritons_own_launcher(
    views: dict[str, torch.Tensor], launcher: AotLauncher
) -> None:
    _fill(views, 1)
    _step(launcher, views)
    torch.cuda.synchronize()
    ours = views["out"].clone(), views["y"].clone()
    expected = views["a"].float() @ views["w"].float().T
    torch.testing.assert_close(ours[0], expected, rtol=1e-2, atol=0.1)  # the product is TF32
    views["out"].zero_()
    views["y"].zero_()
    _step(JitLauncher(), views)
    assert torch.equal(views["out"], ours[0])
    assert torch.equal(views["y"], ours[1])


def test_kernels_see_pinned_memory(views: dict[str, torch.Tensor], launcher: AotLauncher) -> None:
    assert views["inbox"].device.type == "cpu"
    views["inbox"].copy_(torch.arange(1000.0))
    launcher(
        scale_add, (1,), views["inbox"], views["outbox"], 1000, 2.0, False,
        BLOCK=1024, OUT=tl.bfloat16,
    )  # fmt: skip
    torch.cuda.synchronize()
    assert torch.equal(views["outbox"], (torch.arange(1000.0) * 2).to(torch.bfloat16))


def test_captured_replay_follows_its_inputs(
    views: dict[str, torch.Tensor], launcher: AotLauncher
) -> None:
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.stream(stream):
        _fill(views, 2)
        _step(launcher, views)
        launcher.freeze()
        graph.capture_begin(capture_error_mode="thread_local")
        _step(launcher, views)
        with pytest.raises(CaptureError, match="num_warps 4 → 8"):
            launcher(
                scale_add, (1,), views["x"], views["y"], 1000, 0.5, True, pdl=True, num_warps=8,
                BLOCK=1024, OUT=tl.bfloat16,
            )  # fmt: skip
        graph.capture_end()
        graph.instantiate()
        assert graph_nodes(graph.raw_cuda_graph()) == {"kernel": 2}
        _fill(views, 3)
        graph.replay()
        wait_stream(stream.cuda_stream, 10.0, "a replay")
        replayed = views["out"].clone(), views["y"].clone()
        _step(launcher, views)
        stream.synchronize()
    assert torch.equal(views["out"], replayed[0])
    assert torch.equal(views["y"], replayed[1])


def test_stored_resources_are_the_drivers(
    views: dict[str, torch.Tensor], launcher: AotLauncher
) -> None:
    _step(launcher, views)
    device = Device(torch.cuda.current_device())
    for kernel in launcher.kernels.values():
        loaded = LoadedKernel(device, kernel)
        found = loaded.resources()
        assert (found["registers"], found["local_bytes"]) == (kernel.registers, kernel.local_bytes)
        loaded.close()
        loaded.close()


@pytest.mark.parametrize(
    ("dtype", "elem", "size"),
    [
        (torch.float8_e4m3fn, 0, 1),
        (torch.bfloat16, 9, 2),
        (torch.float16, 6, 2),
        (torch.float32, 7, 4),
    ],
)
@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_tensor_maps_are_tritons_bit_for_bit(
    dtype: torch.dtype, elem: int, size: int, swizzle: int
) -> None:
    import ctypes

    from triton.runtime import driver

    x = torch.zeros(100, 512, dtype=torch.uint8, device="cuda").view(dtype)
    cols = {0: 128, 1: 32, 2: 64, 3: 128}[swizzle] // size
    theirs = driver.active.utils.fill_tma_descriptor(
        x.data_ptr(), swizzle, size, elem, [64, cols], list(x.shape), list(x.stride()), 0
    )
    base = id(theirs)
    first = -(-(base + 16) // 128) * 128  # the object's header, then its 128-aligned map
    ours = encode_tensor_map(
        TensorMapSpec(elem, size, swizzle, (64, cols)), x.data_ptr(), tuple(x.shape), x.stride(0)
    )
    assert ctypes.string_at(first, 128) == ours


def test_too_large_an_arena_is_refused_and_costs_nothing() -> None:
    torch.cuda.init()
    Device(0)
    before = memory_info()[0]
    with pytest.raises(ArenaError, match=r"free: kv .*--num-pages"):
        DeviceArena(ArenaLayout.build([Entry("kv", "kv", (1 << 40,), "uint8")]))
    assert memory_info()[0] == before


def test_an_exact_address_is_kept_by_one_arena_at_a_time() -> None:
    layout = ArenaLayout.build(ENTRIES)
    base = ARENA_BASE + (256 << 30)  # the module's own arena lies at ARENA_BASE
    one = DeviceArena(layout, base=base, exact=True)
    assert one.base == base
    with pytest.raises((ArenaError, CudaError)):
        DeviceArena(layout, base=base, exact=True)
    other = DeviceArena(layout, base=base)
    assert other.base != one.base
    other.close()
    one.close()
    DeviceArena(layout, base=base, exact=True).close()


def test_driver_version_has_two_parts() -> None:
    release, cuda_version = driver_version().split(" (CUDA ")
    assert "." in release
    assert "." in cuda_version
