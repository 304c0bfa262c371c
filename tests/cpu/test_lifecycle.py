"""created → warmed_up → captured → closed: each illegal move is a sentence, and nothing stale
replays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from capture_cache.errors import CaptureError
from graphs.capture import Captured, GraphSet, StaleGraph, State, TwinBackend
from graphs.keys import GraphKey, Ladder, NotCaptured
from graphs.step import DecodeStep
from runtime import Runtime
from tests.cpu.twins import device_state, load_micro

LADDER = Ladder.parse("1,4,4+8", 4)


@pytest.fixture
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with load_micro(checkpoint, bs=4, ladder=str(LADDER)) as runtime:
        yield runtime


@pytest.fixture
def step(runtime: Runtime) -> DecodeStep:
    return runtime.engine.graphs.step


class Recorder(TwinBackend):
    """Notes what the lifecycle asks of a device."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def eager(self, run: Callable[[], None]) -> None:
        self.calls.append("eager")
        run()

    def capture(self, key: GraphKey, run: Callable[[], None]) -> Captured:
        self.calls.append(f"capture {key}")
        return Captured(key, lambda: self.calls.append(f"replay {key}"))

    def synchronize(self) -> None:
        self.calls.append("synchronize")


def in_state(step: DecodeStep, state: State) -> GraphSet:
    graphs = GraphSet(step, LADDER, Recorder())
    if state is not State.CREATED:
        graphs.warm_up()
    if state in (State.CAPTURED, State.CLOSED):
        graphs.capture()
    if state is State.CLOSED:
        graphs.close()
    assert graphs.state is state
    return graphs


def calls_of(graphs: GraphSet) -> list[str]:
    assert isinstance(graphs.backend, Recorder)
    return graphs.backend.calls


def stamped(graphs: GraphSet) -> None:
    with graphs.stamped(LADDER.keys[0]):
        raise AssertionError("entered")


