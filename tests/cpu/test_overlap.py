"""Dependent launch: every kernel of a step waits for its inputs before it uses them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graphs.devices import bind_views
from graphs.ops import Ops
from graphs.weights import add_part_views
from kernels.triton.overlap import MODES, OFF
from runtime.assemble import make_step
from runtime.config import RuntimeConfig
from runtime.selection import choose
from tests.cpu.sass import Sass

ROOT = Path(__file__).resolve().parents[2]
# Launched in the ordinary way; none is part of a step that is captured to be served.
ORDINARY = {"_stamp", "_fill_kernel", "_read_kernel"}
# What reads or writes its first argument.
TOUCHING = ("load", "store", "load_tile", "prefetch_rows", "_norm_weight", "_spread")


@pytest.fixture(scope="module")
def listed() -> dict[str, list[dict[str, Any]]]:
    """The kernels of a step by mode, with their PTX, from a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.cpu.test_overlap"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("mode", ["late", "early"])
def test_every_kernel_of_a_step_waits_before_it_touches_what_steps_write(
    listed: dict[str, list[dict[str, Any]]], mode: str
) -> None:
    names = {k["name"] for k in listed[mode]}
    met = {
        "_add_rmsnorm",
        "_linear_fp8_kernel",
        "_gate_up_kernel",
        "_router_kernel",
        "_route",
        "_merge",
        "_absorb_v_few",
    }
    assert met <= names
    for kernel in listed[mode]:
        if kernel["name"] in ORDINARY:
            assert not kernel["pdl"], kernel["name"]
            continue
        assert kernel["pdl"], f"{kernel['name']} is launched without overlap"
        assert kernel["waits"], f"{kernel['name']} never waits"
        assert kernel["stores_before_wait"] == 0, kernel["name"]
        assert kernel["exits_before_wait"] == 0, kernel["name"]


def test_off_has_no_trace_of_it(listed: dict[str, list[dict[str, Any]]]) -> None:
    assert not [k["name"] for k in listed["off"] if k["pdl"] or k["waits"] or k["releases"]]
    assert not [k["name"] for k in listed["off"] if k["asks_before_wait"] or k["asks"]]


def test_streams_ask_for_their_first_weights_before_they_wait(
    listed: dict[str, list[dict[str, Any]]],
) -> None:
    asking = {k["name"] for k in listed["late"] if k["asks"]}
    assert asking == {"_linear_fp8_kernel", "_linear_kernel", "_latent_query", "_down_kernel"}
    assert all(k["asks"] == k["asks_before_wait"] for k in listed["late"])


def test_early_lets_dependents_go_and_late_does_so_after_the_stream(
    listed: dict[str, list[dict[str, Any]]],
) -> None:
    for mode, first in (("early", True), ("late", False)):
        for kernel in listed[mode]:
            if kernel["name"] in ("_linear_fp8_kernel", "_gate_up_kernel", "_down_kernel"):
                assert kernel["releases"], kernel["name"]
                # Down looks at gate_up's counters: it may not start before their reset is complete.
                counted = kernel["name"] == "_gate_up_kernel"
                assert kernel["release_first"] is (first and not counted), (mode, kernel["name"])


def test_before_the_wait_only_what_no_step_writes_is_loaded() -> None:
    """By source: the loads above `await_inputs` name weights and nothing else."""
    allowed = {
        "weight",
        "bias",
        "w",
        "w_uk",
        "w_rows",
        "w_uv",
        "q_norm_weight",
        "kv_norm_weight",
        "ahead",
        "w_scale",
    }
    checked = 0
    for path in sorted((ROOT / "kernels" / "triton").glob("*.py")):
        for function in ast.parse(path.read_text()).body:
            if not isinstance(function, ast.FunctionDef) or path.name == "overlap.py":
                continue
            calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
            waits = [c.lineno for c in calls if _callee(c).startswith("await_inputs")]
            if not waits:
                continue
            checked += 1
            arguments = {a.arg for a in function.args.args}
            for call in calls:
                touches = _callee(call) in TOUCHING
                if touches and call.lineno < min(waits):
                    used = {n.id for a in call.args[:1] for n in ast.walk(a) if _is_name(n)}
                    assert used & arguments <= allowed | _sizes(function), (path.name, call.lineno)
                if _callee(call) == "await_inputs_with":
                    used = {n.id for n in ast.walk(call.args[0]) if _is_name(n)}
                    assert used & arguments == {"kv_len"}, (path.name, call.lineno)
    assert checked >= 20


def test_what_a_steps_beginning_wrote_is_complete_when_it_is_loaded_before_a_wait() -> None:
    """Between `advance`, which writes kv_len, and every kernel that loads it so there is one that
    lets its dependents start only after its own wait."""
    early = _kernels_that_call("await_inputs_with")
    streams = _kernels_that_call("await_inputs_streaming")
    assert early == {"_absorb_v", "_absorb_v_few"}
    assert early.isdisjoint(streams)
    met = set()
    for model, overrides in (("deepseek-v3", ()), ("deepseek-v3", ("quantization=none",))):
        for launched in _launches(model, overrides):
            readers = [i for i, name in enumerate(launched) if name in early]
            assert launched.count("_advance") == 1
            between = launched[launched.index("_advance") : readers[0]]
            assert streams & {*between}, between
            met |= {launched[i] for i in readers}
    assert met == early


