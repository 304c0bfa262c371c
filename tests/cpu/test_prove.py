"""The proof catches every kind of step or graph that it exists for: each is broken here on
purpose."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graphs.capture import Captured, GraphSet, TwinBackend
from graphs.keys import GraphKey, Ladder
from graphs.prove import Proof, ProofFailed, Prover
from graphs.step import DecodeStep
from runtime import Runtime
from tests.cpu.twins import device_state, load_micro
from tests.serving import Request, serve

LADDER = "1,2,4,6,1+20,6+10"
KEYS = [GraphKey.parse(text) for text in LADDER.split(",")]
PADDED = [key for key in KEYS if key.tokens > 1]

Op = Callable[..., None]


@pytest.fixture
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with load_micro(checkpoint, ladder=LADDER) as runtime:
        yield runtime


@pytest.fixture
def step(runtime: Runtime) -> DecodeStep:
    return runtime.engine.graphs.step


def prove(graphs: GraphSet, key: GraphKey, *, replays: int = 3) -> Proof:
    return Prover(graphs, replays=replays).prove(key)


def captured(step: DecodeStep, backend: TwinBackend, key: GraphKey) -> GraphSet:
    """Graphs of a backend that captures wrongly."""
    graphs = GraphSet(step, Ladder([key]), backend)
    graphs.warm_up()
    graphs.capture()
    return graphs


# ------------------------------------------------------------------ a sound step


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_sound_key_is_proved(key: GraphKey, runtime: Runtime) -> None:
    proof = prove(runtime.engine.graphs, key, replays=5)
    assert (proof.key, proof.replays) == (key, 6)
    assert proof.live_rows + bool(proof.chunk_tokens) <= key.rows
    assert proof.live_rows + proof.chunk_tokens <= key.tokens
    assert proof.live_rows + proof.chunk_tokens > 0


@pytest.mark.parametrize("key", PADDED, ids=str)
def test_every_key_that_can_have_padding_is_proved_with_some(
    key: GraphKey, runtime: Runtime
) -> None:
    proof = prove(runtime.engine.graphs, key)
    assert proof.live_rows + proof.chunk_tokens < key.tokens, "no step token was padding"


def test_mixed_keys_are_proved_with_decoding_rows_beside_a_chunk(runtime: Runtime) -> None:
    proof = prove(runtime.engine.graphs, GraphKey(16, 6))
    assert proof.live_rows > 0
    assert proof.chunk_tokens > 1


def test_engine_proves_every_key_and_hands_over_a_clean_state(checkpoint: Path) -> None:
    with load_micro(checkpoint, ladder=LADDER, verify=True, proof_replays=2) as proved:
        assert list(proved.engine.proofs) == sorted(KEYS, reverse=True)
        assert all(proof.replays == 3 for proof in proved.engine.proofs.values())
        state = device_state(proved)
        for name in ("phase", "seq_len", "page_table", "step", "last_token", "limit"):
            assert not state[name].any(), name
        assert (state["stop_ids"] == -1).all()
        assert not proved.engine.graphs.step.buffers["poison"].any()


def test_a_proof_does_not_disturb_what_comes_after(checkpoint: Path) -> None:
    answers = []
    for verify in (False, True):
        with load_micro(checkpoint, ladder="6+10", verify=verify) as runtime:
            answers.append(serve(runtime, [Request(tuple(range(40)), 20)])[0].bits)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("replays", [0, -1])
def test_a_proof_needs_a_replay(replays: int, runtime: Runtime) -> None:
    with pytest.raises(ValueError, match=f"at least one replay, got {replays}"):
        Prover(runtime.engine.graphs, replays=replays)


# ------------------------------------------------------------------ broken steps


def after(op: Op, change: Callable[..., None]) -> Op:
    """`op`, and then something it should not do to its arguments."""

    def broken(*args: Any, **kwargs: Any) -> None:
        op(*args, **kwargs)
        change(*args, **kwargs)

    return broken


def drifts(step: DecodeStep) -> None:
    """Adds another number each time: not deterministic."""
    count = itertools.count(1)

    def drift(*_: Any, out: torch.Tensor, **__: Any) -> None:
        out += 1e-6 * next(count)

    step.ops.embed = after(step.ops.embed, drift)


def leaks_between_steps(step: DecodeStep) -> None:
    """Uses what the step before left in a scratch buffer."""
    delta, plain = step.buffers["delta"], step.ops.add_rmsnorm

    def leaking(x: torch.Tensor, added: torch.Tensor | None, *args: Any, **kwargs: Any) -> None:
        plain(x, delta[: len(x)] if added is None else added, *args, **kwargs)

    step.ops.add_rmsnorm = leaking


def sums_over_padding(step: DecodeStep) -> None:
    """A token's value depends on all tokens of the step, the padded ones included."""

    def mix(x: torch.Tensor, *_: Any, out: torch.Tensor, **__: Any) -> None:
        out += 1e-3 * x.float().sum().to(out.dtype)

    step.ops.linear = after(step.ops.linear, mix)


