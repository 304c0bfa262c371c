"""Rows of 128k and 160k tokens, and eight of 32k, at DeepSeek-V3's shapes in a captured step.

Two layers (one dense, one with experts) over a random cache on scattered pages. Limits: a weight of
the softmax, a partial result and the result are rounded to bf16, each by at most 2^-8 of it, hence
by 2^-8 / √3 on average and all three by 2^-8. A page left out is seen there, a token by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from graphs.attention_choice import AttentionCut, cuts_for
from graphs.calls import Call
from graphs.ops import Ops
from graphs.step_config import default_cut
from runtime import Runtime
from tests.gpu.long_context import LongRows, attention_of, oracle_step

LONGEST, MID, EIGHT = 163840, 131072, 32768
# Around the ends of pages and of splits, beside a row of the greatest length.
UNEVEN = (20000, 1, LONGEST, 65, EIGHT, 16384, 16385, 4097)
BF16 = 2.0**-8  # largest relative error of one rounding
FP8 = 2.0**-4
OVERRIDES = (
    "first_k_dense_replace=1",
    "n_routed_experts=4",
    "num_experts_per_tok=4",
    "n_group=1",
    "topk_group=1",
    "vocab_size=16384",
)
NUM_PAGES = 4200  # eight rows of 32k tokens take 4,096
# Root mean square of the logits' error over that of the logits: a rounding of an activation may
# fall to the other side, in bf16 or in e4m3.
LOGITS = {"plain": 0.03, "fp8": 0.1}


@pytest.fixture(scope="module", params=["flashinfer fp8", "triton fp8", "triton none"])
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A captured runtime whose rows may be as long as the model allows."""
    from graphs.flashinfer_mla import FlashinferMla
    from graphs.model_config import ModelConfig, parse_overrides
    from graphs.presets import PRESETS

    attention, weights = request.param.split()
    overrides = (*OVERRIDES, f"quantization={weights}")
    if attention == "flashinfer":
        model = ModelConfig.from_hf(
            PRESETS["deepseek-v3"], layers=2, overrides=parse_overrides(overrides)
        )
        usable, reason = FlashinferMla.available(model)
        if not usable:
            pytest.skip(reason)
    with Runtime.load(
        "deepseek-v3",
        layers=2,
        overrides=overrides,
        bs=8,
        max_seq_len=LONGEST,
        num_pages=NUM_PAGES,
        ladder="1,8",
        attention=attention,
        kernels="default",
        device="cuda",
        verify=False,
        bundle=False,
        store=str(tmp_path_factory.mktemp("long")),
    ) as runtime:
        assert runtime.config.attention == attention
        assert runtime.config.cut == default_cut(8, LONGEST)
        yield runtime


def check_attention(rows: LongRows, found: dict[str, torch.Tensor]) -> None:
    model = rows.engine.model_config
    for row, slots in enumerate(rows.slots):
        t = rows.token_of(row, found)
        assert int(found["kv_len"][t]) == rows.lengths[row]
        want = attention_of(
            found["q_latent"][t], rows.kv[-1][slots], model.softmax_scale, model.kv_lora_rank
        )
        close(found["o_latent"][t], want, f"row {row} of {rows.lengths[row]} tokens")


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """Within the roundings of bf16: on average for each head, and for each element."""
    error = (got.double() - want).abs()
    rms = want.square().mean(-1, keepdim=True).sqrt()
    average = float((error.square().mean(-1, keepdim=True).sqrt() / rms).max())
    assert average < BF16, f"{what}: error {average / BF16:.2f} roundings on average"
    excess = float(((error - 2 * BF16 * want.abs()) / rms).max())
    assert excess < 6 * BF16, f"{what}: an element is {excess / BF16:.1f} roundings off"


@pytest.mark.parametrize("lengths", [(LONGEST,), (MID,), (EIGHT,) * 8, UNEVEN], ids=str)
def test_attention_of_a_replay_is_right(long: Runtime, lengths: tuple[int, ...]) -> None:
    rows = LongRows(long, lengths)
    check_attention(rows, rows.replay())


