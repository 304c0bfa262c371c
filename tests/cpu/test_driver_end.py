"""The end of a driver: closed, or given up because its device failed; and options of its load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from barriers.errors import BarrierTimeout
from graphs.keys import GraphKey, Ladder
from kernels.triton.state import HEADER, MAX_TOP, RING_SLOTS, MailboxLayout, RingLayout, mask_words
from runtime import Runtime, StepFailed
from runtime.config import RuntimeConfig
from runtime.tuning import pinned
from tests.cpu.checkpoints import edit_config
from tests.cpu.twins import PAGE, VOCAB, load_micro, micro_checkpoint


@pytest.fixture
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with load_micro(checkpoint) as runtime:
        yield runtime


# ------------------------------------------------------------------ the end


CALLS: dict[str, Callable[[Runtime], object]] = {
    "add": lambda r: r.add([1]),
    "cancel": lambda r: r.cancel(0),
    "occupy": lambda r: r.occupy(1, 4, 4),
    "step": lambda r: r.step(),
    "launch": lambda r: r.launch(),
    "collect": lambda r: r.collect(),
    "wait": lambda r: r.wait(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_closed_runtime_says_so(call: str, in_flight: bool, checkpoint: Path) -> None:
    runtime = load_micro(checkpoint)
    runtime.add([1, 2])
    if in_flight:
        runtime.launch()
    runtime.close()
    runtime.close()
    with pytest.raises(RuntimeError, match="this runtime is closed; make a new one"):
        CALLS[call](runtime)


def test_the_context_manager_closes_after_an_error_too(checkpoint: Path) -> None:
    with pytest.raises(KeyError), load_micro(checkpoint) as runtime:  # noqa: PT012
        runtime.add([1])
        runtime.launch()
        raise KeyError
    with pytest.raises(RuntimeError, match="closed"):
        runtime.step()


def test_an_unknown_reservation_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="reservation must be 'full' or 'lazy', got 'greedy'"):
        load_micro(checkpoint, reservation="greedy")


# ------------------------------------------------------------------ options of load


@pytest.mark.parametrize("alias", ["max_batch_size", "max_model_len", "cuda_graph_bs"])
def test_load_takes_the_spellings_of_other_engines(alias: str, checkpoint: Path) -> None:
    ours = {"max_batch_size": "bs", "max_model_len": "max_seq_len", "cuda_graph_bs": "ladder"}
    options: dict[str, Any] = {"bs": 2, "max_seq_len": 64, "ladder": "1,2"}
    options[alias] = options.pop(ours[alias])
    store = str(checkpoint / "store")
    common = {"page_size": PAGE, "verify": False, "device": "cpu", "store": store}
    with Runtime.load(str(checkpoint), **common, **options) as runtime:
        assert (runtime.config.max_rows, runtime.config.max_seq_len) == (2, 64)
        assert str(runtime.ladder) == "1,2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 4}, "unknown option 'batch'; known: "),
        ({"ladder": "6", "cuda_graph_bs": "6"}, "another spelling of 'ladder', which is given"),
        ({"cuda_graph_bs": "6", "ladder": "6"}, "another spelling of 'ladder', which is given"),
        ({"device": "tpu"}, "device must be one of auto, cuda, cpu"),
        ({"attention": "flashinfer"}, "attention flashinfer needs a CUDA device"),
        ({"bs": 0}, "bs must be at least 1, got 0"),
        ({"bs": 7, "ep_size": 2}, "bs 7 is global and must divide by ep_size 2; use --bs 8"),
        ({"num_pages": 0}, "num_pages must be at least"),
        ({"num_pages": 1}, "num_pages must be at least"),
        ({"page_size": 24}, "page_size must be a power of two"),
        ({"page_size": 8}, "page_size must be"),
        ({"max_seq_len": 4096}, "max_seq_len 4096 exceeds the model's 512 positions"),
        ({"ladder": ""}, "the ladder is empty"),
        ({"ladder": "1,2"}, "the largest entry must be 6"),
        ({"layers": 0}, "layers"),
        ({"layers": 3}, "layers: expected 1 … 2"),
        ({"overrides": {"n_experts": 4}}, "n_experts"),
        ({"proof_replays": 0, "verify": True}, "at least one replay"),
        ({"deadline_s": 0.0}, "deadline_s"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_with_the_reason(
    options: dict[str, Any], message: str, checkpoint: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_micro(checkpoint, **options).close()


def test_an_end_of_sequence_id_outside_the_vocabulary_is_refused_at_load(tmp_path: Path) -> None:
    path = micro_checkpoint(tmp_path)
    edit_config(path, lambda config: config.update(eos_token_id=VOCAB + 5))
    (path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=f"eos_token_id.*{VOCAB + 5}"):
        load_micro(path).close()


# ------------------------------------------------------------------ a device that fails


@dataclass
class FakeConfig:
    max_rows: int = 4
    num_pages: int = 9
    page_size: int = 16
    max_seq_len: int = 32
    logits_rows: int = 1
    ep_size: int = 1


@dataclass
class FakeModel:
    vocab_size: int = 10
    eos_token_ids: tuple[int, ...] = ()


@dataclass
class FakeEngine:
    """A device that publishes what the test says: nothing at all, a fault, or a token.

    Attributes:
        answers: False never publishes.
        fault: of every step.
        dead: raised by `check_alive`.
        late: raised by `check_ranks`.
    """

    answers: bool = True
    fault: int = 0
    dead: Exception | None = None
    late: Exception | None = None
    deadline_s: float = 0.05
    closed: int = 0
    config: FakeConfig = field(default_factory=FakeConfig)
    model_config: FakeModel = field(default_factory=FakeModel)
    ring_header: int = HEADER

    def __post_init__(self) -> None:
        self.ladder = Ladder.parse("1,4", self.config.max_rows)
        self.mailbox_layout = MailboxLayout(self.config.max_rows, 4, 16)
        self.mailbox = np.zeros((2, self.mailbox_layout.words), np.int32)
        self.ring = np.zeros((RING_SLOTS, RingLayout(self.config.max_rows).words), np.int32)
        self.ring_step = np.zeros(RING_SLOTS, np.int64)
        rows, vocab = self.config.max_rows, self.model_config.vocab_size
        self.ring_top = np.zeros((RING_SLOTS, rows, 2, MAX_TOP), np.int32)
        self.ring_logits = np.zeros((2, 1, vocab), np.float32)
        self.forced_tokens = np.zeros((rows, self.config.max_seq_len), np.int32)
        self.masks = np.zeros((2, rows, mask_words(vocab)), np.int32)
        self.step = 0

    def replay(self, key: GraphKey) -> None:
        slot = self.step % RING_SLOTS
        self.ring[slot, :2] = 0, self.fault
        if self.answers:
            self.ring_step[slot] = self.step + 1
        self.step += 1

    def check_alive(self) -> None:
        if self.dead:
            raise self.dead

    def check_ranks(self) -> None:
        if self.late:
            raise self.late

    def close(self) -> None:
        self.closed += 1


def fake(**options: Any) -> tuple[Runtime, FakeEngine]:
    engine = FakeEngine(**options)
    return Runtime(engine), engine  # type: ignore[arg-type]


def test_a_silent_device_is_given_up_after_the_deadline() -> None:
    runtime, _ = fake(answers=False)
    runtime.add([1])
    with pytest.raises(StepFailed, match="step 0 did not finish within 0.05 s; close this runtime"):
        runtime.step()


def test_a_late_peer_is_named_by_the_device_that_began_to_wait_for_it_after_the_host() -> None:
    """The device's deadline is the same, but runs from its own wait, in the midst of the step."""
    runtime, engine = fake(answers=False, config=FakeConfig(ep_size=2))
    named = time.monotonic() + 3 * engine.deadline_s

    def check_alive() -> None:
        if time.monotonic() > named:
            raise BarrierTimeout("rank 1 is late", (1,))

    engine.check_alive = check_alive  # type: ignore[method-assign]
    runtime.add([1])
    with pytest.raises(BarrierTimeout, match="rank 1 is late"):
        runtime.step()


