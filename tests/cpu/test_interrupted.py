"""An interrupt in a call of the runtime: the same tokens afterwards, or `StepFailed`. Nothing else.

And two threads that step: one is refused, and the runtime is none the worse.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime as package
from barriers.errors import RankError
from graphs.keys import GraphKey, Ladder
from runtime import Runtime, SamplingParams, StepFailed, StepOutput
from runtime.history import History
from runtime.restored_keys import Keys
from runtime.stepping import REHEARSE_SPINS
from tests.cpu.twins import VOCAB, load_micro, micro_checkpoint
from tests.fake_device import FakeConfig, FakeDevice
from tests.interrupts import Interrupt

HERE = Path(package.__file__).parent
PROMPTS = ([1, 2, 3], list(range(20)), [7])
LONGEST = 12
Tokens = dict[int, list[int]]
Drive = Callable[[Runtime], StepOutput]


def _ahead(runtime: Runtime) -> StepOutput:
    """As serving loops do: a step is in flight while the one before is collected."""
    while runtime.num_in_flight < 2:
        runtime.launch()
    return runtime.collect()


def _step(runtime: Runtime) -> StepOutput:
    return runtime.step()


def _submit(runtime: Runtime) -> Tokens:
    params = [SamplingParams(max_tokens=LONGEST - 3 * i) for i in range(len(PROMPTS))]
    return {runtime.submit(p, q): [] for p, q in zip(PROMPTS, params, strict=True)}


def _note(tokens: Tokens, out: StepOutput) -> None:
    for request, token in zip(out.requests.tolist(), out.tokens.tolist(), strict=True):
        tokens[request].append(token)


def _slow(runtime: Runtime) -> None:
    """Let every wait last long enough to have steps rehearsed in it."""
    ready, asked = runtime._ring.ready, Counter[int]()

    def late(step: int) -> bool:
        asked[step] += 1
        return asked[step] > REHEARSE_SPINS + 8 and ready(step)

    runtime._ring.ready = late  # type: ignore[method-assign]


def _go_on(runtime: Runtime, tokens: Tokens, drive: Drive) -> None:
    while runtime.num_running or runtime.num_in_flight:
        if not runtime.num_running and drive is not _step:
            _note(tokens, runtime.collect())
        else:
            _note(tokens, drive(runtime))
            if drive is _step and not runtime.num_running:
                return


def _interrupted(runtime: Runtime, drive: Drive, at: int) -> tuple[Tokens, str, Interrupt]:
    """Tokens of all requests, and why it failed: "" if it did not."""
    tokens = _submit(runtime)
    interrupt = Interrupt(at, HERE)
    try:
        # What a drive returns reaches its caller without another point in between.
        with interrupt.armed():
            _go_on(runtime, tokens, drive)
    except KeyboardInterrupt:
        pass
    try:
        _go_on(runtime, tokens, drive)
    except StepFailed as error:
        return tokens, str(error), interrupt
    return tokens, "", interrupt


@pytest.mark.parametrize("drive", [_step, _ahead])
def test_an_interrupt_anywhere_leaves_the_same_tokens_or_a_failed_runtime(
    drive: Drive, checkpoint: Path
) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    load: Callable[[], Runtime] = partial(load_micro, checkpoint)
    with load() as runtime:
        _slow(runtime)
        whole, failure, counted = _interrupted(runtime, drive, 0)
        expected = list(whole.values())
        assert not failure
        assert [len(t) for t in expected] == [LONGEST - 3 * i for i in range(len(PROMPTS))]
    outcomes: dict[bool, int] = {True: 0, False: 0}
    last = counted.points * 4 // 5  # later passes find their prompts cached, and take fewer
    points = np.random.default_rng(seed).integers(1, last, 60).tolist()
    runtime = load()
    _slow(runtime)
    for at in [1, 2, 3, *points]:
        tokens, failure, interrupt = _interrupted(runtime, drive, at)
        assert interrupt.where, f"point {at} of {counted.points} was never met"
        outcomes[bool(failure)] += 1
        if failure:
            assert "this runtime has failed, close it" in failure
            assert "it was interrupted in a step" in failure
            for got, all_of_it in zip(tokens.values(), expected, strict=True):
                assert got == all_of_it[: len(got)], f"{interrupt.where} (seed {seed})"
            runtime.close()
            runtime = load()
            _slow(runtime)
        else:
            assert list(tokens.values()) == expected, f"{interrupt.where} (seed {seed})"
    runtime.close()
    assert outcomes[True], "no interrupt came inside a launch or a collect"
    assert outcomes[False], "no interrupt came in a wait"


def test_a_wait_that_was_interrupted_can_be_begun_again(checkpoint: Path) -> None:
    with load_micro(checkpoint) as runtime:
        request = runtime.submit([1, 2], SamplingParams(max_tokens=2))
        ready = runtime._ring.ready

        def interrupt(_: int) -> bool:
            raise KeyboardInterrupt

        runtime._ring.ready = interrupt  # type: ignore[method-assign]
        for call in (runtime.step, runtime.step, runtime.collect, runtime.wait):
            with pytest.raises(KeyboardInterrupt):
                call()
            assert runtime.num_in_flight == 1  # step() waits for the one it has launched
        runtime._ring.ready = ready  # type: ignore[method-assign]
        first, second = runtime.step(), runtime.step()
        assert [out.requests.tolist() for out in (first, second)] == [[request], [request]]
        assert (first.step, second.step, runtime.num_running) == (0, 1, 0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_amid_a_launch_ends_the_runtime(
    kind: type[BaseException], checkpoint: Path
) -> None:
    with load_micro(checkpoint) as runtime:
        runtime.submit([1, 2])

        def interrupt(_: object) -> None:
            raise kind

        runtime.engine.replay = interrupt
        with pytest.raises(kind):
            runtime.step()
        for call in (runtime.step, runtime.collect, lambda: runtime.submit([1])):
            with pytest.raises(StepFailed, match=rf"in the middle of launch\(\) \({kind.__name__}"):
                call()


def test_a_collect_that_was_interrupted_has_not_lost_its_step() -> None:
    at, failed = 0, 0
    while True:
        at += 1
        runtime = Runtime(FakeDevice(FakeConfig(), "1,2,4,8,8+16"))
        runtime.submit([1, 2], SamplingParams(max_tokens=4))
        runtime.launch()
        interrupt, out = Interrupt(at, HERE), None
        try:
            with interrupt.armed():
                out = runtime.collect()
        except KeyboardInterrupt:
            pass
        if not interrupt.where:
            break
        if out is None and not runtime.num_in_flight:
            failed += 1
            with pytest.raises(StepFailed, match=r"in the middle of collect\(\)"):
                runtime.step()
    assert out is not None
    assert failed > 1


def test_an_interrupt_as_a_drain_begins_does_not_hold_the_queue(checkpoint: Path) -> None:
    with load_micro(checkpoint) as runtime:
        runtime.submit([1, 2], SamplingParams(max_tokens=1))
        look = runtime._scheduler.look_at_queue

        def interrupt() -> None:
            runtime._scheduler.look_at_queue = look  # type: ignore[method-assign]
            raise KeyboardInterrupt

        runtime._scheduler.look_at_queue = interrupt  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            runtime.drain()
        assert len(runtime.step()) == 1


def test_a_key_whose_making_was_interrupted_is_not_waited_for() -> None:
    class Begun(dict[GraphKey, threading.Event]):
        def setdefault(self, *arguments: Any) -> Any:
            super().setdefault(*arguments)
            raise KeyboardInterrupt

    anything: Any = None
    ladder = Ladder.parse("1", 1)
    keys = Keys(anything, anything, anything, anything, 0, ladder, {})
    key, keys._begun = ladder.keys[0], Begun()
    with pytest.raises(KeyboardInterrupt):
        keys._take(key)
    keys._begun, keys._made[key] = dict(keys._begun), 7
    taken: list[int] = []
    taker = threading.Thread(target=lambda: taken.append(keys._take(key)), daemon=True)
    taker.start()
    taker.join(10)
    assert taken == [7]


def test_a_call_from_inside_a_step_is_refused(checkpoint: Path) -> None:
    """As a signal handler may make one."""
    with load_micro(checkpoint) as runtime:
        runtime.submit([1, 2], SamplingParams(max_tokens=2))
        replay, refusals = runtime.engine.replay, []

        def handler(key: object) -> None:
            for call in (runtime.step, runtime.launch, lambda: runtime.submit([3])):
                with pytest.raises(StepFailed, match="from a signal handler") as refusal:
                    call()
                refusals.append(refusal)
            replay(key)

        runtime.engine.replay = handler
        assert [len(runtime.step()), len(runtime.step()), runtime.num_running] == [1, 1, 0]
        assert len(refusals) == 6


def test_what_a_wait_writes_up_bears_an_interrupt_anywhere() -> None:
    rows, steps = np.array([2, 0], np.intp), np.arange(10, dtype=np.int32).reshape(5, 2)
    expected = np.zeros((3, 8), np.int32)
    expected[rows, :5] = steps.T
    at, met = 1, True
    while met:
        past = History(3, 8)
        for step in steps[:2]:
            past.append(rows, step)
            past.watch(b"rows", rows, rows.astype(np.int64))
        interrupt = Interrupt(at, HERE)
        for step in steps[2:]:
            past.append_again(step)
        try:
            with interrupt.armed():
                past.write_up()
        except KeyboardInterrupt:
            pass
        assert past.have.tolist() == [5, 0, 5], interrupt.where
        assert np.array_equal(past.tokens, expected), interrupt.where
        at, met = at + 1, bool(interrupt.where)
    assert at > 5


# ------------------------------------------------------------------ threads


CALLS: dict[str, Callable[[Runtime], object]] = {
    "step": lambda r: r.step(),
    "launch": lambda r: r.launch(),
    "collect": lambda r: r.collect(),
    "wait": lambda r: r.wait(),
    "drain": lambda r: r.drain(),
    "pause": lambda r: r.pause(),
    "update_weights": lambda r: r.update_weights([]),
    "occupy": lambda r: r.occupy(1, 4, 4),
    "close": lambda r: r.close(),
}


@pytest.mark.parametrize("where", ["launching", "waiting"])
def test_a_second_thread_that_steps_is_refused_and_does_no_harm(
    where: str, checkpoint: Path
) -> None:
    with load_micro(checkpoint) as runtime:
        runtime.submit([1, 2], SamplingParams(max_tokens=4))
        inside, go_on = threading.Event(), threading.Event()
        target, name = (
            (runtime.engine, "replay")
            if where == "launching"
            else (
                runtime._ring,
                "ready",
            )
        )
        original = getattr(target, name)

        def held(argument: int) -> object:
            inside.set()
            assert go_on.wait(60)
            return original(argument)

        setattr(target, name, held)
        outputs: list[StepOutput] = []
        stepper = threading.Thread(target=lambda: outputs.append(runtime.step()))
        stepper.start()
        assert inside.wait(60)
        for call, make in CALLS.items():
            with pytest.raises(RuntimeError, match=rf"{call}\(\) was called while another thread"):
                make(runtime)
        if where == "waiting":  # others come and go meanwhile
            runtime.cancel_request(runtime.submit([5]))
        go_on.set()
        stepper.join()
        setattr(target, name, original)
        assert len(outputs[0]) == 1
        tokens = outputs[0].tokens.tolist()
        while runtime.num_running:
            tokens += runtime.step().tokens.tolist()
    with load_micro(checkpoint) as runtime:
        request = {runtime.submit([1, 2], SamplingParams(max_tokens=4)): list[int]()}
        _go_on(runtime, request, _step)
    assert [tokens] == list(request.values())


def _in_another_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_a_step_that_begins_as_close_looks_keeps_its_engine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads may change as a call of C code ends: `get_ident` is one."""
    with load_micro(checkpoint) as runtime:
        runtime.submit([1, 2], SamplingParams(max_tokens=1))
        inside, go_on, replay = threading.Event(), threading.Event(), runtime.engine.replay
        outputs: list[StepOutput] = []
        stepper = threading.Thread(target=lambda: outputs.append(runtime.step()))

        def held(key: object) -> None:
            inside.set()
            assert go_on.wait(60)
            replay(key)

        def changing() -> int:
            if threading.current_thread() is not stepper and not inside.is_set():
                stepper.start()
                assert inside.wait(60)
            return threading.get_ident()

        runtime.engine.replay = held
        monkeypatch.setattr("runtime.stepping.get_ident", changing)
        try:
            with pytest.raises(RuntimeError, match=r"close\(\) was called while another thread"):
                runtime.close()
        finally:
            go_on.set()
            stepper.join()
        assert len(outputs[0]) == 1