@pytest.mark.parametrize("lengths", [(LONGEST,), UNEVEN], ids=str)
def test_what_lies_around_attention_is_right(long: Runtime, lengths: tuple[int, ...]) -> None:
    from kernels.triton.mla_prep import mla_prep_ref

    rows = LongRows(long, lengths)
    found, model = rows.replay(), rows.engine.model_config
    weights, layer = rows.engine.graphs.step.weights, model.num_layers - 1
    cache = torch.zeros_like(rows.kv[layer])
    with rows.device:
        mla_prep_ref(
            *(found[n] for n in ("qkv", "tok_row", "tok_pos", "kv_slot")),
            weights["rope_table"],
            weights[f"layers.{layer}.q_a_norm"],
            weights[f"layers.{layer}.kv_a_norm"],
            eps=model.latent_rms_eps,
            kv_start=model.q_part_padded,
            interleave=model.rope_interleave,
            kv_cache=cache,
            out=torch.empty(len(found["tok_row"]), model.q_lora_rank, dtype=cache.dtype),
        )
    w_uv = weights[f"layers.{layer}.w_uv"].double()
    for row, slots in enumerate(rows.slots):
        t = rows.token_of(row, found)
        assert int(found["kv_slot"][t]) == int(slots[-1])
        assert int(found["tok_pos"][t]) == lengths[row] - 1
        appended, want = rows.kv[layer][slots[-1]].double(), cache[slots[-1]].double()
        rms = want.square().mean().sqrt()
        assert float(((appended - want).abs() - 4 * BF16 * want.abs()).max() / rms) < 4 * BF16
        value = torch.einsum("hc,hvc->hv", found["o_latent"][t].double(), w_uv)
        check_value(found, t, value)


def check_value(found: dict[str, torch.Tensor], t: int, want: torch.Tensor) -> None:
    """`absorb_v` of one token, float64 [H, V], in the format that the next product takes."""
    if "o" in found:
        close(found["o"][t].view(want.shape), want, "values")
        return
    scale = found["o_s"][t].double()[:, None]
    got = found["o_q"][t].view(torch.float8_e4m3fn).double().view(len(scale), -1) * scale
    want = want.view(got.shape)
    # Where splits are merged on the way, the oracle's merge may round otherwise: as in `close`.
    allowed = (FP8 + 4 * BF16) * want.abs() + scale * 2.0**-9
    allowed = allowed + 6 * BF16 * want.square().mean(-1, keepdim=True).sqrt()
    excess = float(((got - want).abs() / allowed).max())
    assert excess <= 1, f"a value is {excess:.2f} times as far off as may be"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


def test_a_long_row_has_its_bits_in_any_company(long: Runtime) -> None:
    alone = LongRows(long, (LONGEST,))
    found = alone.replay()
    want = {n: bits(found[n][0]) for n in ("q_latent", "o_latent", "logits")}
    history = [kv[alone.slots[0]].clone() for kv in alone.kv]
    token = int(found["tok_id"][0])
    for seed, company in ((1, UNEVEN), (2, UNEVEN[::-1]), (3, (1, LONGEST, 70))):
        rows = LongRows(long, company, seed=seed)
        row = company.index(LONGEST)
        with rows.engine.graphs.backend.on_stream():
            rows.saved["last_token"][row] = token
            for kv, values in zip(rows.kv, history, strict=True):
                kv[rows.slots[row]] = values
            rows.engine.graphs.backend.synchronize()
        found = rows.replay()
        t = rows.token_of(row, found)
        s = int((found["sample_row"] == row).nonzero())
        for name, expected in want.items():
            at = s if name == "logits" else t
            same = torch.equal(bits(found[name][at]), expected)
            assert same, f"{name} of the long row differs beside {company}"


def test_a_replay_is_the_eager_step_and_repeats(long: Runtime) -> None:
    rows = LongRows(long, UNEVEN)
    names = ("o_latent", "logits", "out_token", "out_logprob")
    want = {n: bits(rows.replay(eagerly=True)[n]) for n in names}
    for _ in range(3):
        found = rows.replay()
        for name in names:
            assert torch.equal(bits(found[name]), want[name]), name


