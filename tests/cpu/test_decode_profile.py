"""The profile of a step: kernels read against what the step launches, files, and the diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import decode_profile
from bench.decode_profile import short_name
from bench.profile_kernels import by_kernel, by_part, diff, layer_kind, split_steps
from bench.profile_map import Event, Launch, place
from bench.profile_report import chrome_trace
from runtime.cli import run
from tests.cpu.twins import micro_checkpoint

STEP = [
    Launch("_intake", "begin", "", 0),
    Launch("_norm", "layer 0 attention", "", 0),
    Launch("_linear", "layer 0 attention", "qkv_a", 100),
    Launch("_sum", "layer 0 attention", "qkv_a", 0),
    Launch("_mla", "layer 0 attention", "", 900),
    Launch("_merge", "layer 0 attention", "", 0),
    Launch("_linear", "layer 0 mlp", "gate_up", 400),
    Launch("_settle", "settle", "", 0),
]


def _events(*names_and_times: tuple[str, float, float], at: float = 0.0) -> list[Event]:
    return [Event(name, at + begin, at + end) for name, begin, end in names_and_times]


SEEN = (
    ("_intake", 0, 2),
    ("_norm", 3, 5),
    ("_linear", 5, 15),
    ("_sum", 14, 16),  # overlaps the kernel before it
    ("FA3", 16, 40),
    ("_merge", 40, 44),
    ("_linear", 50, 90),
    ("_settle", 90, 91),
)


def test_each_kernel_is_found_in_its_part_and_for_its_weight() -> None:
    placed = place(_events(*SEEN), STEP)
    assert [(p.event.name, p.label) for p in placed if p.label] == [
        ("_linear", "qkv_a"),
        ("_sum", "qkv_a"),
        ("_linear", "gate_up"),
    ]
    parts = ["begin", *["layer 0 attention"] * 5, "layer 0 mlp", "settle"]
    assert [p.part for p in placed] == parts


def test_another_librarys_kernel_takes_the_bytes_of_the_one_it_replaces() -> None:
    placed = place(_events(*SEEN), STEP)
    assert {p.event.name: p.floor_bytes for p in placed if p.floor_bytes} == {
        "_linear": 400,
        "FA3": 900,
    }
    assert sum(p.floor_bytes for p in placed) == 1400


def test_gaps_are_what_no_kernel_fills() -> None:
    placed = place(_events(*SEEN), STEP)
    assert [p.gap for p in placed] == [0, 1, 0, 0, 0, 0, 6, 0]
    # A long kernel hides what ends before it.
    inside = place(_events(("_intake", 0, 10), ("_norm", 2, 3), ("_linear", 12, 14)), STEP)
    assert [p.gap for p in inside] == [0, 0, 2]


def test_steps_are_told_apart_by_their_first_kernel() -> None:
    late = _events(*SEEN, at=1000)
    both = split_steps([*late, *_events(*SEEN)], 2, "_intake")
    assert [len(step) for step in both] == [8, 8]
    assert both[0][0].begin < both[1][0].begin
    with pytest.raises(RuntimeError, match="holds 2 steps .kernels named _intake., 3 were run"):
        split_steps([*late, *_events(*SEEN)], 3, "_intake")


def test_a_kernel_is_summed_by_weight_with_share_floor_and_gap() -> None:
    steps = [place(_events(*SEEN, at=at), STEP) for at in (0, 500)]
    rows = {(r["name"], r["label"]): r for r in by_kernel(steps, 100.0, 20e6)}
    gate_up = rows["_linear", "gate_up"]
    assert (gate_up["count"], gate_up["us_per_step"], gate_up["share"]) == (1, 40, 0.4)
    assert (gate_up["floor_us"], gate_up["gap_us"]) == (20, 6)
    assert rows["_settle", ""]["floor_us"] is None
    assert next(iter(rows)) == ("_linear", "gate_up")


def test_a_part_has_its_clock_its_kernels_and_its_floor() -> None:
    clock = {"layer 0 attention": 45.0, "layer 0 mlp": 44.0}
    rows = by_part([place(_events(*SEEN), STEP)], clock, {"layer 0 attention": 1000}, 20e6)
    attention, mlp = rows
    assert (attention["clock_us"], attention["kernels_us"]) == (45, 42)
    assert (attention["gap_us"], attention["floor_us"]) == (1, 50)
    assert list(attention["kernels"]) == ["FA3", "_linear qkv_a", "_merge", "_norm", "_sum qkv_a"]
    assert mlp["floor_us"] is None


def test_kinds_of_layers() -> None:
    kinds = [layer_kind(p, 3) for p in ("embed", "layer 2 mlp", "layer 3 mlp", "layer 3 attention")]
    assert kinds == ["embed", "dense mlp", "experts", "attention"]


def test_the_trace_has_kernels_over_parts() -> None:
    trace = chrome_trace(place(_events(*SEEN, at=7), STEP))
    assert [e["ts"] for e in trace if e["tid"] == 1][:2] == [0, 3]
    attention = next(e for e in trace if e["name"] == "layer 0 attention")
    assert (attention["ts"], attention["dur"]) == (3, 41)
    assert chrome_trace([]) == []


def test_short_names() -> None:
    assert short_name("void flashinfer::mla::Kernel<int, 3>(float*)") == "Kernel"
    assert short_name("_linear_fp8_kernel") == "_linear_fp8_kernel"


# ------------------------------------------------------------------ two profiles


def _report(*kernels: tuple[str, float, float]) -> dict[str, Any]:
    rows = [{"name": n, "label": "", "count": c, "us_per_step": us} for n, c, us in kernels]
    return {"kernels": rows, "step_us": sum(us for _, _, us in kernels), "commit": "x"}


def test_a_diff_names_what_is_new_gone_and_changed() -> None:
    rows = diff(_report(("a", 2, 10), ("b", 1, 5)), _report(("a", 2, 12), ("c", 4, 20)))
    assert [(r["name"], r["state"], r["delta_us"]) for r in rows] == [
        ("c", "new", 20),
        ("b", "gone", -5),
        ("a", "both", 2),
    ]
    assert rows[0]["count"] == [None, 4]


def test_a_profile_of_before_labels_can_be_compared() -> None:
    old = {"kernels": [{"name": "a", "count": 1, "us_per_step": 3.0}]}
    assert diff(old, _report(("a", 1, 4)))[0]["delta_us"] == 1


# ------------------------------------------------------------------ the command


def _run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        run(decode_profile.main, [*argv])
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err


def _small(tmp_path: Path, *more: str) -> list[str]:
    return [
        *("--model", str(micro_checkpoint(tmp_path / "model")), "--device", "cpu", "--bs", "2"),
        *("--ladder", "1,2", "--max-seq-len", "64", "--page-size", "16", "--ctx-len", "20"),
        *("--steps", "3", "--store", str(tmp_path / "store"), *more),
    ]


def test_the_twin_is_profiled_by_operation_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    code, out, _ = _run(capsys, *_small(tmp_path, "--out", str(folder), "--json", "--rows", "1"))
    assert code == 0
    assert "CPU twin" in out
    report = json.loads(out.splitlines()[-1])
    assert not report["times_mean_something"]
    assert report["rows"] == 1
    counts = {(k["name"], k["label"]): k["count"] for k in report["kernels"]}
    assert counts["intake", ""] == counts["linear", "head"] == 1
    assert counts["add_rmsnorm", ""] == 4  # two a layer
    assert [p["part"] for p in report["parts"]] == [
        "embed",
        *(f"layer {i} {part}" for i in range(2) for part in ("attention", "mlp")),
        *("head", "settle"),
    ]
    assert {p.name for p in folder.iterdir()} == {
        f"decode_profile.{end}" for end in ("json", "trace.json", "png")
    }
    assert json.loads((folder / "decode_profile.json").read_text()) == report
    assert json.loads((folder / "decode_profile.trace.json").read_text())["traceEvents"]
    path = str(folder / "decode_profile.json")
    code, out, _ = _run(capsys, "--diff", path, path, "--json")
    assert code == 0
    assert {r["delta_us"] for r in json.loads(out.splitlines()[-1])["diff"]} == {0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rows", "3"], "--rows 3: not a key of the ladder 1,2; add it there"),
        (["--ctx-len", "60"], "--ctx-len 60 with 3 steps: expected 1 … 53"),
        (["--steps", "1"], "--steps 1: expected at least 2"),
        (["--diff", "a.json", "b.json"], "--diff a.json: expected a profile's JSON"),
    ],
)
def test_what_cannot_be_profiled_is_refused(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [a for a in _small(tmp_path) if a not in ("--ctx-len", "20", "--steps", "3")]
    code, _, err = _run(capsys, *argv, *more, *(["--steps", "3"] if "--steps" not in more else []))
    assert code == 2
    assert message in err


def test_the_help_says_what_to_do_without_gpu_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "--help")
    assert code == 0
    words = " ".join(out.split())
    assert "CUPTI serves one client at a time" in words
    assert "NVreg_RestrictProfilingToAdminUsers=1" in words
