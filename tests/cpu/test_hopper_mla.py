"""Our own MLA kernel without a GPU: its code, its place in the listing, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from capture_cache.errors import CudaError
from capture_cache.nvrtc import nvrtc_version
from capture_cache.store import Store
from graphs.attention_choice import AttentionCut, run_every_cut
from graphs.attention_timing import example
from graphs.compile import KernelCompiler, RecordingLauncher, compile_all
from graphs.cuda_compile import compile_cuda_kernel
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
from tests.cpu.sass import Sass

META = torch.device("meta")
# griddepcontrol.wait, .launch_dependents, mbarrier.try_wait and ld.global.cg, as machine code.
WAIT, RELEASE, LOOK, HINT = "ACQBULK", "PREEXIT", "SYNCS.PHASECHK", "LDG.E.STRONG.GPU"
# Whatever reads or writes global memory, but for requests that only bring it to L2.
TOUCHES = (
    *("LD", "LDG", "LDGSTS", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG"),
    *("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED"),
)


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


@pytest.fixture(scope="module", params=[64, 128])
def code(nvrtc: None, request: pytest.FixtureRequest) -> Sass:
    """Its machine code; CUDA C++ is not among what `test_overlap` compiles."""
    model = _model(f"num_attention_heads={request.param}")
    (listed,) = [r for r in _listed(model, (1024,)).requests if r.spec.is_cuda]
    assert listed.spec.pdl
    return Sass.of(compile_cuda_kernel(listed.spec, HOPPER_MLA, 90).cubin)


def test_every_role_waits_before_it_touches_what_a_step_writes(code: Sass) -> None:
    waits = code.at(WAIT)
    assert len(waits) == 3  # of one role each
    assert len(code.at(*TOUCHES)) > 20
    assert not _touched_early(code)
    hints = code.reached_without(WAIT) & {*code.at(HINT)}
    assert hints, "`warm` is gone"
    for missing in waits:
        assert _touched_early(code, missing), "a wait that is not there would not be seen"


def test_it_lets_the_next_kernel_start_once_it_has_waited(code: Sass) -> None:
    """Not before: whoever comes next counts on what came before us, too."""
    assert len(code.at(RELEASE)) == 1
    assert not code.reached_without(WAIT) & {*code.at(RELEASE)}


def test_no_wait_on_the_copy_engine_is_without_end(code: Sass) -> None:
    """Every loop that looks at a barrier counts its turns, and traps."""
    loops = _polling_loops(code)
    assert len(loops) > 20
    for first, last in loops:
        body = code.instructions[first : last + 1]
        assert any("0x1000000" in c.operands for c in body if c.is_a("ISETP")), body
        targets = {target for c in body for target in c.next}
        assert any(code.instructions[t].name == "BPT.TRAP" for t in targets), body
    looks = code.at(LOOK)
    asked_again = {look for first, last in loops for look in looks if first <= look <= last}
    assert len(looks) == 2 * len(asked_again)  # each waits in a loop once it has looked in vain


def _touched_early(code: Sass, *missing: int) -> list[str]:
    """What touches global memory and can run before a wait, but for the hints of `warm`."""
    early = code.reached_without(WAIT, but=missing) & {*code.at(*TOUCHES)}
    found = [code.instructions[i] for i in sorted(early)]
    return [f"{c.name} {c.operands}" for c in found if c.name != HINT]


def _polling_loops(code: Sass) -> list[tuple[int, int]]:
    """From the first instruction to the jump back, of each loop around a look at a barrier."""
    found = []
    for look in code.at(LOOK):
        jump = next(
            i for i in range(look, len(code.instructions)) if code.instructions[i].is_a("BRA")
        )
        back = [target for target in code.instructions[jump].next if target <= look]
        found += [(target, jump) for target in back]
    return found


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
