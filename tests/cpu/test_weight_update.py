"""New weights in place: the same as a fresh load, or nothing changed at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from barriers.errors import RankError
from graphs.checkpoint import CheckpointError
from kernels.triton.weight_tiles import as_rows, in_tiles
from runtime import OutOfPages, Runtime, SamplingParams
from tests.cpu.checkpoints import read_tensors, write_tensors
from tests.cpu.twins import VOCAB, load_micro, micro_checkpoint
from tests.serving import Answer, Request, alone, make_requests

LADDER = "6+10"  # one key for every step: the twin's bits hold within a key

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("old"), seed=1)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("new"), seed=2)


@pytest.fixture(scope="module")
def requests_() -> list[Request]:
    return make_requests(np.random.default_rng(1), (20, 33, 5), VOCAB, (12,))


@pytest.fixture(scope="module")
def want(new: Path, requests_: list[Request]) -> list[Answer]:
    with load_micro(new, ladder=LADDER) as runtime:
        return alone(runtime, requests_)


def weights(runtime: Runtime) -> Tensors:
    return {n: t.clone() for n, t in runtime.engine.graphs.step.weights.items()}


def same(a: Tensors, b: Tensors) -> bool:
    return all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "directory": lambda path: path,
    "directory by name": str,
    "tensors": lambda path: read_tensors(path).items(),
    "arrays": lambda path: [(n, t.numpy()) for n, t in read_tensors(path).items()],
    "a generator": lambda path: (pair for pair in read_tensors(path).items()),
}


@pytest.mark.parametrize("source", SOURCES)
def test_after_an_update_all_is_as_freshly_loaded(
    source: str, old: Path, new: Path, requests_: list[Request], want: list[Answer]
) -> None:
    with load_micro(old, ladder=LADDER) as runtime:
        before = alone(runtime, requests_)
        assert runtime.stats().pages_cached
        places = {n: t.data_ptr() for n, t in runtime.engine.graphs.step.weights.items()}
        runtime.update_weights(SOURCES[source](new))
        assert places == {n: t.data_ptr() for n, t in runtime.engine.graphs.step.weights.items()}
        assert runtime.stats().pages_cached == 0, "KV of the old weights"
        got = alone(runtime, requests_)
    assert [a.bits for a in got] == [a.bits for a in want]
    assert [a.bits for a in got] != [a.bits for a in before]


def test_a_part_of_the_weights(old: Path, new: Path) -> None:
    names = ("lm_head.weight", "model.layers.0.self_attn.kv_b_proj.weight")
    with load_micro(new) as runtime:
        target = weights(runtime)
    with load_micro(old) as runtime:
        before = weights(runtime)
        runtime.update_weights((n, t) for n, t in read_tensors(new).items() if n in names)
        after = weights(runtime)
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed == {"head", "layers.0.w_uk", "layers.0.w_uv"}
    assert all(torch.equal(after[n], target[n]) for n in changed)


WHOLE_TILES = {
    "vocab_size": 128,
    "hidden_size": 128,
    "v_head_dim": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
}


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_weights_in_tiles_are_as_freshly_loaded(quantization: str, tmp_path: Path) -> None:
    overrides = ("dtype=bfloat16", f"quantization={quantization}")
    a, b = (micro_checkpoint(tmp_path / str(s), seed=s, **WHOLE_TILES) for s in (1, 2))
    with load_micro(b, overrides=overrides) as runtime:
        target = weights(runtime)
    expert = "model.layers.1.mlp.experts.1.up_proj.weight"
    with load_micro(a, overrides=overrides) as runtime:
        before = weights(runtime)
        tiled = {n for n, t in before.items() if in_tiles(t)}
        assert {"head", "layers.0.o", "layers.1.all_gate_up", "layers.1.all_down"} <= tiled
        runtime.update_weights(b)
        assert same(weights(runtime), target)
        runtime.update_weights(a)
        assert same(weights(runtime), before)
        runtime.update_weights((n, t) for n, t in read_tensors(b).items() if n == expert)
        after = weights(runtime)
    changed = as_rows(after["layers.1.all_gate_up"]).view(torch.uint8)
    old, new = (as_rows(w["layers.1.all_gate_up"]).view(torch.uint8) for w in (before, target))
    assert torch.equal(changed[1, 128:], new[1, 128:])
    assert torch.equal(changed[1, :128], old[1, :128])
    assert torch.equal(changed[[0, 2, 3, 4]], old[[0, 2, 3, 4]])


def last(tensors: Tensors) -> str:
    return list(tensors)[-1]


def unknown_name(tensors: Tensors) -> None:
    tensors["model.norm.wait"] = tensors["model.norm.weight"].clone()


def wrong_shape(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.zeros(7)


def wrong_type(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].long()


def not_finite(tensors: Tensors) -> None:
    tensors[last(tensors)].view(-1)[-1] = float("nan")


BAD = {
    unknown_name: "model.norm.wait: expected no such tensor in this model",
    wrong_shape: r"model.norm.weight: expected shape \[32\], got \[7\]",
    wrong_type: "model.norm.weight: expected bfloat16|float16|float32, got",
    not_finite: "expected finite values, got NaN or infinity",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["directory", "tensors"])
def test_a_bad_update_changes_nothing(
    kind: str, spoil: Callable[[Tensors], None], old: Path, new: Path, tmp_path: Path
) -> None:
    tensors = read_tensors(new)
    spoil(tensors)
    source: Any = tensors.items()
    if kind == "directory":
        (tmp_path / "config.json").write_bytes((new / "config.json").read_bytes())
        source = write_tensors(tmp_path, tensors)
    with load_micro(old) as runtime:
        before = weights(runtime)
        with pytest.raises(CheckpointError, match=BAD[spoil]):
            runtime.update_weights(source)
        assert same(weights(runtime), before)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "expected at least one tensor, got none"),
        (["lm_head.weight"], r"expected \(name, array\) pairs, got str"),
        ([("lm_head.weight", torch.zeros(2))] * 2, "lm_head.weight is given twice"),
        ([("lm_head.weight", [1.0])], "expected a torch tensor, or a numpy array .* got list"),
        ([("lm_head.weight", np.zeros(2, np.int8))], "got numpy int8"),
    ],
)
def test_what_is_no_weights_at_all(source: Any, message: str, old: Path) -> None:
    with load_micro(old) as runtime, pytest.raises(ValueError, match=message):
        runtime.update_weights(source)


def test_a_head_that_is_tied_to_the_embedding(tmp_path: Path) -> None:
    path = micro_checkpoint(tmp_path, tie_word_embeddings=True)
    embed = read_tensors(path)["model.embed_tokens.weight"]
    with load_micro(path) as runtime:
        before = weights(runtime)
        both = [("model.embed_tokens.weight", 2 * embed), ("lm_head.weight", embed)]
        with pytest.raises(CheckpointError, match="lm_head.weight: expected model.embed_tokens"):
            runtime.update_weights(both)
        with pytest.raises(CheckpointError, match="lm_head.weight: expected model.embed_tokens"):
            runtime.update_weights([("lm_head.weight", 2 * embed)])
        assert same(weights(runtime), before)
        runtime.update_weights([(name, 2 * embed) for name, _ in both])
        assert torch.equal(weights(runtime)["embed"], 2 * embed)


# ------------------------------------------------------------------ while requests run


def test_not_while_steps_are_in_flight_or_rows_run(old: Path, new: Path) -> None:
    with load_micro(old) as runtime:
        before = weights(runtime)
        row = runtime.add([1, 2, 3])
        runtime.launch()
        with pytest.raises(RuntimeError, match=r"1 steps are in flight; collect\(\) them"):
            runtime.update_weights(new)
        runtime.collect()
        with pytest.raises(RuntimeError, match=r"1 requests are running .* drain\(\) first"):
            runtime.update_weights(new)
        with pytest.raises(ValueError, match="running must be one of refuse, keep, recompute"):
            runtime.update_weights(new, running="restart")
        assert same(weights(runtime), before)
        runtime.cancel(row)
        runtime.update_weights(new)
        assert not same(weights(runtime), before)


@pytest.mark.parametrize("steps", [0, 1, 3, 9])
@pytest.mark.parametrize("reservation", ["full", "lazy"])
def test_recompute_goes_on_as_if_prompt_and_tokens_so_far_had_just_come(
    reservation: str, steps: int, old: Path, new: Path, requests_: list[Request]
) -> None:
    """Waiting, prefilling and decoding rows alike; prefixes are shared by two of them."""
    requests = [*requests_, Request((*requests_[1].prompt[:32], 9, 9), 12)]
    with (
        load_micro(old, ladder=LADDER, reservation=reservation) as runtime,
        load_micro(new, ladder=LADDER, prefix_cache=False) as fresh,
    ):
        alone(runtime, requests[1:2])  # its pages are in the cache, to be shared
        rows = {runtime.add(r.prompt, r.params): r for r in requests}
        tokens: dict[int, list[int]] = {row: [] for row in rows}
        logprobs: dict[int, list[Any]] = {row: [] for row in rows}

        def take(count: int) -> None:
            for _ in range(count):
                out = runtime.step()
                columns = (out.rows.tolist(), out.tokens.tolist(), out.logprobs)
                for row, token, logprob in zip(*columns, strict=True):
                    tokens[row].append(token)
                    logprobs[row].append(logprob)

        take(steps)
        had = {row: len(got) for row, got in tokens.items()}
        runtime.update_weights(new, running="recompute")
        while runtime.num_running:
            take(1)
        for row, request in rows.items():
            n = had[row]
            if n == request.max_tokens:
                continue
            ids = (*request.prompt, *tokens[row][:n])
            rest = alone(fresh, [Request(ids, request.max_tokens - n)])[0]
            assert tokens[row][n:] == rest.tokens
            assert logprobs[row][n:] == rest.logprobs
        assert runtime.stats().pages_used == 0


def test_keep_goes_on_with_old_kv_and_leaves_none_behind(old: Path, new: Path) -> None:
    with load_micro(old) as runtime:
        runtime.add(list(range(40)), SamplingParams(max_tokens=20, ignore_eos=True))
        for _ in range(8):
            runtime.step()
        runtime.update_weights(new, running="keep")
        while runtime.num_running:
            runtime.step()
        assert runtime.stats().pages_cached == 0


def test_no_page_to_recompute_with_changes_nothing(old: Path, new: Path) -> None:
    with load_micro(old, num_pages=4, reservation="lazy") as runtime:
        runtime.add([1] * 20, SamplingParams(max_tokens=20, ignore_eos=True))
        runtime.add([2] * 15, SamplingParams(max_tokens=20, ignore_eos=True))
        for _ in range(4):
            runtime.step()
            if runtime.num_running == 2 and runtime._scheduler.have[1] == 17:
                break
        before = weights(runtime)
        with pytest.raises(OutOfPages):
            runtime.update_weights(new, running="recompute")
        assert same(weights(runtime), before)


def test_a_refused_recomputation_keeps_no_page(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is about to open a page gets it to be computed again; not if nothing is done."""
    with load_micro(old, reservation="lazy") as runtime:
        for prompt in ([2] * 15, [3] * 14):
            runtime.add(prompt, SamplingParams(max_tokens=20, ignore_eos=True))
        while 17 not in runtime._scheduler.have:
            runtime.step()
        held = [len(runtime.pages.held(row)) for row in range(2)]
        wanted = [runtime.pages.pages_for(int(n)) for n in runtime._scheduler.have[:2]]
        assert held != wanted, "one of them has a token more than its pages hold"

        def refuse(*_: object) -> None:
            raise RankError("another rank refused")

        with monkeypatch.context() as patch:
            patch.setattr(runtime, "_together", refuse)
            with pytest.raises(RankError, match="another rank refused"):
                runtime.update_weights(new, running="recompute")
        assert [len(runtime.pages.held(row)) for row in range(2)] == held

        def out_of_pages(row: int, tokens: int) -> None:
            if row:
                raise OutOfPages("none is left")
            grow(row, tokens)

        grow = runtime.pages.grow
        with monkeypatch.context() as patch:
            patch.setattr(runtime.pages, "grow", out_of_pages)
            with pytest.raises(OutOfPages):
                runtime.update_weights(new, running="recompute")
        assert [len(runtime.pages.held(row)) for row in range(2)] == held
        runtime.update_weights(new, running="recompute")
        while runtime.num_running:
            runtime.step()
        assert runtime.stats().pages_used == 0