def test_a_step_that_a_peer_missed_gives_no_tokens() -> None:
    """The device gives up its wait and finishes the step; what it published is worth nothing."""
    runtime, engine = fake(answers=True)
    runtime.add([1])
    runtime.step()
    engine.late = BarrierTimeout("rank 1 is late", (1,))
    with pytest.raises(BarrierTimeout, match="rank 1 is late"):
        runtime.step()
    with pytest.raises(StepFailed, match="BarrierTimeout: rank 1 is late"):
        runtime.launch()


def test_a_device_error_is_raised_instead_of_waiting_for_the_deadline() -> None:
    runtime, _ = fake(answers=False, dead=MemoryError("an illegal address"), deadline_s=60.0)
    with pytest.raises(MemoryError, match="an illegal address"):
        runtime.step()
    with pytest.raises(StepFailed, match="MemoryError: an illegal address"):
        runtime.launch()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (1, "more rows or prompt tokens were asked for than the graph holds"),
        (2, "a live token had no KV page"),
        (77, "77"),
    ],
)
def test_a_fault_is_named(fault: int, sentence: str) -> None:
    runtime, _ = fake(fault=fault)
    with pytest.raises(StepFailed, match=f"step 0: .*{sentence}"):
        runtime.step()


@pytest.mark.parametrize("how", [{"fault": 2}, {"answers": False}], ids=["fault", "silence"])
def test_after_a_failure_nothing_but_close_is_possible(how: dict[str, Any]) -> None:
    runtime, engine = fake(**how)
    runtime.add([1])
    with pytest.raises(StepFailed):
        runtime.step()
    engine.fault, engine.answers, steps = 0, True, engine.step
    for call in ("add", "step", "launch", "collect"):
        with pytest.raises(StepFailed, match="close"):
            CALLS[call](runtime)
    assert engine.step == steps, "a step was launched on a device that had failed"
    runtime.close()
    assert engine.closed == 1


def test_a_real_step_reports_a_page_that_is_missing(runtime: Runtime) -> None:
    runtime.add([1, 2, 3])
    runtime.step()
    runtime.engine.graphs.step.buffers["page_table"].zero_()
    with pytest.raises(StepFailed, match="step 1: a live token had no KV page"):
        runtime.step()


def test_an_old_ring_entry_is_not_taken_for_a_new_one() -> None:
    """Step 4 shares its slot with step 0, which has been published and collected."""
    runtime, engine = fake()
    for _ in range(RING_SLOTS):
        runtime.step()
    engine.answers = False
    with pytest.raises(StepFailed, match=f"step {RING_SLOTS} did not finish"):
        runtime.step()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"store": ""}, "store must not be empty text; leave it out for the default"),
        ({"weights": ""}, "weights must not be empty text"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*63\), got -1"),
    ],
)
def test_an_option_out_of_range_is_named_with_its_value(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Runtime.load("tiny", device="cpu", **options)


def test_kernel_choices_that_are_no_json_are_told_so(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text("{\n")
    options = RuntimeConfig(model=str(checkpoint), kernels=str(path))
    with pytest.raises(
        ValueError, match=r"kernels.json: expected auto, .*, and this file is no JSON"
    ):
        pinned(options)