def test_loads_that_are_held_are_in_flight_together(
    listed: dict[str, list[dict[str, Any]]],
) -> None:
    """By machine code: nothing is added up between the wait and the barrier behind the loads."""
    for mode in ("late", "early"):
        held = {k["name"]: k for k in listed[mode] if k["holds"]}
        assert {*held} == {"_add_rmsnorm", "_mla_prep"}
        for kernel in listed[mode]:
            assert kernel["adds_while_held"] == 0, (mode, kernel["name"])
    assert not [k["name"] for k in listed["off"] if k["holds"]]


def test_the_mode_is_settled_before_capture() -> None:
    common = {"model": "tiny", "bs": 2, "max_seq_len": 256}
    assert choose(RuntimeConfig.of(**common, device="cpu")).step.pdl == "off"
    ahead = choose(RuntimeConfig.of(**common), compile_only=True)
    assert MODES[ahead.step.pdl] != OFF
    chosen = choose(RuntimeConfig.of(**common, pdl="late"), compile_only=True)
    assert chosen.step.pdl == "late"
    with pytest.raises(ValueError, match="--pdl early needs a CUDA device"):
        choose(RuntimeConfig.of(**common, device="cpu", pdl="early"))
    with pytest.raises(ValueError, match="pdl must be one of auto, off, late, early"):
        RuntimeConfig.of(**common, pdl="yes")


def _callee(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def _sizes(function: ast.FunctionDef) -> set[str]:
    """Constexprs: numbers that cannot be buffers."""
    return {a.arg for a in function.args.args if a.annotation is not None}


def _kernels_that_call(name: str) -> set[str]:
    found = set()
    for path in sorted((ROOT / "kernels" / "triton").glob("*.py")):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and path.name != "overlap.py":
                calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
                if any(_callee(c) == name for c in calls):
                    found.add(function.name)
    return found


class _Noted:
    """Launches nothing, and keeps the names of what it was to launch."""

    arch, num_sms, pdl = "sm_90", 132, MODES["late"]

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.names.append(kernel.__name__)


def _launches(model: str, overrides: tuple[str, ...]) -> Iterator[list[str]]:
    """What a step launches, in order, by key."""
    options: dict[str, Any] = {"layers": 2, "bs": 32, "max_seq_len": 4096, "num_pages": 3}
    chosen = RuntimeConfig.of(model=model, overrides=overrides, device="cpu", **options)
    selection = choose(chosen, compile_only=True)
    views = bind_views(None, selection.layout, torch.device("meta"))
    add_part_views(views)
    for key in selection.ladder.keys:
        noted = _Noted()
        make_step(selection, Ops(noted), views, None).run(key)
        yield noted.names


def _held(cubin: bytes) -> dict[str, int]:
    """Barriers behind loads that are held, and additions between the wait and such a barrier."""
    code = Sass.of(cubin)
    holds, adds = [*code.at("BAR.RED")], 0
    for hold in holds:
        wait = max(i for i in code.at("ACQBULK") if i < hold)
        adds += len({*code.at("FADD", "FFMA")} & {*range(wait, hold)})
    return {"holds": len(holds), "adds_while_held": adds}


def _facts(spec: Any, ptx: str) -> dict[str, Any]:
    wait = ptx.find("griddepcontrol.wait")
    release = ptx.find("griddepcontrol.launch_dependents")
    before = ptx[:wait] if wait >= 0 else ""
    return {
        "name": spec.name,
        "pdl": spec.pdl,
        "waits": wait >= 0,
        "releases": release >= 0,
        "release_first": 0 <= release < wait,
        "asks": ptx.count("prefetch.global.L2"),
        "asks_before_wait": before.count("prefetch.global.L2"),
        "stores_before_wait": before.count("st.global") + before.count("red.global"),
        "exits_before_wait": before.count("\tret;"),
    }


def _requests(mode: str, rows: int) -> list[Any]:
    from runtime.assemble import list_kernels

    options = {"layers": 5, "overrides": ("n_routed_experts=32",), "ladder": str(rows), "bs": rows}
    chosen = RuntimeConfig.of(model="deepseek-v3", pdl=mode, **options)
    return list(list_kernels(choose(chosen, compile_only=True), "sm_90", ["triton"]).requests)


def _report() -> dict[str, list[dict[str, Any]]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found: dict[str, list[dict[str, Any]]] = {}
    for mode in MODES:
        listed = _requests(mode, 32)
        listed += [r for r in _requests(mode, 8) if r.function == "_absorb_v_few"]
        found[mode] = []
        for request in listed:
            spec = request.spec
            aligned: dict[Any, Any] = {(i,): [["tt.divisibility", 16]] for i in spec.aligned}
            source = ASTSource(
                request.resolve(), dict(spec.signature), dict(request.constexprs), aligned
            )
            options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            found[mode].append(_facts(spec, made.asm["ptx"]) | _held(made.asm["cubin"]))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_report()))