CALLS: dict[str, tuple[State, Callable[[GraphSet], object]]] = {
    "warm_up": (State.CREATED, lambda g: g.warm_up()),
    "capture": (State.WARMED_UP, lambda g: g.capture()),
    "replay": (State.CAPTURED, lambda g: g.replay(LADDER.keys[0])),
    "stamped": (State.CAPTURED, stamped),
    "timed": (State.CAPTURED, lambda g: g.timed(LADDER.keys[0])),
}
# What leads out of a state, whatever was asked for in it.
WAY_OUT = {
    State.CREATED: r"call warm_up\(\) first",
    State.WARMED_UP: r"call capture\(\)",
    State.CAPTURED: "it is captured already; make a new GraphSet to capture again",
    State.CLOSED: "it is closed; make a new GraphSet",
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("call", CALLS)
def test_an_illegal_move_names_call_state_and_the_way_out(
    call: str, state: State, step: DecodeStep
) -> None:
    needed, move = CALLS[call]
    if state is needed:
        return
    graphs = in_state(step, state)
    before = list(calls_of(graphs))
    with pytest.raises(CaptureError) as refusal:
        move(graphs)
    expected = rf"{call}\(\) needs state {needed.value}, got {state.value}: .*{WAY_OUT[state]}"
    assert re.match(expected, str(refusal.value)), str(refusal.value)
    assert graphs.state is state
    assert calls_of(graphs) == before, "a refused move touched the device"


@pytest.mark.parametrize("state", State)
def test_close_is_legal_in_every_state_and_idempotent(state: State, step: DecodeStep) -> None:
    graphs = in_state(step, state)
    graphs.close()
    calls = list(calls_of(graphs))
    graphs.close()
    assert graphs.state is State.CLOSED
    assert not graphs.graphs
    assert calls_of(graphs) == calls, "closed twice"


def test_keys_are_warmed_up_and_captured_from_the_largest_down(step: DecodeStep) -> None:
    warmed: list[str] = []
    captured: list[str] = []
    graphs = GraphSet(step, LADDER, Recorder())
    graphs.warm_up(lambda _, key: warmed.append(str(key)))
    graphs.capture(lambda _, key: captured.append(str(key)))
    assert warmed == captured == ["4+8", "4", "1"]
    assert calls_of(graphs)[-3:] == ["capture 4+8", "capture 4", "capture 1"]
    assert calls_of(graphs).count("eager") >= 2 * len(LADDER.keys)


def test_compilation_is_forbidden_before_the_first_capture_and_not_before(step: DecodeStep) -> None:
    backend = Recorder()
    graphs = GraphSet(step, LADDER, backend, forbid_compile=lambda: backend.calls.append("forbid"))
    graphs.warm_up()
    assert "forbid" not in backend.calls
    graphs.capture()
    after = backend.calls[backend.calls.index("forbid") :]
    assert after == ["forbid", "capture 4+8", "capture 4", "capture 1"]


def test_a_capture_that_fails_leaves_nothing_to_replay(step: DecodeStep) -> None:
    class Failing(Recorder):
        def capture(self, key: GraphKey, run: Callable[[], None]) -> Captured:
            if key != LADDER.keys[0]:  # the smallest is the last to be captured
                return super().capture(key, run)
            raise CaptureError(f"key {key} could not be captured: it allocated")

    graphs = GraphSet(step, LADDER, Failing())
    graphs.warm_up()
    with pytest.raises(CaptureError, match="key 1 could not be captured"):
        graphs.capture()
    for key in LADDER.keys:
        with pytest.raises(CaptureError, match=r"replay\(\) needs state captured, got warmed_up"):
            graphs.replay(key)


def test_a_key_that_was_not_captured_does_not_run_eagerly(step: DecodeStep) -> None:
    graphs = in_state(step, State.CAPTURED)
    before = list(calls_of(graphs))
    with pytest.raises(NotCaptured, match=r"key 2 was not captured \(ladder 1,4,4\+8\)"):
        graphs.replay(GraphKey(2, 2))
    assert calls_of(graphs) == before


def test_a_key_that_was_not_captured_cannot_be_stamped(step: DecodeStep) -> None:
    graphs = in_state(step, State.CAPTURED)
    refusal = pytest.raises(NotCaptured, match=r"key 2 was not captured \(ladder 1,4,4\+8\)")
    with refusal, graphs.stamped(GraphKey(2, 2)):
        pass


def test_replay_launches_the_graph_of_its_key(step: DecodeStep) -> None:
    graphs = in_state(step, State.CAPTURED)
    for key in LADDER.keys:
        graphs.replay(key)
        assert calls_of(graphs)[-1] == f"replay {key}"


def test_timed_launches_are_counted_within_and_ordinary_after(step: DecodeStep) -> None:
    graphs, key = in_state(step, State.CAPTURED), LADDER.keys[0]
    plain = graphs.graphs[key].launch
    with graphs.timed(key) as taken:
        graphs.replay(key)
        graphs.replay(LADDER.keys[1])
        graphs.replay(key)
        assert calls_of(graphs)[-1] == f"replay {key}"
    graphs.replay(key)
    assert len(taken) == 2
    assert min(taken) > 0
    assert graphs.graphs[key].launch is plain
    with pytest.raises(NotCaptured, match="key 2 was not captured"):
        graphs.timed(GraphKey(2, 2))


def test_stamped_steps_are_ordinary_steps_with_a_time_after_each_part(runtime: Runtime) -> None:
    graphs, key = runtime.engine.graphs, LADDER.keys[0]
    plain = graphs.graphs[key]
    runtime.add([1, 2, 3])
    with graphs.stamped(key) as names:
        assert graphs.graphs[key] is not plain
        out = runtime.step()
        while not len(out):
            out = runtime.step()
        stamps = runtime.engine.read_stamps(len(names))
    assert graphs.graphs[key] is plain
    assert names[0] == "begin"
    assert names[-1] == "settle"
    assert "layer 1 mlp" in names
    assert (stamps[1:] >= stamps[:-1]).all()
    assert stamps[0] > 0


def test_stamped_gives_the_plain_graph_back_after_an_error(runtime: Runtime) -> None:
    graphs, key = runtime.engine.graphs, LADDER.keys[0]
    plain = graphs.graphs[key]
    with pytest.raises(KeyError), graphs.stamped(key):
        raise KeyError
    assert graphs.graphs[key] is plain


# ------------------------------------------------------------------ buffers that moved


def assert_refuses(runtime: Runtime, message: str) -> None:
    before = device_state(runtime)
    with pytest.raises(StaleGraph, match=message):
        runtime.step()
    assert runtime.num_in_flight == 0
    for name, tensor in device_state(runtime).items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", ["tok_id", "kv.1", "page_table", "mailbox", "logits", "step"])
def test_a_moved_buffer_is_named_with_both_addresses(name: str, runtime: Runtime) -> None:
    runtime.add([1, 2, 3])
    runtime.step()
    buffers = runtime.engine.graphs.step.buffers
    old, new = buffers[name], buffers[name].clone()
    buffers.rebind(name, new)
    assert_refuses(
        runtime,
        f"buffer '{name}' lay at {old.data_ptr():#x} when the graphs were captured and lies at "
        f"{new.data_ptr():#x} now; capture again",
    )


def test_a_buffer_that_moved_away_and_back_is_still_refused(runtime: Runtime) -> None:
    """Whoever took its place meanwhile may have been captured by other graphs."""
    buffers = runtime.engine.graphs.step.buffers
    old = buffers["kv.0"]
    buffers.rebind("kv.0", old.clone())
    buffers.rebind("kv.0", old)
    assert_refuses(runtime, "the arena was laid out again")


@pytest.mark.parametrize("name", ["embed", "layers.1.router", "rope_table"])
def test_a_moved_weight_is_refused_like_any_other_buffer(name: str, runtime: Runtime) -> None:
    step = runtime.engine.graphs.step
    with pytest.raises(TypeError):
        step.weights[name] = step.weights[name].clone()  # type: ignore[index]
    step.buffers.rebind(name, step.weights[name].clone())
    assert_refuses(runtime, f"'{name}' lay at .* and lies at .* now; capture again")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nonsense", lambda t: t, "'nonsense': expected no such buffer"),
        (
            "tok_id",
            lambda t: t.float(),
            r"'tok_id': expected torch.int32 \(12,\), got torch.float32",
        ),
        (
            "tok_id",
            lambda t: t[:5],
            r"'tok_id': expected torch.int32 \(12,\), got torch.int32 \(5,\)",
        ),
    ],
)
def test_a_buffer_keeps_its_name_shape_and_dtype(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, runtime: Runtime
) -> None:
    buffers = runtime.engine.graphs.step.buffers
    with pytest.raises(ValueError, match=message):
        buffers.rebind(name, change(buffers["tok_id"].clone()))
    runtime.step()


def test_keys_share_the_front_of_the_scratch(step: DecodeStep) -> None:
    small, large = step.buffers.for_key(LADDER.keys[0]), step.buffers.for_key(LADDER.keys[-1])
    for name in step.buffers.scratch_names(LADDER.keys[0]):
        assert small[name].data_ptr() == large[name].data_ptr(), name
        assert small[name].is_contiguous(), name
        assert small[name].numel() <= large[name].numel(), name
