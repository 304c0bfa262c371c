"""Each operation a second time, from its definition and in float64: what the oracles are held to.

Nothing here is shared with `kernels.triton`: a mistake would have to be made twice to pass. Slow,
for small shapes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.ops_specs import Result
from graphs.calls import Call
from kernels.triton.weight_tiles import as_rows, extents

Tensor = torch.Tensor
GROUP = 128


def alternative(call: Call) -> list[Result] | None:
    """What `call` should give, in the order of `ops_specs.results`; None for what has no second
    formulation here (it moves or counts, and the oracle is its definition)."""
    found = FORMULATIONS.get(call.op)
    return None if found is None else found(call)


def _wide(x: Tensor, scale: Tensor | None) -> Tensor:
    """float64 [R, K] of plain or quantised rows."""
    if scale is None:
        return x.double()
    columns = torch.arange(x.shape[-1]) // GROUP
    return x.double() * scale.double()[..., columns]


def _weight(w: Tensor, scale: Tensor | None) -> Tensor:
    """float64 [N, K] of a plain weight or one in blocks of 128 x 128."""
    w = as_rows(w)
    if scale is None:
        return w.double()
    rows, columns = (torch.arange(extent) // GROUP for extent in w.shape)
    return w.double() * scale.double()[rows][:, columns]


def _quantised(y: Tensor) -> Tensor:
    """y as it comes back from e4m3 with a scale for each 128 columns."""
    parts = []
    for part in torch.split(y.float(), GROUP, dim=1):
        scale = part.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448.0
        parts.append((part / scale).to(torch.float8_e4m3fn).double() * scale.double())
    return torch.cat(parts, dim=1)


def _outputs(call: Call, y: Tensor, rounded: torch.dtype | None = None) -> list[Result]:
    """Results of the outputs that the call has, in its order."""
    found = []
    for key, _ in call.tensors():
        if key == "out" and call.kwargs["out"].dtype != torch.float8_e4m3fn:
            found.append(Result("out", y))
        elif key in ("out", "out_q"):
            found.append(Result("out_q", _quantised(y if rounded is None else y.to(rounded))))
    return found


def _linear(call: Call) -> list[Result]:
    x, w = call.args
    return _outputs(call, torch.einsum("tk,nk->tn", x.double(), as_rows(w).double()))


def _linear_fp8(call: Call) -> list[Result]:
    x, xs, w, ws = call.args
    return _outputs(call, torch.einsum("tk,nk->tn", _wide(x, xs), _weight(w, ws)))


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def _whole(product: Tensor, act: torch.dtype) -> Tensor:
    """A product, its K splits added up and rounded where it was left in parts."""
    return product.double().sum(0).to(act) if product.ndim == 3 else product


def _weighted(y: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """float64 [T, H]: of every token the sum of its experts' results."""
    out = torch.zeros(ids.shape[0], y.shape[1], dtype=torch.float64)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            if int(ids[t, k]) >= 0:
                out[t] += float(weights[t, k]) * y[t * ids.shape[1] + k].double()
    return out


def _add_rmsnorm(call: Call) -> list[Result]:
    x, delta, weight = call.args
    total = x.double()
    if call.kwargs.get("choices") is not None:
        ids, weights = call["choices"]
        total = total + _weighted(delta, ids, weights).to(x.dtype).double()
    elif delta is not None:
        total = total + _whole(delta, x.dtype).double()
    y = _rms(total.to(x.dtype).double(), weight, call.kwargs["eps"])
    return [Result("add_rmsnorm in place", total), *_outputs(call, y, x.dtype)]


def _gather_add_rmsnorm(call: Call) -> list[Result]:
    x, delta, index, weight = call.args
    out = torch.zeros(call.kwargs["out"].shape, dtype=torch.float64)
    for line, at in enumerate(index.tolist()):
        if at >= 0:
            total = x[at].double() + delta[at].double()
            out[line] = _rms(total.to(x.dtype).double(), weight, call.kwargs["eps"])
    return _outputs(call, out)


