"""The driver over a device that comes to a step later than it is launched: successors publish.

The CPU twin runs a step within its launch, so no step of it ever knows of a successor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphs.keys import GraphKey
from kernels.triton.state import IS_PENDING, RING_SLOTS
from runtime import Runtime, SamplingParams
from runtime.stepping import StepFailed
from tests.cpu.driven import seven_requests
from tests.cpu.twins import load_micro
from tests.serving import Answer, Request, serve


class Behind:
    """Has a twin's steps run one by one, whenever the host looks whether the device still lives.

    Attributes:
        left: steps that were left to their successors to be published.
    """

    def __init__(self, runtime: Runtime) -> None:
        engine, self.left = runtime.engine, 0
        self._replay, self._queue = engine.replay, deque[GraphKey]()
        self._pending = engine.graphs.step.buffers["pending"]
        engine.replay, engine.check_alive = self._queue.append, self.run_one

    def run_one(self) -> None:
        if self._queue:
            self._replay(self._queue.popleft())
            self.left += int(self._pending[IS_PENDING])


@pytest.fixture(scope="module")
def requests_(checkpoint: Path) -> list[tuple[Request, Answer]]:
    return seven_requests(checkpoint)


@pytest.fixture
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with load_micro(checkpoint) as runtime:
        yield runtime


def _decoding(runtime: Runtime) -> None:
    for i in range(3):
        runtime.add([i + 1, 2], SamplingParams(max_tokens=40, ignore_eos=True))
    runtime.step()


def test_what_successors_publish_is_the_same(
    runtime: Runtime, requests_: list[tuple[Request, Answer]]
) -> None:
    device = Behind(runtime)
    answers = serve(runtime, [request for request, _ in requests_], ahead=2)
    assert [a.bits for a in answers] == [alone.bits for _, alone in requests_]
    assert device.left > 10


def test_every_step_of_a_drain_is_collected(runtime: Runtime) -> None:
    _decoding(runtime)
    device = Behind(runtime)
    first = runtime.launch()
    steps = [out.step for out in runtime.drain()]
    assert steps == list(range(first, first + len(steps)))
    assert (runtime.num_running, runtime.num_in_flight) == (0, 0)
    assert device.left > 10


def test_the_last_step_before_a_pause_waits_for_no_other(runtime: Runtime) -> None:
    _decoding(runtime)
    device = Behind(runtime)
    steps = [runtime.launch(), runtime.launch()]
    runtime.pause()
    assert [runtime.collect().step, runtime.collect().step] == steps
    assert device.left == 1
    runtime.resume()
    assert runtime.step().step == steps[1] + 1


def test_a_launch_that_fails_leaves_nothing_to_publish(runtime: Runtime) -> None:
    _decoding(runtime)
    device, step = Behind(runtime), runtime.launch()

    def broken(_: GraphKey) -> None:
        raise RuntimeError("no launch")

    runtime.engine.replay = broken
    with pytest.raises(RuntimeError, match="no launch"):
        runtime.launch()
    device.run_one()
    assert runtime.engine.ring_step[step % RING_SLOTS] == step + 1
    assert device.left == 0
    with pytest.raises(StepFailed, match="no launch"):
        runtime.collect()
