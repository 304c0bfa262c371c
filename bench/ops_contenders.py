"""Who can do an operation: our kernel in every plan, and what the user has of other libraries.

Other libraries are looked for, not required: what is not installed says so, what does not take a
shape says why. Their times are for comparison; a capture takes only what `graphs.candidates` lists.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from graphs.attention_choice import AttentionCut, cuts_for
from graphs.calls import Call
from graphs.candidates import ONLY, Candidate, candidates
from graphs.flashinfer_mla import FlashinferMla
from graphs.hopper_mla import HopperMla
from graphs.model_config import ModelConfig
from graphs.ops import Ops
from graphs.timing import Run
from kernels.triton.mla_decode import num_splits
from kernels.triton.weight_tiles import as_rows

OURS = "ours"
OTHERS = {
    "torch": "torch",
    "flashinfer": "flashinfer",
    "deepgemm": "deep_gemm",
    "flashmla": "flash_mla",
}
MAX_PART_BYTES = 4 << 30


class Unable(ValueError):
    """The contender does not take this call; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One kernel for one operation.

    Attributes:
        name: unique within the call.
        library: `OURS` or a key of `OTHERS`.
        bind: prepares what lies outside the time, and gives the launch. A launch may return its
            result; otherwise it is in the call's outputs. Raises `Unable`.
        bits: equal names must give equal bits; None promises nothing.
        note: what its time leaves out.
    """

    name: str
    library: str
    bind: Callable[[Call], Run]
    bits: str | None = None
    note: str = ""


def missing(wanted: list[str]) -> dict[str, str]:
    """Of the wanted libraries those that are not installed, with a word about it."""
    return {
        name: f"{OTHERS[name]} is not installed"
        for name in wanted
        if importlib.util.find_spec(OTHERS[name]) is None
    }


def contenders(call: Call, ops: Ops, model: ModelConfig, wanted: list[str]) -> list[Contender]:
    """Everyone for this call, our default first."""
    if ops.launch is None:
        return [Contender("oracle", OURS, partial(_ours, ops, ONLY), ONLY.bits)]
    found = [
        Contender(c.name, OURS, partial(_ours, ops, c), c.bits)
        for c in candidates(call)
        if c.other is None
    ]
    if call.op == "mla_decode":
        found += _attention(call, ops, model, wanted)
    present = [name for name in wanted if name not in missing(wanted)]
    for library, op, bind, note in OTHER_KERNELS:
        if library in present and op == call.op:
            found.append(
                Contender(f"{library} {bind.__name__.strip('_')}", library, bind, None, note)
            )
    return found


def _ours(ops: Ops, candidate: Candidate, call: Call) -> Run:
    splits = getattr(candidate.plan, "splits", 1)
    if splits > 1:
        # More splits than the step's own plan has may want more room than the arena has.
        room = call.args[0].new_empty(splits * call.kwargs["out"].numel(), dtype=torch.float32)
        call = call.replaced({"workspace": room})
    return partial(candidate.run, ops, call)


def _attention(call: Call, ops: Ops, model: ModelConfig, wanted: list[str]) -> Iterator[Contender]:
    """Each backend at each cut; every cut has bits of its own."""
    longest = call.args[2].shape[1] * call["page_size"]
    backends = ["triton"]
    if HopperMla.available(model, call["page_size"])[0]:
        backends.append("hopper")
    if "flashinfer" in wanted and FlashinferMla.available(model)[0]:
        backends.append("flashinfer")
    for backend in backends:
        for cut in cuts_for(longest, call["page_size"]):
            choice = AttentionCut(backend, cut)
            if (backend, cut) != ("triton", call["cut"]):
                library = backend if backend == "flashinfer" else OURS
                bind = partial(_bind_attention, ops, model, choice)
                note = "without its plan, made once a step" if backend != "triton" else ""
                yield Contender(str(choice), library, bind, str(choice), note)


def _bind_attention(ops: Ops, model: ModelConfig, choice: AttentionCut, call: Call) -> Run:
    tokens, heads, dc = call.kwargs["out"].shape
    splits = num_splits(call.args[2].shape[1] * call["page_size"], choice.cut)
    if tokens * splits * heads * dc * 4 > MAX_PART_BYTES:
        raise Unable(f"its partial results would take more than {MAX_PART_BYTES >> 30} GiB")
    return choice.bind(ops, model, call)


def _mm(call: Call) -> Run:
    x, w, out = call.args[0], as_rows(call.args[1]), call.kwargs["out"]
    if w.dtype != x.dtype:
        raise Unable(f"torch.mm takes one dtype, not {x.dtype} and {w.dtype}")
    if out.dtype == x.dtype:
        return lambda: torch.mm(x, w.T, out=out)
    return lambda: torch.mm(x, w.T, out_dtype=out.dtype)


def _scaled_mm(call: Call) -> Run:
    xq, xs, w, ws = call.args
    w, columns = as_rows(w), xs.T.contiguous().T
    return lambda: torch._scaled_mm(
        xq, w.T, scale_a=columns, scale_b=ws.T, out_dtype=torch.bfloat16
    )


def _fp8_gemm_nt(call: Call) -> Run:
    deep_gemm = importlib.import_module("deep_gemm")
    xq, xs, w, ws = call.args
    w, columns = as_rows(w), _tma_columns(xs)
    out = torch.empty((xq.shape[0], w.shape[0]), dtype=torch.bfloat16, device=xq.device)

    def launch() -> torch.Tensor:
        deep_gemm.fp8_gemm_nt((xq, columns), (w, ws), out)
        return out

    return launch


def _tma_columns(scale: torch.Tensor) -> torch.Tensor:
    """The same [T, G] with its tokens side by side, 16 bytes at least from one group to the next:
    what DeepGEMM reads as it is. Anything else it would lay out anew in every call."""
    tokens, groups = scale.shape
    pitch = -(-tokens // 4) * 4
    room = scale.new_zeros((groups, pitch))
    room[:, :tokens] = scale.T
    return room.T[:tokens]


def _m_grouped_fp8_gemm_nt_masked(call: Call) -> Run:
    deep_gemm = importlib.import_module("deep_gemm")
    x, xs, w, ws, offsets, pairs = call.args[:6]
    if xs is None:
        raise Unable("it takes FP8 operands")
    w = as_rows(w)
    counts = (offsets[1:] - offsets[:-1]).to(torch.int32)
    room = -(-max(1, int(counts.max())) // 128) * 128  # whole tiles, of whichever height it takes
    rows = x.new_zeros((w.shape[0], room, x.shape[1]), dtype=torch.uint8)
    scales = xs.new_zeros((w.shape[0], xs.shape[1], room)).mT
    per_token = call["top_k"] if call.op == "grouped_gate_up" else 1
    bounds = offsets.tolist()
    for expert, (first, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        lines = pairs[first:end].long() // per_token
        rows[expert, : end - first] = x.view(torch.uint8)[lines]
        scales[expert, : end - first] = xs[lines]
    out = torch.empty((w.shape[0], room, w.shape[1]), dtype=torch.bfloat16, device=x.device)
    expected = max(1, int(1.2 * float(counts.float().mean())))
    packed = (rows.view(torch.float8_e4m3fn), scales)
    return lambda: _no_result(
        deep_gemm.m_grouped_fp8_gemm_nt_masked(packed, (w, ws), out, counts, expected)
    )


def _flash_mla_with_kvcache(call: Call) -> Run:
    flash_mla = importlib.import_module("flash_mla")
    q, cache, page_table, tok_row, kv_len = call.args
    size, dc = call["page_size"], call.kwargs["out"].shape[2]
    if size != 64:
        raise Unable(f"it takes pages of 64 tokens, not {size}")
    table = page_table[tok_row.long()].contiguous()
    pages = cache.view(-1, size, 1, cache.shape[1])
    # Older releases plan here; later ones ignore what they are given and plan in the first run.
    meta, splits = flash_mla.get_mla_metadata(kv_len, q.shape[1], 1)
    scale = call["softmax_scale"]
    return lambda: flash_mla.flash_mla_with_kvcache(
        q[:, None], pages, table, kv_len, dc, meta, splits, softmax_scale=scale
    )[0][:, 0]


def _no_result(_: object) -> None:
    """Its result is laid out by expert: it is not compared."""


OTHER_KERNELS: tuple[tuple[str, str, Callable[[Call], Run], str], ...] = (
    ("torch", "linear", _mm, ""),
    ("torch", "linear_fp8", _scaled_mm, "scales laid out beforehand"),
    ("deepgemm", "linear_fp8", _fp8_gemm_nt, "scales laid out beforehand"),
    ("deepgemm", "grouped_gate_up", _m_grouped_fp8_gemm_nt_masked, "product alone, unchecked"),
    ("deepgemm", "grouped_down", _m_grouped_fp8_gemm_nt_masked, "product alone, unchecked"),
    ("flashmla", "mla_decode", _flash_mla_with_kvcache, ""),
)
