"""What a check and a floor must know of each operation: results, in-place inputs, bytes to read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from graphs.calls import Call
from kernels.triton.routing import align_ref
from kernels.triton.tiles import dequantize_rows, sum_parts

# They change the state of rows and host words: the proof of a capture checks these.
UNCHECKED = ("intake", "copy_masks", "count_tokens", "answer", "settle")
# Bytes past which one weight is not copied to be rotated: it is larger than any cache.
MAX_COPY_BYTES = 600 << 20
ROTATED_BYTES = 1 << 20  # smaller weights may well lie in L2
TOLERANCE = {"float8": 3e-2, "bfloat16": 6e-3, "float16": 2e-3, "float32": 2e-3}
INPUT_RESULTS: dict[str, tuple[int | str, ...]] = {"add_rmsnorm": (0,)}
SAMPLED = ("out_token", "out_logprob")  # of the buffers that `sample` takes all together
NAMED_RESULTS = {
    "advance": ("kv_slot", "kv_len"),
    "align": ("offsets",),
}


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
    if call.op == "route" and call.kwargs.get("offsets") is not None:
        found.append(Result("lists", _lists_agree(call)))
    return _live(call, found)


def _lists_agree(call: Call) -> torch.Tensor:
    """int32 [2]: whether the lists are those of the ids that were chosen; the count left behind."""
    ids, offsets, pairs = (call.kwargs[n].cpu() for n in ("out_ids", "offsets", "pairs"))
    want_offsets, want_pairs = offsets.clone(), pairs.clone()
    align_ref(ids, expert_start=0, offsets=want_offsets, pairs=want_pairs)
    live = int(want_offsets[-1])
    same = torch.equal(offsets, want_offsets) and torch.equal(pairs[:live], want_pairs[:live])
    return torch.tensor([same, int(call.kwargs["arrivals"])], dtype=torch.int32)


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


# Arguments with a line for each token, of operations that treat every token alone; of a result
# in parts, [S, T, N], tokens are the second dimension.
BY_TOKEN: dict[str, tuple[int, ...]] = {
    "linear": (0,),
    "linear_fp8": (0, 1),
    "router": (0,),
    "latent_query": (0, 1, 5, 6),
    "absorb_v": (0, 1, 2, 3),
}


def prefix(call: Call, tokens: int) -> Call | None:
    """The call for its first tokens only, where that has a meaning; None where it has not."""
    places = BY_TOKEN.get(call.op)
    if places is None:
        return None
    new: dict[int | str, torch.Tensor] = {i: call.args[i][:tokens] for i in places}
    parts = call.op in ("linear", "linear_fp8", "router") and call.kwargs["out"].ndim == 3
    for name in ("out", "out_q", "out_scale"):
        whole = call.kwargs.get(name)
        if whole is not None:
            new[name] = torch.empty_like(whole[:, :tokens] if parts else whole[:tokens])
    return call.replaced(dict(new))
