"""What a check and a floor must know of each operation: results, in-place inputs, bytes to read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from graphs.calls import Call
from kernels.triton.tiles import dequantize_rows, sum_parts

# They change the state of rows and host words: the proof of a capture checks these.
UNCHECKED = ("intake", "copy_masks", "count_tokens", "answer", "settle")
# Bytes past which one weight is not copied to be rotated: it is larger than any cache.
MAX_COPY_BYTES = 600 << 20
ROTATED_BYTES = 1 << 20  # smaller weights may well lie in L2
TOLERANCE = {"float8": 3e-2, "bfloat16": 6e-3, "float16": 2e-3, "float32": 2e-3}
INPUT_RESULTS: dict[str, tuple[int | str, ...]] = {"add_rmsnorm": (0,)}
SAMPLED = ("out_token", "out_logprob")  # of the buffers that `sample` takes all together
# Arguments and results that have a line for each token; `PAIRED` have one for each (token, choice).
BY_TOKEN: dict[str, tuple[int | str, ...]] = {
    "linear": (0, "out"),
    "linear_fp8": (0, 1, "out"),
    "router": (0, "out"),
    "quantize": (0, "out_q", "out_scale"),
    "silu_mul": (0, "out", "out_q", "out_scale"),
    "absorb_q": (0, 2, 3, "out"),
    "absorb_v": (0, 1, "out", "out_q", "out_scale"),
    "latent_query": (0, 1, 5, 6, "out"),
    "mla_decode": (0, 3, 4, "out"),
    "route": (0, 2, "out_ids", "out_weights"),
    "combine": (1, 2, 3, "out"),
    "grouped_gate_up": (0, 1),
    "grouped_down": (),
}
PREFIXED = ("linear", "linear_fp8", "router", "latent_query", "absorb_v")
PAIRED: dict[str, tuple[int | str, ...]] = {
    "combine": (0,),
    "grouped_gate_up": ("out", "out_scale"),
    "grouped_down": (0, 1, "out"),
}
NAMED_RESULTS = {"advance": ("kv_slot", "kv_len"), "align": ("offsets",)}


@dataclass(frozen=True)
class Result:
    """One result of a call, ready to compare."""

    name: str
    value: torch.Tensor

    def error(self, want: Result) -> float:
        """Relative error in the 2-norm; for whole numbers the share that differs."""
        got, ref = self.value, want.value
        if not ref.is_floating_point():
            return float((got != ref).float().mean())
        got64, ref64 = got.double(), ref.double()
        if not bool(torch.isfinite(got64).all()):
            return float("inf")
        return float((got64 - ref64).norm() / ref64.norm().clamp(min=1e-30))

    @property
    def tolerance(self) -> float:
        """The largest error that roundings explain."""
        if not self.value.is_floating_point():
            # Sums of another order may swap two experts that are all but equal.
            return 0.01 if self.name == "out_ids" else 0.0
        return TOLERANCE["float8" if self.name.endswith("_q") else self._dtype]

    @property
    def _dtype(self) -> str:
        return str(self.value.dtype).removeprefix("torch.")


def results(call: Call) -> list[Result]:
    """Copies of what `call` has written; quantised results with their scales applied."""
    if call.op == "sample":
        return [Result(name, call.args[0][name].clone()) for name in SAMPLED]
    found = [Result(f"{call.op} in place", call[k].clone()) for k in INPUT_RESULTS.get(call.op, ())]
    for key, tensor in call.tensors():
        value = _value(call, str(key), tensor) if isinstance(key, str) else None
        if value is not None:
            quantised = tensor.dtype == torch.float8_e4m3fn
            found.append(Result("out_q" if quantised else str(key), value))
    return _live(call, found)


def _value(call: Call, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """A copy of one result, None for what is an input or scratch."""
    if tensor.dtype == torch.float8_e4m3fn and name in ("out", "out_q"):
        return dequantize_rows(tensor, call.kwargs["out_scale"])
    if name == "out" and call.op in ("linear", "linear_fp8", "router") and tensor.ndim == 3:
        return sum_parts(tensor, torch.float32)  # K splits, in the reader's order
    if name.startswith("out") and name != "out_scale":
        return tensor.clone()
    if name in NAMED_RESULTS.get(call.op, ()):
        return tensor.clone()
    if name == "pairs" and call.op == "align":
        return tensor[: int(call.kwargs["offsets"][-1])].clone()
    if name == "kv_cache" and call.op == "mla_prep":
        return tensor[call.args[3].long()].clone()
    return None


def _live(call: Call, found: list[Result]) -> list[Result]:
    """Of results by (token, choice) only the lines that somebody wrote."""
    if call.op not in ("grouped_gate_up", "grouped_down"):
        return found
    offsets, pairs = call.args[4], call.args[5]
    live = pairs[: int(offsets[-1])].long().sort().values
    return [Result(r.name, r.value[live]) for r in found]


def scratch(call: Call) -> list[torch.Tensor]:
    """What must be put back before another candidate runs: inputs that a call overwrites."""
    return [call[key] for key in INPUT_RESULTS.get(call.op, ())]


class Floors:
    """Bytes that a call must read from HBM: weights, and the KV that it attends over.

    Args:
        weights: every weight tensor of the model.
        kv_bytes_per_token: of one layer.
    """

    def __init__(self, weights: Iterable[torch.Tensor], kv_bytes_per_token: int) -> None:
        self._weights = {w.data_ptr() for w in weights}
        self._kv_bytes = kv_bytes_per_token

    def weights_of(self, call: Call) -> list[tuple[int | str, torch.Tensor]]:
        """The weights among its arguments."""
        return [(k, t) for k, t in call.tensors() if t.data_ptr() in self._weights]

    def bytes(self, call: Call) -> int:
        """0 for what works in L2 alone."""
        if call.op == "mla_decode":
            return int(call.args[4].sum()) * self._kv_bytes
        read: int = sum(t.nbytes for _, t in self.weights_of(call) if t.nbytes >= ROTATED_BYTES)
        if call.op == "embed":
            return int(call.kwargs["out"].nbytes)
        if call.op in ("grouped_gate_up", "grouped_down"):
            offsets = call.args[4]
            touched = int((offsets[1:] > offsets[:-1]).sum())
            return read * touched // int(offsets.shape[0] - 1)
        return read


def rotated(
    call: Call, floors: Floors, cache_bytes: int, rows: int, max_rows: int, copies: int = 32
) -> list[Call]:
    """The call over weights, or KV, of its own each, so many that no cache holds them all.

    Args:
        cache_bytes: of the cache; three times as many are rotated through.
        rows, max_rows: of the step, and rows whose pages are filled.
        copies: at most.
    """
    if call.op == "mla_decode":
        count = min(copies, max_rows // rows, -(-3 * cache_bytes // max(1, floors.bytes(call))))
        tok_row = call.args[3]
        return [call.replaced({3: tok_row + i * rows}) for i in range(max(1, count))]
    weights = [(k, t) for k, t in floors.weights_of(call) if t.nbytes >= ROTATED_BYTES]
    total = sum(t.nbytes for _, t in weights)
    if not total or total > MAX_COPY_BYTES:
        return [call]
    count = min(copies, -(-3 * cache_bytes // total))
    copied: list[dict[int | str, torch.Tensor]] = [
        {k: t.clone() for k, t in weights} for _ in range(max(0, count - 1))
    ]
    return [call, *(call.replaced(dict(c)) for c in copied)]


def prefix(call: Call, tokens: int) -> Call | None:
    """The call for its first tokens only, where that has a meaning; None where it has not."""
    if call.op not in PREFIXED:
        return None
    new: dict[int | str, torch.Tensor] = {}
    for key in BY_TOKEN[call.op]:
        whole: torch.Tensor | None = (
            call.kwargs.get(key) if isinstance(key, str) else call.args[key]
        )
        if whole is None:
            continue
        if isinstance(key, int):
            new[key] = whole[:tokens]
        else:
            # Of a result in parts, [S, T, N], tokens are the second dimension.
            parts = call.op != "latent_query" and whole.ndim == 3
            new[key] = torch.empty_like(whole[:, :tokens] if parts else whole[:tokens])
    return call.replaced(dict(new))


def turned(call: Call) -> tuple[Call, torch.Tensor] | None:
    """The call with its tokens in the opposite order, so that each has another index and other
    neighbours, and int64 [L]: which line of the call's results each line of the new ones is.

    None where that has no meaning, or there is but one token.
    """
    if call.op not in BY_TOKEN or (tokens := _num_tokens(call)) < 2:
        return None
    device = call.args[0].device
    order = torch.arange(tokens - 1, -1, -1, device=device)
    new = {key: _lines(call, key, order) for key in BY_TOKEN[call.op]}
    if call.op not in PAIRED:
        return call.replaced(dict(new)), order
    top_k = call.args[1].shape[1] if call.op == "combine" else call["top_k"]
    pairs = (order[:, None] * top_k + torch.arange(top_k, device=device)).flatten()
    new |= {key: _lines(call, key, pairs) for key in PAIRED[call.op]}
    if call.op == "combine":
        return call.replaced(dict(new)), order
    new[5], index = _turned_pairs(call.args[4], call.args[5], order, top_k)
    return call.replaced(dict(new)), index


def _num_tokens(call: Call) -> int:
    if call.op == "grouped_down":
        return int(call.args[0].shape[0]) // int(call["top_k"])
    return int(call.args[{"combine": 1, "route": 2}.get(call.op, 0)].shape[0])


def _lines(call: Call, key: int | str, order: torch.Tensor) -> torch.Tensor | None:
    """An argument's lines in this order; of a result a place of its own. Pitches stay."""
    given = call.kwargs.get(key) if isinstance(key, str) else call.args[key]
    if given is None:
        return None
    made = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
    if isinstance(key, int):
        same = torch.uint8 if given.element_size() == 1 else given.dtype  # e4m3 has no indexing
        parts = call.op == "route" and given.ndim == 3  # of logits, [S, T, E]
        made.view(same).copy_(given.view(same).index_select(1 if parts else 0, order))
    return made


def _turned_pairs(
    offsets: torch.Tensor, pairs: torch.Tensor, order: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert's pairs of the tokens in this order, ascending as `align` lists them; and which
    line of the results, which are in order of pairs, each is."""
    live = pairs[: int(offsets[-1])].long()
    counts = (offsets[1:] - offsets[:-1]).long()
    expert = torch.arange(len(counts), device=live.device).repeat_interleave(counts)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=live.device)
    moved = place[live // top_k] * top_k + live % top_k
    listed = pairs.clone()
    listed[: len(live)] = moved[(expert * len(order) * top_k + moved).argsort()]
    after = moved.sort().values
    before = order[after // top_k] * top_k + after % top_k
    return listed, torch.searchsorted(live.sort().values, before)
