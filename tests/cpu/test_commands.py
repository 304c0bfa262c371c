"""The commands: exit codes, the JSON line, spellings of other engines, and every refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capture_cache.store import Store
from runtime import capture, cli, generate, replay_bench
from runtime.capture import TWIN_NOTE
from tests.cpu.terminal import ROOT, Terminal, small

# ------------------------------------------------------------------ capture


def test_capture_proves_records_and_reports(checkpoint: Path, terminal: Terminal) -> None:
    assert terminal.run(capture.main, *small(checkpoint, "--json")) == 0
    assert TWIN_NOTE in terminal.out
    report = terminal.report
    expected = {
        *("model", "bs", "device", "fingerprint", "attention", "ladder", "num_pages"),
        *("kernels_compiled", "kernels_loaded", "seconds", "stages_s", "ledger"),
    }
    assert expected <= report.keys()
    assert (report["bs"], report["device"], report["ladder"]) == (2, "CPU twin", "1,2,2+14")
    assert report["num_pages"] == 2 * 4 + 1
    keys = report["ledger"]["keys"]
    assert [k["key"] for k in keys] == ["1", "2", "2+14"]
    assert all(k["replays_proved"] > 0 for k in keys)
    assert any(report["fingerprint"] in str(path) for path in terminal.store.rglob("*"))


def test_a_second_capture_finds_its_own_record(checkpoint: Path, terminal: Terminal) -> None:
    fingerprints = []
    for options in ((), (), ("--max-seq-len", "48")):
        argv = small(checkpoint, *options, "--json", "--no-verify")
        assert terminal.run(capture.main, *argv) == 0
        fingerprints.append(terminal.report["fingerprint"])
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_no_verify_is_visible(checkpoint: Path, terminal: Terminal) -> None:
    assert terminal.run(capture.main, *small(checkpoint, "--json", "--no-verify")) == 0
    assert {k["replays_proved"] for k in terminal.report["ledger"]["keys"]} == {0}


def test_proof_replays_are_counted(checkpoint: Path, terminal: Terminal) -> None:
    argv = small(checkpoint, "--json", "--proof-replays", "4")
    assert terminal.run(capture.main, *argv) == 0
    assert {k["replays_proved"] for k in terminal.report["ledger"]["keys"]} == {5}


def test_spellings_of_other_engines(checkpoint: Path, terminal: Terminal) -> None:
    want, length = None, "--max-seq-len"
    for model in ("--model", "--model-path", "--ckpt"):
        for rows in ("--bs", "--max-batch-size"):
            for ladder in ("--ladder", "--cuda-graph-bs"):
                argv = (model, str(checkpoint), rows, "2", ladder, "1,2")
                more = (length, "64", "--page-size", "16", "--no-verify", "--json")
                length = {"--max-seq-len": "--max-model-len"}.get(length, "--context-length")
                assert terminal.run(capture.main, *argv, *more, "--device", "cpu") == 0
                want = want or terminal.report["fingerprint"]
                assert terminal.report["fingerprint"] == want, argv


@pytest.mark.parametrize("keys", [("1,2,2+14",), ("1", "2", "2+14"), ("1,2", "2+14")])
@pytest.mark.parametrize("option", ["--ladder", "--cuda-graph-bs"])
def test_keys_with_commas_or_spaces(
    option: str, keys: tuple[str, ...], checkpoint: Path, terminal: Terminal
) -> None:
    argv = ("--model", str(checkpoint), "--bs", "2", option, *keys, "--max-seq-len", "64")
    more = ("--page-size", "16", "--no-verify", "--json", "--device", "cpu")
    assert terminal.run(capture.main, *argv, *more) == 0
    assert terminal.report["ladder"] == "1,2,2+14"


@pytest.mark.parametrize("command", [capture, replay_bench, generate], ids=lambda m: m.__name__)
def test_every_option_is_explained(command: Any) -> None:
    for action in command.parser()._actions:
        assert action.help, f"{action.option_strings} has no help"


def test_what_is_wrong_takes_one_line(terminal: Terminal) -> None:
    assert terminal.run(capture.main, "--frobnicate") == 2
    assert terminal.err == (
        "error: unrecognized arguments: --frobnicate; see python -m runtime.capture --help\n"
    )


def test_a_hub_id_is_answered_with_how_to_get_it(terminal: Terminal) -> None:
    assert terminal.run(capture.main, "--model", "deepseek-ai/DeepSeek-V3") == 2
    assert "`hf download deepseek-ai/DeepSeek-V3` first" in terminal.err
    assert terminal.run(capture.main, "--model", "/models/deep-seek") == 2
    assert "hf download" not in terminal.err


def test_another_architecture_is_named_before_weights_that_are_missing(
    tmp_path: Path, terminal: Terminal
) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert terminal.run(capture.main, "--model", str(tmp_path)) == 2
    assert "LlamaForCausalLM" in terminal.err
    assert "safetensors" not in terminal.err


def test_a_preset_with_fewer_layers_and_overrides(terminal: Terminal) -> None:
    argv = ("--model", "tiny", "--layers", "2", "--override", "n_routed_experts=8", "--bs", "1")
    more = ("--ladder", "1", "--max-seq-len", "64", "--device", "cpu", "--json", "--no-verify")
    assert terminal.run(capture.main, *argv, *more) == 0
    assert terminal.report["model"] == "tiny"


@pytest.mark.parametrize(("words", "seconds"), [([], 10.0), (["--deadline-ms", "250"], 0.25)])
def test_the_deadline_is_ten_seconds_or_as_given_in_ms(words: list[str], seconds: float) -> None:
    parser = cli.command("runtime.capture", None)
    cli.add_selection(parser)
    assert cli.selection(parser.parse_args(words)).deadline_s == seconds


def test_without_a_length_a_small_model_gets_its_own(checkpoint: Path, terminal: Terminal) -> None:
    """512 positions: the default of 4096 would be refused."""
    argv = ("--model", str(checkpoint), "--device", "cpu", "--bs", "1", "--ladder", "1", "--json")
    digests = []
    for more in ((), ("--max-seq-len", "512"), ("--max-seq-len", "256")):
        assert terminal.run(capture.main, *argv, *more, "--no-verify") == 0
        digests.append(terminal.report["fingerprint"])
    assert digests[0] == digests[1] != digests[2]
    assert terminal.run(replay_bench.main, *argv, "--no-verify", "--steps", "2") == 0
    assert terminal.report["ctx_len"] == 512 - 2 - replay_bench.WARM_UP - 1


def test_where_no_terminal_shows_a_bar_stages_are_lines_of_stderr(
    checkpoint: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = small(checkpoint, "--ctx-len", "20", "--steps", "2")
    assert terminal.run(replay_bench.main, *argv) == 0
    told = [line.split(" s  ")[1] for line in terminal.err.splitlines()]
    for stage in ("weights", "warm up", "capture", "prove", "store", "replay"):
        assert told.count(stage) == 1, f"{stage}: {told}"
    monkeypatch.setattr(cli, "LINE_EVERY_S", 0.0)  # of a stage that takes long, pieces too
    assert terminal.run(replay_bench.main, *argv) == 0
    told = [line.split(" s  ")[1] for line in terminal.err.splitlines()]
    assert [t for t in told if t.startswith("replay")] == [
        *("replay", "replay 1/3 1", "replay 2/3 2", "replay 3/3 2+14"),
    ]


def test_as_a_process(checkpoint: Path, tmp_path: Path) -> None:
    """Under `python -m`: code, standard streams, and JSON as the very last line."""
    base = [sys.executable, "-m", "runtime.capture", *small(checkpoint, "--no-verify", "--json")]
    for more, code in (([], 0), (["--layers", "9"], 2)):
        argv = [*base, *more, "--store", str(tmp_path)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        if code == 0:
            assert json.loads(done.stdout.splitlines()[-1])["ladder"] == "1,2,2+14"
        else:
            assert done.stderr.startswith("error: ")
            assert done.stdout == ""


# ------------------------------------------------------------------ compile-only


TWICE = """
import sys
from runtime.capture import main
sys.exit(main(sys.argv[1:]) or main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_compile_only_reports_every_kernel_and_compiles_nothing_twice(tmp_path: Path) -> None:
    """In a process of its own, for the interpreter's switch is on in this one."""
    argv = [
        *("--model", "tiny", "--layers", "1", "--bs", "1", "--ladder", "1"),
        *("--max-seq-len", "128", "--compile-only", "sm_90", "--store", str(tmp_path), "--json"),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", TWICE, *argv],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{")
    assert first["arch"] == "sm_90"
    assert first["compiled"] == len(first["kernels"]) > 10
    assert first["cached"] == 0
    assert first["entries"] == second["entries"] == len(Store(tmp_path).kernels())
    assert (second["compiled"], second["cached"]) == (0, first["compiled"])
    for kernel in first["kernels"]:
        assert kernel["registers"] > 0, kernel
        assert kernel["spill_bytes"] == 0, kernel
        assert 0 <= kernel["shared_bytes"] <= 227 << 10, kernel
    names = {kernel["name"] for kernel in first["kernels"]}
    assert {"_intake", "_advance", "_mla_decode", "_settle", "_stamp"} <= names


# ------------------------------------------------------------------ the README


def test_the_readmes_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "Runtime.load" in block)
    assert example.count("\n") <= 25
    quick = f'store="{tmp_path}", verify=False, ladder="1,4,4+64"'
    example, count = re.subn(r'store="[^"]*"', quick, example)
    assert count == 1
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out