def test_every_token_counts_and_no_other(long: Runtime) -> None:
    """NaN in one token of a row is in all of its results, and in no other row's."""
    rows = LongRows(long, UNEVEN)
    whole, kv = bits(rows.replay()["o_latent"]), rows.kv[-1]
    cut, long_row = rows.config.cut, UNEVEN.index(LONGEST)
    places = (0, 63, 64, cut - 1, cut, 5 * cut + 77, LONGEST - cut, LONGEST - 65, LONGEST - 2)
    cases = [(long_row, at) for at in places]
    cases += [(row, max(0, length - 2)) for row, length in enumerate(UNEVEN) if length > 1]
    for row, at in cases:
        slot = rows.slots[row][at]
        kept = kv[slot].clone()
        kv[slot] = float("nan")
        found = rows.replay()
        kv[slot] = kept
        t = rows.token_of(row, found)
        assert bool(found["o_latent"][t].isnan().all()), f"token {at} of row {row} does not count"
        others = [i for i in range(len(found["tok_row"])) if i != t]
        got = bits(found["o_latent"]).view(len(whole), -1)
        assert torch.equal(got[others], whole.view(len(whole), -1)[others]), (row, at)


@pytest.mark.parametrize("lengths", [(LONGEST,), (EIGHT,) * 8, UNEVEN], ids=str)
def test_logits_are_the_oracles(long: Runtime, lengths: tuple[int, ...]) -> None:
    rows = LongRows(long, lengths)
    found = rows.replay()
    got = found["logits"].double()
    want = oracle_step(rows, found)["logits"].double()
    live = found["sample_row"] >= 0
    assert int(live.sum()) == len(lengths)
    error = (got - want)[live].square().mean(-1).sqrt() / want[live].square().mean(-1).sqrt()
    print(f"relative error of logits by row: {[round(e, 5) for e in error.tolist()]}")
    limit = LOGITS[rows.engine.model_config.weight_format]
    assert float(error.max()) < limit, error.tolist()


def test_every_cut_that_may_be_chosen_is_right(long: Runtime) -> None:
    """The choice of kernel and cut is made by measurement: any of them must do."""
    rows = LongRows(long, UNEVEN)
    found, engine = rows.replay(), rows.engine
    assert engine.launcher is not None
    engine.launcher.thaw()
    out = torch.empty_like(found["o_latent"])
    args = tuple(found[n] for n in ("q_latent", f"kv.{len(rows.kv) - 1}"))
    args += tuple(found[n] for n in ("page_table", "tok_row", "kv_len"))
    kwargs = {
        "page_size": rows.config.page_size,
        "softmax_scale": engine.model_config.softmax_scale,
        "cut": rows.config.cut,
        "out": out,
        "part_o": None,
        "part_lse": None,
    }
    call = Call("mla_decode", args, kwargs)
    cuts = cuts_for(LONGEST, rows.config.page_size)
    assert len(cuts) >= 2
    for cut in cuts:
        with engine.graphs.backend.on_stream():
            out.fill_(float("nan"))
            choice = AttentionCut(rows.config.attention, cut)
            choice.bind(Ops(engine.launcher), engine.model_config, call)()
            engine.graphs.backend.synchronize()
        check_attention(rows, {**found, "o_latent": out})
    engine.launcher.freeze()


def test_the_longest_row_is_not_one_too_short(long: Runtime) -> None:
    """The driver's own limit: a row may use every position, and no more."""
    from runtime import SamplingParams

    long.engine.fill_kv(seed=1)
    long.engine.reset_state()
    with pytest.raises(ValueError, match=f"exceeds max_seq_len {LONGEST}"):
        long.occupy(1, LONGEST - 1, 2, SamplingParams(max_tokens=2, ignore_eos=True))
    (row,) = long.occupy(1, LONGEST - 1, 1, SamplingParams(max_tokens=1, ignore_eos=True))
    out = long.step()
    assert out.rows.tolist() == [row]
    assert out.finished.tolist() == [True]
    assert int(out.tokens[0]) >= 0
    long.engine.graphs.backend.synchronize()
    assert int(long.engine.graphs.step.buffers["kv_len"][0]) == LONGEST
    assert long.num_running == 0
