"""Our own MLA kernel without a GPU: its code, its place in the listing, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from capture_cache.errors import CudaError
from capture_cache.nvrtc import nvrtc_version
from capture_cache.store import Store
from graphs.attention_choice import AttentionCut, example, run_every_cut
from graphs.compile import KernelCompiler, RecordingLauncher, compile_all
from graphs.flashinfer_mla import FlashinferMla
from graphs.hopper_mla import HopperMla
from graphs.model_config import ModelConfig, parse_overrides
from graphs.ops import Ops
from graphs.presets import PRESETS
from graphs.step_config import StepConfig
from kernels.cuda.mla_decode import HOPPER_MLA, hopper_mla
from kernels.cuda.source import CudaKernel, cuda_headers
from kernels.triton.launch import Arg
from kernels.triton.mla_plan import PlanLayout
from runtime.config import RuntimeConfig
from runtime.selection import _attention, _fastest

META = torch.device("meta")


class _CudaOnly(RecordingLauncher):
    """Lists CUDA C++; Triton's kernels are interpreted in this process."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Arg, **options: Any) -> None:
        if isinstance(kernel, CudaKernel):
            super().__call__(kernel, grid, *args, **options)


@pytest.fixture(scope="module")
def nvrtc() -> None:
    try:
        nvrtc_version()
    except CudaError as e:
        pytest.skip(f"no NVRTC here: {e}")


def _model(*overrides: str) -> ModelConfig:
    return ModelConfig.from_hf(
        PRESETS["deepseek-v3"], layers=4, overrides=parse_overrides(overrides)
    )


def _listed(model: ModelConfig, cuts: tuple[int, ...], page_size: int = 64) -> RecordingLauncher:
    launcher = _CudaOnly("sm_90", pdl=1)
    step = StepConfig(max_rows=8, max_seq_len=4096, num_pages=2, page_size=page_size)
    for tokens in (1, 8):
        call = example(model, step, tokens, 100, META, 1)[0]
        for cut in cuts:
            AttentionCut("hopper", cut).bind(Ops(launcher), model, call)()
    return launcher


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("heads", [64, 128])
def test_it_compiles_once_and_without_spills(heads: int, tmp_path: Path) -> None:
    listed = _listed(_model(f"num_attention_heads={heads}"), (1024, 2048))
    requests = [r for r in listed.requests if r.spec.is_cuda]
    assert len(requests) == 1  # neither tokens nor cut make other code
    (row,) = compile_all(requests, KernelCompiler(Store(tmp_path), "sm_90"))
    assert (row.name, row.spill_bytes, row.local_bytes) == ("HOPPER_MLA", 0, 0)
    assert row.registers * row.num_warps * 32 <= 65536
    compiler = KernelCompiler(Store(tmp_path), "sm_90")
    found = compiler.compile(requests[0].spec, requests[0].resolve(), {})
    assert compiler.compiled == 0
    assert found.num_ctas == heads // 64
    assert [m.block for m in found.tensor_maps] == [
        (64, 64),
        (64 // found.num_ctas, 64),
        (16, 64),
        (16, 64),
    ]


def test_it_overlaps_and_every_role_waits_before_it_reads_what_a_step_writes() -> None:
    """But for the hint `warm`; CUDA C++ is not among what `test_overlap` compiles."""
    (request,) = [r for r in _listed(_model(), (1024,)).requests if r.spec.is_cuda]
    assert request.spec.pdl
    source = HOPPER_MLA.source()
    for role in ("loads", "scores", "values"):
        body = source.split(f" void {role}(Shared sh, const Params& p", 1)[1].split("\n}\n", 1)[0]
        before, waits, after = body.partition("await_inputs();")
        assert waits, role
        assert "own_items(p)" in after, role
        assert not re.search(r"own_items|load_group|load_query|__ld|\bp\.\w+\[", before), role
    assert source.count("warm(p, ") == 1


def test_it_is_listed_among_every_cut() -> None:
    model = _model()
    step = StepConfig(max_rows=8, max_seq_len=4096, num_pages=2)
    call = example(model, step, 8, 100, META, 1)[0]
    for arch, wanted in (("sm_90", True), ("sm_100", False)):
        launcher = _CudaOnly(arch, pdl=1)
        run_every_cut(Ops(launcher), model, call)
        assert any(r.spec.is_cuda for r in launcher.requests) is wanted


@pytest.mark.parametrize(
    ("overrides", "page_size", "message"),
    [
        ([], 32, "pages of 64 tokens, not 32"),
        (["num_attention_heads=32"], 64, "64 or 128 heads, not 32"),
        (["kv_lora_rank=256"], 64, "a latent of 512"),
    ],
)
def test_what_it_does_not_take_is_said(overrides: list[str], page_size: int, message: str) -> None:
    assert message in HopperMla.unfit_here(_model(*overrides), page_size)


def test_other_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="takes pages of 64 tokens, got 32; use --page-size 64"):
        HopperMla(num_heads=128, page_size=32, softmax_scale=1.0, cut=1024)


def test_buffers_of_another_step_are_refused() -> None:
    def made(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=META)

    layout = PlanLayout(2, 1, 128, 132)
    with pytest.raises(ValueError, match="must be for 2 tokens of 128 heads"):
        hopper_mla(
            RecordingLauncher(),
            made(2, 128, 576),
            made(64, 576),
            torch.zeros((2, 1), dtype=torch.int32),
            softmax_scale=1.0,
            layout=layout,
            ws=torch.zeros(layout.words, dtype=torch.int32),
            out=made(3, 128, 512),
            part_o=made(2, 1, 128, 512),
            part_lse=torch.zeros((2, 1, 128)),
        )


def test_its_headers_are_part_of_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed header must not find code that was compiled before."""
    before = HOPPER_MLA.source_hash()
    assert before == HOPPER_MLA.source_hash()
    changed = {name: f"{text}\n" for name, text in cuda_headers().items()}
    monkeypatch.setattr("kernels.cuda.source.cuda_headers", lambda: changed)
    assert HOPPER_MLA.source_hash() != before


@pytest.mark.parametrize(
    ("able", "taken"),
    [
        (("hopper", "flashinfer"), "hopper"),
        (("flashinfer",), "flashinfer"),
        ((), "triton"),
    ],
)
def test_auto_takes_the_fastest_that_can_run(
    able: tuple[str, ...], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, kind in (("hopper", HopperMla), ("flashinfer", FlashinferMla)):
        answer = (name in able, f"{name}'s reason")
        monkeypatch.setattr(kind, "available", staticmethod(lambda *_, answer=answer: answer))
    backend, reason = _fastest(_model(), 64)
    assert backend == taken
    assert ("hopper's reason" in reason) == (taken != "flashinfer")


def test_asking_for_it_where_it_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RuntimeConfig.of(model="deepseek-v3", layers=4, attention="hopper")
    monkeypatch.setattr(HopperMla, "available", staticmethod(lambda *_: (False, "too few heads")))
    with pytest.raises(ValueError, match="--attention hopper cannot be used here: too few heads"):
        _attention(options, _model(), True)
