"""`bench.ops`: every oracle against float64 through the command, and what its checks catch."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ops
from bench.ops_alternatives import FORMULATIONS, alternative
from bench.ops_contenders import OURS, Contender, Unable
from bench.ops_machine import Machine, Setting
from bench.ops_specs import BY_TOKEN, UNCHECKED, Floors, prefix, results, rotated, turned
from graphs.calls import Call, op_names
from graphs.candidates import candidates
from graphs.ops import Ops
from graphs.timing import Timing
from kernels.triton.linear import linear_ref
from runtime.cli import run

OPS = Ops(None)


def _run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    with pytest.raises(SystemExit) as end:
        run(ops.main, [*argv])
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, json.loads(out.splitlines()[-1]) if "--json" in argv else {}, err


def test_every_operation_of_a_step_is_held_to_its_definition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--device", "cpu", "--store", str(tmp_path / "s"), "--out", str(tmp_path), "--json")
    code, report, _ = _run(capsys, *argv)
    assert (code, report["wrong"]) == (0, 0)
    assert not report["times_mean_something"]
    assert json.loads((tmp_path / "ops.json").read_text())["cases"] == report["cases"]
    met = {case["op"].split(" ")[0] for case in report["cases"]}
    assert met == set(op_names(OPS))
    verdicts = {case["op"].split(" ")[0]: case["verdict"] for case in report["cases"]}
    assert {op for op, verdict in verdicts.items() if verdict == "unchecked"} == {
        *UNCHECKED,
        "advance",
    }
    assert {verdicts[op] for op in FORMULATIONS} == {"ok"}
    assert {case["routing"] for case in report["cases"]} == {"", "even", "skewed"}


def test_only_the_named_operations_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--device", "cpu", "--store", str(tmp_path), "--ops", "route,sample", "--rows", "2,5")
    code, report, _ = _run(capsys, *argv, "--json")
    assert code == 0
    assert {(c["op"].split(" ")[0], c["rows"]) for c in report["cases"]} == {
        (op, rows) for op in ("route", "sample") for rows in (2, 5)
    }


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--rows", "8,x"], "--rows must be positive numbers such as 8,32"),
        (["--ops", "lineal"], "--ops lineal: expected some of intake"),
        (["--routing", "odd"], "--routing odd: expected some of even, skewed"),
        (["--others", "cutlass"], "--others cutlass: expected some of torch"),
        (["--replays", "1"], "--replays 1: expected at least 3"),
        (["--quick", "--rows", "8"], "--quick chooses --rows itself"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device"),
    ],
)
def test_bad_arguments_are_refused(
    bad: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = _run(capsys, *bad)
    assert code == 2
    assert message in err


# ------------------------------------------------------------------ the check itself


def _linear(tokens: int = 6) -> Call:
    gen = torch.Generator().manual_seed(3)
    x, w = (torch.randn(n, 64, generator=gen) for n in (tokens, 32))
    return Call("linear", (x, w), {"out": torch.zeros(tokens, 32), "workspace": None})


def _verdict(
    launch: Callable[[Call], object], bits: str | None = "", library: str = OURS
) -> dict[str, Any]:
    args = ops.parser().parse_args(["--device", "cpu"])
    bench = ops.OpsBench(ops.Plan.of(args), 3, None)
    call = _linear()
    who = Contender("it", library, lambda c: partial(launch, c), bits)
    return bench._check(call, who, alternative(call), {})


def _right(call: Call) -> None:
    OPS.linear(*call.args, **call.kwargs)


def test_a_right_kernel_passes() -> None:
    got = _verdict(_right)
    assert (got["verdict"], got["exact"]) == ("ok", True)


def test_a_wrong_kernel_is_wrong() -> None:
    def wrong(call: Call) -> None:
        _right(call)
        call.kwargs["out"][3] *= 1.05

    assert _verdict(wrong)["verdict"] == "wrong"


def test_a_kernel_that_writes_nothing_is_wrong() -> None:
    assert _verdict(lambda call: None)["verdict"] == "wrong"


def test_a_kernel_that_gives_nan_is_wrong() -> None:
    assert _verdict(lambda call: call.kwargs["out"].fill_(float("nan")))["verdict"] == "wrong"


def test_a_kernel_whose_bits_change_from_run_to_run_is_unstable() -> None:
    runs = [0]

    def unstable(call: Call) -> None:
        _right(call)
        runs[0] += 1
        call.kwargs["out"][0, 0] *= 1 + 1e-6 * runs[0]

    assert _verdict(unstable)["verdict"] == "unstable"


def _by_count(call: Call) -> None:
    _right(call)
    if call.kwargs["out"].shape[0] > 1:
        call.kwargs["out"] *= 1 + 2e-7


def test_bits_that_depend_on_the_number_of_tokens_are_found() -> None:
    assert _verdict(_by_count)["verdict"] == "inexact"
    promised_nothing = _verdict(_by_count, bits=None)
    assert (promised_nothing["verdict"], promised_nothing["exact"]) == ("ok", False)


def _by_index(call: Call) -> None:
    _right(call)
    out = call.kwargs["out"]
    out *= 1 + 2e-7 * torch.arange(out.shape[0])[:, None]


def _by_neighbour(call: Call) -> None:
    _right(call)
    out, before = call.kwargs["out"], call.args[0].sum(1).roll(1)
    out *= torch.where(before > 0, 1.0, 1 + 2e-7)[:, None]


@pytest.mark.parametrize("bad", [_by_index, _by_neighbour])
def test_bits_that_depend_on_index_or_neighbours_are_found(bad: Callable[[Call], None]) -> None:
    assert _verdict(bad)["verdict"] == "inexact"


def _recorded(tmp_path: Path, op: str, overrides: tuple[str, ...]) -> tuple[Call, Ops]:
    """The first call of an operation in a step of seven tokens, as the step left its inputs."""
    setting = Setting("tiny", overrides, None, 100, (7,), "cpu", str(tmp_path))
    machine = Machine(setting, lambda *_: None)
    calls: list[Call] = []
    try:
        machine.walk(7, "skewed", lambda call: calls.append(call) if call.op == op else None)
        return _owned(calls[0]), machine.ops
    finally:
        machine.close()


def _owned(call: Call) -> Call:
    """The call on tensors of its own, which outlive the arena."""
    return call.replaced({key: tensor.clone() for key, tensor in call.tensors()})


@pytest.mark.parametrize("op", sorted(BY_TOKEN))
def test_a_turned_call_gives_every_token_its_bits(tmp_path: Path, op: str) -> None:
    fused = op in ("latent_query", "linear_fp8", "quantize")
    overrides = ("quantization=fp8", "qk_nope_head_dim=64", "qk_rope_head_dim=64")
    call, operations = _recorded(tmp_path, op, overrides if fused else ())
    run_op = getattr(operations, op)
    run_op(*call.args, **call.kwargs)
    before = results(call)
    other = turned(call)
    assert other is not None
    again, lines = other
    run_op(*again.args, **again.kwargs)
    after = results(again)
    assert [r.name for r in after] == [r.name for r in before]
    assert sorted(lines.tolist()) == list(range(len(before[0].value)))
    assert lines.tolist() != sorted(lines.tolist())
    for new, old in zip(after, before, strict=True):
        assert torch.equal(new.value, old.value[lines]), new.name
        assert not torch.equal(new.value, old.value), "turning it changed nothing: no check"


def test_a_grouped_kernel_whose_bits_depend_on_the_index_is_found(tmp_path: Path) -> None:
    call, operations = _recorded(tmp_path, "grouped_down", ())

    def bad(call: Call) -> None:
        operations.grouped_down(*call.args, **call.kwargs)
        call.kwargs["out"][: len(call.kwargs["out"]) // 2] *= 1.01

    operations.grouped_down(*call.args, **call.kwargs)
    bench = ops.OpsBench(ops.Plan.of(ops.parser().parse_args(["--device", "cpu"])), 3, None)
    who = Contender("it", OURS, lambda c: partial(bad, c), None)
    bad(call)
    assert bench._exact(call, who, results(call)) is False
    right = Contender("it", OURS, lambda c: partial(operations.grouped_down, *c.args, **c.kwargs))
    operations.grouped_down(*call.args, **call.kwargs)
    assert bench._exact(call, right, results(call)) is True


def test_a_library_may_refuse_a_shape_and_ours_may_not() -> None:
    def refuse(call: Call) -> None:
        raise Unable("no such shape")

    got = _verdict(refuse)
    assert (got["verdict"], got["why"]) == ("refused", "no such shape")

    def broken(call: Call) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")

    assert _verdict(broken)["verdict"] == "failed"
    got = _verdict(broken, library="torch")
    assert (got["verdict"], got["why"]) == ("refused", "CUBLAS_STATUS_NOT_SUPPORTED")


@pytest.mark.parametrize("error", [ImportError, AssertionError, TypeError])
def test_a_library_that_is_half_installed_is_a_row(error: type[Exception]) -> None:
    def broken(call: Call) -> None:
        raise error("undefined symbol")

    got = _verdict(broken, bits=None, library="flashmla")
    assert (got["verdict"], got["why"]) == ("refused", "undefined symbol")


def test_a_library_that_refuses_one_token_is_still_compared() -> None:
    def several(call: Call) -> None:
        if call.kwargs["out"].shape[0] == 1:
            raise RuntimeError("not supported")
        _right(call)

    got = _verdict(several, bits=None, library="torch")
    assert (got["verdict"], got["exact"]) == ("ok", None)
    assert got["why"] == "refuses one token: not supported"
    assert _verdict(several)["verdict"] == "failed"


def test_its_times_choose_kernels_as_a_capture_would() -> None:
    bench = ops.OpsBench(ops.Plan.of(ops.parser().parse_args(["--device", "cpu"])), 3, None)
    call = Call("linear", (torch.zeros(4, 256).bfloat16(), torch.zeros(96, 256).bfloat16()), {})
    found = [c for c in candidates(call) if c.exact]
    bench._candidates["site"] = found
    other = next(c.name for c in found[1:] if c.bits == found[0].bits)
    for tokens, us in ((1, 20.0), (8, 5.0)):
        times = dict.fromkeys((c.name for c in found), Timing(10.0, 10.0, 10.0, 1))
        times[other] = Timing(us, us, us, 1)
        bench._timed["site", tokens] = times
    picks = bench.choices().sites["site"].tokens
    assert (picks[1].kernel, picks[1].us) == (found[0].name, 10.0)
    assert (picks[8].kernel, picks[8].us) == (other, 5.0)


# ------------------------------------------------------------------ floors and rotation


def test_weights_are_rotated_past_the_cache_and_inputs_are_not() -> None:
    w = torch.randn(512, 1024)
    x = torch.randn(2, 1024)
    call = Call("linear", (x, w), {"out": torch.zeros(2, 512), "workspace": None})
    floors = Floors([w], 0)
    assert floors.bytes(call) == w.nbytes
    calls = rotated(call, floors, 3 * w.nbytes, 2, 8)
    assert len(calls) == 9
    assert len({c.args[1].data_ptr() for c in calls}) == 9
    assert {c.args[0].data_ptr() for c in calls} == {x.data_ptr()}
    for c in calls:
        OPS.linear(*c.args, **c.kwargs)
        want = torch.zeros(2, 512)
        linear_ref(x, w, out=want)
        assert torch.equal(c.kwargs["out"], want)


def test_the_floor_counts_only_experts_that_were_chosen() -> None:
    w = torch.zeros(4, 512, 256)
    offsets = torch.tensor([0, 3, 3, 4, 4], dtype=torch.int32)
    pairs = torch.zeros(8, dtype=torch.int32)
    call = Call("grouped_down", (torch.zeros(8, 256), None, w, None, offsets, pairs), {})
    assert Floors([w], 0).bytes(call) == w.nbytes // 2


def test_a_prefix_is_the_same_product_for_fewer_tokens() -> None:
    call = _linear()
    _right(call)
    alone = prefix(call, 2)
    assert alone is not None
    _right(alone)
    assert torch.equal(results(alone)[0].value, call.kwargs["out"][:2])
    assert prefix(Call("route", (), {}), 1) is None