def reads_the_last_token(step: DecodeStep) -> None:
    """The first token takes a little of the last one, which is padding."""

    def mix(*_: Any, out: torch.Tensor, **__: Any) -> None:
        out[0] += 1e-3 * out[-1]

    step.ops.embed = after(step.ops.embed, mix)


def reads_the_null_page(step: DecodeStep) -> None:
    """Attention takes one slot too many, from the page that holds padding's writes."""

    def mix(_: Any, kv: torch.Tensor, *__: Any, out: torch.Tensor, **___: Any) -> None:
        out += 1e-3 * kv[0, : out.shape[-1]]

    step.ops.mla_decode = after(step.ops.mla_decode, mix)


def normalises_over_the_step(step: DecodeStep) -> None:
    """Router weights depend on the largest logit of all tokens, padding included."""

    def mix(logits: torch.Tensor, *_: Any, out_weights: torch.Tensor, **__: Any) -> None:
        out_weights *= 1 + 1e-3 * logits.amax()

    step.ops.route = after(step.ops.route, mix)


def does_not_write_the_cache(step: DecodeStep) -> None:
    """The new token's KV is left as it was."""
    step.ops.mla_prep = lambda *_, **__: None


BROKEN_ALWAYS = (drifts, leaks_between_steps, reads_the_null_page, does_not_write_the_cache)
BROKEN_BY_PADDING = (sums_over_padding, reads_the_last_token, normalises_over_the_step)


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("break_it", BROKEN_ALWAYS, ids=lambda f: f.__name__)
def test_a_broken_step_is_not_proved(
    break_it: Callable[[DecodeStep], None], key: GraphKey, runtime: Runtime, step: DecodeStep
) -> None:
    break_it(step)
    with pytest.raises(ProofFailed, match=f"key {str(key).replace('+', '.')}: .*differs? from"):
        prove(runtime.engine.graphs, key)


@pytest.mark.parametrize("key", PADDED, ids=str)
@pytest.mark.parametrize("break_it", BROKEN_BY_PADDING, ids=lambda f: f.__name__)
def test_a_step_that_reads_padding_is_not_proved(
    break_it: Callable[[DecodeStep], None], key: GraphKey, runtime: Runtime, step: DecodeStep
) -> None:
    break_it(step)
    with pytest.raises(ProofFailed, match=f"key {str(key).replace('+', '.')}: "):
        prove(runtime.engine.graphs, key)


def test_a_step_that_goes_wrong_on_a_later_replay_is_not_proved(
    runtime: Runtime, step: DecodeStep
) -> None:
    count = itertools.count(1)

    def drift(*_: Any, out: torch.Tensor, **__: Any) -> None:
        out += 1.0 if next(count) == 5 else 0.0

    step.ops.embed = after(step.ops.embed, drift)
    with pytest.raises(ProofFailed, match="a later replay differs from the eager step in .* of "):
        prove(runtime.engine.graphs, GraphKey(16, 6), replays=6)