def test_a_refusal_names_the_other_thread_though_it_has_ended(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load_micro(checkpoint) as runtime:
        taken = Runtime._taken

        def late(self: Runtime, *arguments: object) -> RuntimeError:
            self._stepper = 0
            return taken(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Runtime, "_taken", late)
        runtime._stepper = -1
        with pytest.raises(RuntimeError, match="while another thread is in a call") as refusal:
            runtime.step()
        assert not isinstance(refusal.value, StepFailed)


def test_a_request_that_comes_while_weights_are_read_has_none_of_the_old_kv(
    checkpoint: Path, tmp_path: Path
) -> None:
    new = micro_checkpoint(tmp_path / "new", seed=5)
    prompt, params = list(range(40)), SamplingParams(max_tokens=5)

    def rest(runtime: Runtime) -> list[int]:
        tokens: list[int] = []
        while runtime.num_running:
            tokens += runtime.step().tokens.tolist()
        return tokens

    with load_micro(new) as runtime:
        runtime.add(prompt, params)
        expected = rest(runtime)
    with load_micro(checkpoint) as runtime:
        runtime.add(prompt, params)
        assert rest(runtime) != expected  # and its prefix is cached now
        prepare = runtime.engine.prepare_weights

        def slowly(source: object) -> object:
            update = prepare(source)
            _in_another_thread(lambda: runtime.add(prompt, params))
            return update

        runtime.engine.prepare_weights = slowly
        runtime.update_weights(new)
        assert rest(runtime) == expected


def test_what_a_refused_update_gives_back_is_not_of_a_rows_next_request(
    checkpoint: Path,
) -> None:
    with load_micro(checkpoint) as runtime:
        row = runtime.add([1, 2], SamplingParams(max_tokens=4))
        runtime.step()

        def changing(*_: object) -> None:
            _in_another_thread(lambda: runtime.cancel(row))
            _in_another_thread(lambda: runtime.add(list(range(40)), SamplingParams(max_tokens=40)))
            raise RankError("refused")

        runtime._together = changing  # type: ignore[assignment, method-assign]
        with pytest.raises(RankError):
            runtime.update_weights(checkpoint, running="recompute")
        assert runtime.request_id(row) == 1
        assert len(runtime.pages.held(row)) == 5


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads change at nearly every place where they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty")
def test_every_request_has_its_own_id_whoever_submits_meanwhile() -> None:
    runtime = Runtime(FakeDevice(FakeConfig(), "1,2,4,8,8+16"))
    start, ids = threading.Barrier(4), list[int]()

    def client() -> None:
        start.wait(60)
        ids.extend([runtime.submit([1, 2]) for _ in range(500)])

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids) == list(range(2000))
    assert runtime.num_running == runtime.num_waiting == 2000


@pytest.mark.usefixtures("hasty")
def test_requests_come_and_go_from_many_threads_beside_one_that_steps(checkpoint: Path) -> None:
    prompts = [[i, i + 1] for i in range(8)]
    params = SamplingParams(max_tokens=5)
    with load_micro(checkpoint) as runtime:
        alone: list[list[int]] = []
        for prompt in prompts:
            tokens = {runtime.submit(prompt, params): list[int]()}
            _go_on(runtime, tokens, _step)
            alone += tokens.values()
        asked: dict[int, int] = {}
        got: dict[int, list[int]] = {}

        def client(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for n in range(30):
                which = int(rng.integers(len(prompts)))
                request = runtime.submit(prompts[which], params)
                assert request not in asked
                asked[request] = -1 if n % 7 == 0 else which
                if n % 7 == 0:
                    runtime.cancel_request(request)
                runtime.stats()

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or runtime.num_running:
            out = runtime.step()
            for request, token in zip(out.requests.tolist(), out.tokens.tolist(), strict=True):
                got.setdefault(request, []).append(token)
        assert len(asked) == 90
        assert all(got[q] == alone[which] for q, which in asked.items() if which >= 0)
    assert max(map(max, prompts)) < VOCAB