def _silu(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def _silu_mul(call: Call) -> list[Result]:
    gate_up = call.args[0].double()
    width = (call.kwargs["out"] if call.kwargs.get("out") is not None else call["out_q"]).shape[1]
    half = gate_up.shape[1] // 2
    return _outputs(call, _silu(gate_up[:, :width]) * gate_up[:, half : half + width])


def _quantize(call: Call) -> list[Result]:
    return _outputs(call, call.args[0].double())


def _embed(call: Call) -> list[Result]:
    ids, table, _ = call.args
    lines = [table[i].double() if i >= 0 else table[0].double() * 0 for i in ids.tolist()]
    return _outputs(call, torch.stack(lines))


def _rotate(x: Tensor, table: Tensor, interleave: bool) -> Tensor:
    """Complex multiplication of the pairs of x [dr] by exp(i angle)."""
    half = x.shape[0] // 2
    pairs = x.double().view(half, 2) if interleave else x.double().view(2, half).T
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(
        table[:half].double(), table[half:].double()
    )
    return torch.cat((turned.real, turned.imag))


def _mla_prep(call: Call) -> list[Result]:
    parts, _, tok_pos, _, table, q_weight, kv_weight = call.args
    qkv = _whole(parts, call.kwargs["kv_cache"].dtype)
    start, eps, dc = call["kv_start"], call["eps"], kv_weight.shape[0]
    kv = torch.stack(
        [
            torch.cat(
                (
                    _rms(line[start : start + dc].double(), kv_weight, eps),
                    _rotate(
                        line[start + dc : start + dc + table.shape[1]],
                        table[max(pos, 0)],
                        call["interleave"],
                    ),
                )
            )
            for line, pos in zip(qkv, tok_pos.tolist(), strict=True)
        ]
    )
    found = [Result("kv_cache", kv)]
    if q_weight is not None:
        y = _rms(qkv[:, : q_weight.shape[0]].double(), q_weight, eps)
        found += _outputs(call, y, qkv.dtype)
    return found


def _absorb_q(call: Call) -> list[Result]:
    q, w_uk, tok_pos, _, table = call.args
    heads, dn, _ = w_uk.shape
    split = q.double().view(q.shape[0], heads, -1)
    latent = torch.stack([split[:, h, :dn] @ w_uk[h].double() for h in range(heads)], 1)
    rotary = torch.stack(
        [
            torch.stack([_rotate(part, table[max(pos, 0)], call["interleave"]) for part in line])
            for line, pos in zip(split[..., dn:], tok_pos.tolist(), strict=True)
        ]
    )
    return _outputs(call, torch.cat((latent, rotary), -1))


def _latent_query(call: Call) -> list[Result]:
    xq, xs, w, ws, w_uk, tok_pos, tok_row, table = call.args
    out = call.kwargs["out"]
    # The query is rounded between the two products, as if it had been stored.
    q = torch.einsum("tk,nk->tn", _wide(xq, xs), _weight(w, ws)).to(out.dtype)
    kwargs = {"interleave": call["interleave"], "out": out}
    return _absorb_q(Call("absorb_q", (q, w_uk, tok_pos, tok_row, table), kwargs))


def _absorb_v(call: Call) -> list[Result]:
    o_latent, kv_len, w_uv = call.args
    o = o_latent.double()
    o[kv_len == 0] = 0.0
    heads = [o[:, h] @ w_uv[h].double().T for h in range(w_uv.shape[0])]
    return _outputs(call, torch.cat(heads, 1), o_latent.dtype)


def _mla_decode(call: Call) -> list[Result]:
    q, cache, page_table, tok_row, kv_len = call.args
    size, scale, dc = call["page_size"], call["softmax_scale"], call.kwargs["out"].shape[2]
    out = torch.zeros(call.kwargs["out"].shape, dtype=torch.float64)
    for t, length in enumerate(kv_len.tolist()):
        pages = page_table[int(tok_row[t])].tolist()
        slots = [pages[i // size] * size + i % size for i in range(length)]
        if slots:
            kv = cache[slots].double()
            score = torch.exp(q[t].double() @ kv.T * scale)
            out[t] = (score / score.sum(1, keepdim=True)) @ kv[:, :dc]
    return _outputs(call, out)


def _route(call: Call) -> list[Result]:
    parts, bias, tok_row = call.args
    logits = _whole(parts, torch.float32)
    groups, kept, top_k = call["num_groups"], call["topk_groups"], call["top_k"]
    ids = torch.full(call.kwargs["out_ids"].shape, -1, dtype=torch.int32)
    weights = torch.zeros(ids.shape, dtype=torch.float64)
    for t, row in enumerate(tok_row.tolist()):
        if row < 0:
            continue
        # In fp32, as the choice is defined: float64 would break its ties.
        score = 1.0 / (1.0 + torch.exp(-logits[t]))
        choice = (score if bias is None else score + bias).tolist()
        size = len(choice) // groups
        parts = [sorted(choice[g * size : (g + 1) * size])[-2:] for g in range(groups)]
        best = sorted(range(groups), key=lambda g: (-float(sum(parts[g])), g))[:kept]
        open_ = [e for g in best for e in range(g * size, (g + 1) * size)]
        picked = sorted(open_, key=lambda e: (-choice[e], e))[:top_k]
        wide = score.double()[picked]
        total = wide.sum() if call["normalize"] else 1.0
        ids[t, :top_k] = torch.tensor(picked, dtype=torch.int32)
        weights[t, :top_k] = wide / total * call["scaling"]
        if call.kwargs.get("shared_id") is not None:
            ids[t, top_k], weights[t, top_k] = call["shared_id"], 1.0
    return [Result("out_ids", ids), Result("out_weights", weights)]


def _align(call: Call) -> list[Result]:
    flat, start = call.args[0].flatten().tolist(), call["expert_start"]
    local = call.kwargs["offsets"].shape[0] - 1
    lists = [[p for p, e in enumerate(flat) if e == start + i] for i in range(local)]
    ends = torch.tensor([0, *(len(x) for x in lists)]).cumsum(0).to(torch.int32)
    pairs = torch.tensor([p for x in lists for p in x], dtype=torch.int32)
    return [Result("offsets", ends), Result("pairs", pairs)]


def _grouped(call: Call, value: Callable[[int, int], Tensor], width: int) -> list[Result]:
    """Lines of the pairs that exist, in order of their ids."""
    offsets, pairs = call.args[4].tolist(), call.args[5].tolist()
    lines = {
        p: value(e, p) for e in range(len(offsets) - 1) for p in pairs[offsets[e] : offsets[e + 1]]
    }
    if not lines:
        return _outputs(call, torch.zeros(0, width, dtype=torch.float64))
    return _outputs(call, torch.stack([lines[p] for p in sorted(lines)]))


def _scale_of(scale: Tensor | None, at: int) -> Tensor | None:
    return None if scale is None else scale[at]


def _grouped_gate_up(call: Call) -> list[Result]:
    x, xs, w, ws = call.args[:4]
    inter, top_k = extents(tuple(w.shape))[1] // 2, call["top_k"]

    def value(expert: int, pair: int) -> Tensor:
        token = pair // top_k
        line = _wide(x[token], _scale_of(xs, token))
        scale = _scale_of(ws, expert)
        # Gate and up have scale rows of their own.
        half = None if scale is None else scale.shape[0] // 2
        rows = as_rows(w[expert])
        gate = _weight(rows[:inter], None if scale is None else scale[:half]) @ line
        up = _weight(rows[inter:], None if scale is None else scale[half:]) @ line
        return _silu(gate) * up

    return _grouped(call, value, inter)


def _grouped_down(call: Call) -> list[Result]:
    h, hs, w, ws = call.args[:4]

    def value(expert: int, pair: int) -> Tensor:
        return _weight(w[expert], _scale_of(ws, expert)) @ _wide(h[pair], _scale_of(hs, pair))

    return _grouped(call, value, extents(tuple(w.shape))[1])


def _combine(call: Call) -> list[Result]:
    y, ids, weights, shared = call.args
    out = _weighted(y, ids, weights)
    return _outputs(call, out if shared is None else out + shared.double())


def _sample(call: Call) -> list[Result]:
    """Rows here ask for nothing but the likeliest token."""
    b = call.args[0]
    logits, sample_tok = b["logits"], b["sample_tok"]
    token = torch.full(b["out_token"].shape, -1, dtype=torch.int32)
    logprob = torch.zeros(token.shape, dtype=torch.float64)
    for s, at in enumerate(sample_tok.tolist()):
        if at >= 0:
            line = logits[s].double()
            token[s] = int(line.argmax())
            logprob[s] = line.max() - line.logsumexp(0)
    return [Result("out_token", token), Result("out_logprob", logprob)]


FORMULATIONS: dict[str, Callable[[Call], list[Result]]] = {
    "linear": _linear,
    "linear_fp8": _linear_fp8,
    "router": _linear,
    "add_rmsnorm": _add_rmsnorm,
    "gather_add_rmsnorm": _gather_add_rmsnorm,
    "silu_mul": _silu_mul,
    "quantize": _quantize,
    "embed": _embed,
    "mla_prep": _mla_prep,
    "absorb_q": _absorb_q,
    "absorb_v": _absorb_v,
    "latent_query": _latent_query,
    "mla_decode": _mla_decode,
    "route": _route,
    "align": _align,
    "grouped_gate_up": _grouped_gate_up,
    "grouped_down": _grouped_down,
    "combine": _combine,
    "sample": _sample,
}