def test_a_step_that_does_not_depend_on_its_input_is_not_proved(
    runtime: Runtime, step: DecodeStep
) -> None:
    step.ops.gather_add_rmsnorm = lambda *_, out, **__: out.fill_(1.0)
    with pytest.raises(ProofFailed, match="two different states gave the same logits"):
        prove(runtime.engine.graphs, GraphKey(4, 4))


def test_a_step_that_reports_a_fault_is_not_proved(runtime: Runtime, step: DecodeStep) -> None:
    step.ops.advance = after(step.ops.advance, lambda *_, fault, **__: fault.fill_(2))
    with pytest.raises(ProofFailed, match="the eager step reported fault 2"):
        prove(runtime.engine.graphs, GraphKey(4, 4))


def test_the_failure_names_the_buffer_and_the_count(runtime: Runtime, step: DecodeStep) -> None:
    count = itertools.count()

    def flip(buffers: dict[str, torch.Tensor]) -> None:
        buffers["out_token"][0] ^= next(count) & 1

    step.ops.sample = after(step.ops.sample, flip)
    with pytest.raises(ProofFailed, match="differs from the eager step in 1 bytes of 'last_token'"):
        prove(runtime.engine.graphs, GraphKey(4, 4))


# ------------------------------------------------------------------ broken graphs


class CopiesItsInput(TwinBackend):
    """A capture that keeps the first input it saw instead of reading it where it lies.

    Args:
        name: of the buffer; restored to its first content in front of each replay.
    """

    def __init__(self, step: DecodeStep, name: str) -> None:
        self.buffer = step.buffers[name]
        self.kept: torch.Tensor | None = None

    def capture(self, key: GraphKey, run: Callable[[], None]) -> Captured:
        def launch() -> None:
            if self.kept is None:
                self.kept = self.buffer.clone()
            self.buffer.copy_(self.kept)
            run()

        return Captured(key, launch)


class DoesNothing(TwinBackend):
    def capture(self, key: GraphKey, run: Callable[[], None]) -> Captured:
        return Captured(key, lambda: None)


class SkipsAStep(TwinBackend):
    """A graph without the node that `name` launches."""

    def __init__(self, step: DecodeStep, name: str) -> None:
        self.step, self.name = step, name

    def capture(self, key: GraphKey, run: Callable[[], None]) -> Captured:
        def launch() -> None:
            op = getattr(self.step.ops, self.name)
            setattr(self.step.ops, self.name, lambda *_, **__: None)
            run()
            setattr(self.step.ops, self.name, op)

        return Captured(key, launch)


@pytest.mark.parametrize("name", ["page_table", "seq_len", "last_token", "mailbox"])
def test_a_graph_that_copied_its_input_is_not_proved(name: str, step: DecodeStep) -> None:
    key = GraphKey(16, 6)
    graphs = captured(step, CopiesItsInput(step, name), key)
    with pytest.raises(ProofFailed, match=r"key 6\+10: the replay on other inputs differs"):
        prove(graphs, key)


def test_a_graph_that_does_nothing_is_not_proved(step: DecodeStep) -> None:
    graphs = captured(step, DoesNothing(), GraphKey(4, 4))
    with pytest.raises(ProofFailed, match="the poisoned replay differs"):
        prove(graphs, GraphKey(4, 4))


@pytest.mark.parametrize(
    "name",
    ["intake", "advance", "embed", "mla_prep", "mla_decode", "route", "grouped_down", "settle"],
)
def test_a_graph_that_lacks_a_node_is_not_proved(name: str, step: DecodeStep) -> None:
    graphs = captured(step, SkipsAStep(step, name), GraphKey(16, 6))
    with pytest.raises(ProofFailed, match="differs from the eager step"):
        prove(graphs, GraphKey(16, 6))
