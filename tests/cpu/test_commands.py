"""The commands: exit codes, the JSON line, spellings of other engines, and every refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime import capture, cli, generate, replay_bench
from runtime.capture import TWIN_NOTE
from runtime.cli import run
from tests.cpu.checkpoints import edit_config, read_tensors, write_tensors
from tests.cpu.twins import micro_checkpoint

ROOT = Path(runtime.__file__).parent.parent
Main = Callable[[list[str] | None], int]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("micro"))


class Terminal:
    """Runs commands as a shell would, in this process: code, what they print, JSON at its end."""

    def __init__(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.store, self._capsys = store, capsys
        self.out = self.err = ""

    def run(self, main: Main, *argv: str) -> int:
        with pytest.raises(SystemExit) as end:
            run(main, [*argv, "--store", str(self.store)])
        self.out, self.err = self._capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code

    @property
    def report(self) -> dict[str, Any]:
        assert self.out.endswith("}\n"), "JSON is not the last line"
        report = json.loads(self.out.splitlines()[-1])
        assert isinstance(report, dict)
        return report


@pytest.fixture
def terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(tmp_path / "store", capsys)


def small(checkpoint: Path, *more: str) -> list[str]:
    """Two rows of at most 64 tokens."""
    return [
        *("--model", str(checkpoint), "--device", "cpu", "--bs", "2", "--ladder", "1,2,2+14"),
        *("--max-seq-len", "64", "--page-size", "16", *more),
    ]


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
    want = None
    for model in ("--model", "--model-path", "--ckpt"):
        for rows in ("--bs", "--max-batch-size"):
            for ladder in ("--ladder", "--cuda-graph-bs"):
                argv = (model, str(checkpoint), rows, "2", ladder, "1,2")
                more = ("--max-model-len", "64", "--page-size", "16", "--no-verify", "--json")
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


REFUSED: dict[str, tuple[list[str], str]] = {
    "no rows": (["--bs", "0"], "bs must be at least 1, got 0"),
    "rows are no number": (["--bs", "many"], "invalid int value: 'many'"),
    "ladder too short": (["--bs", "4"], "the largest entry must be 4 (--bs divided by --ep-size)"),
    "ladder malformed": (["--ladder", "1,2x"], "ladder entry '2x' is neither ROWS nor"),
    "ladder empty": (["--ladder", ""], "the ladder is empty"),
    "too long": (["--max-seq-len", "4096"], "exceeds the model's 512 positions"),
    "page size": (["--page-size", "48"], "page_size must be a power of two"),
    "pages": (["--num-pages", "1"], "num_pages must be at least"),
    "no pages": (["--num-pages", "0"], "num_pages must be at least"),
    "layers": (["--layers", "3"], "layers: expected 1 … 2"),
    "no layers": (["--layers", "0"], "layers"),
    "override": (["--override", "n_experts=4"], "n_experts"),
    "override form": (["--override", "n_group"], "n_group"),
    "device": (["--device", "tpu"], "invalid choice: 'tpu'"),
    "cuda": (["--device", "cuda"], "--device cuda: torch sees no CUDA device"),
    "flashinfer": (["--attention", "flashinfer"], "--attention flashinfer needs a CUDA device"),
    "hopper": (["--attention", "hopper"], "--attention hopper needs a CUDA device"),
    "ranks": (["--ep-size", "2"], "--ep-size 2"),
    "uneven ranks": (["--bs", "2", "--ep-size", "4"], "must divide by ep_size 4; use --bs 4"),
    "model": (["--model", "deepseek-v4"], "presets tiny, moonlight, deepseek-v3, kimi-k2"),
    "chip": (["--compile-only", "sm_80"], "--compile-only takes sm_90 (Hopper) or sm_100"),
    "jobs": (["--jobs", "2"], "--jobs goes with --compile-only"),
    "replays": (["--proof-replays", "0"], "replay"),
    "replays unproved": (["--no-verify", "--proof-replays", "9"], "--proof-replays"),
    "deadline": (["--deadline-ms", "0"], "deadline_s (--deadline-ms) must be more than 0, got 0"),
    "unknown": (["--max-batch", "4", "--frobnicate"], "--frobnicate"),
    "two spellings": (["--max-model-len", "48"], "--max-model-len"),
    "two models": (["--model-path", "tiny"], "--model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_end_with_2_and_the_reason(
    name: str, checkpoint: Path, terminal: Terminal
) -> None:
    more, reason = REFUSED[name]
    assert terminal.run(capture.main, *small(checkpoint, *more)) == 2
    assert reason in terminal.err
    assert "Traceback" not in terminal.err


def break_architecture(path: Path) -> None:
    edit_config(path, lambda config: config.update(architectures=["LlamaForCausalLM"]))


def break_weights(path: Path) -> None:
    shard = path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def rename_a_tensor(path: Path) -> None:
    tensors = read_tensors(path)
    tensors["model.norm.wait"] = tensors.pop("model.norm.weight")
    write_tensors(path, tensors)


def remove_the_config(path: Path) -> None:
    (path / "config.json").unlink()


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (break_architecture, "LlamaForCausalLM"),
        (break_weights, "model.safetensors"),
        (rename_a_tensor, "model.norm.weight"),
        (remove_the_config, "config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_checkpoint_ends_with_2_and_names_what_is_wrong(
    break_it: Callable[[Path], None], reason: str, tmp_path: Path, terminal: Terminal
) -> None:
    path = micro_checkpoint(tmp_path / "model")
    break_it(path)
    assert terminal.run(capture.main, *small(path)) == 2
    assert reason in terminal.err


def test_a_failed_proof_ends_with_1(tmp_path: Path, terminal: Terminal) -> None:
    path = micro_checkpoint(tmp_path / "model")
    tensors = read_tensors(path)
    tensors["model.norm.weight"].fill_(3e38)
    write_tensors(path, tensors)
    assert terminal.run(capture.main, *small(path)) == 1
    assert terminal.err.startswith("error: ProofFailed: key ")
    assert terminal.err.count("\n") == 1


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
    assert (second["compiled"], second["cached"]) == (0, first["compiled"])
    for kernel in first["kernels"]:
        assert kernel["registers"] > 0, kernel
        assert kernel["spill_bytes"] == 0, kernel
        assert 0 <= kernel["shared_bytes"] <= 227 << 10, kernel
    names = {kernel["name"] for kernel in first["kernels"]}
    assert {"_intake", "_advance", "_mla_decode", "_settle", "_stamp"} <= names


# ------------------------------------------------------------------ replay_bench


def test_replay_bench_times_every_key_and_writes_its_files(
    checkpoint: Path, tmp_path: Path, terminal: Terminal
) -> None:
    out = tmp_path / "out"
    argv = small(checkpoint, "--ctx-len", "20", "--steps", "4", "--out", str(out), "--json")
    assert terminal.run(replay_bench.main, *argv) == 0
    assert TWIN_NOTE in terminal.out
    report = terminal.report
    assert report["times_mean_something"] is False
    expected = {"command", "commit", "device", "versions", "ctx_len", "steps", "keys", "parts_us"}
    assert expected <= report.keys()
    assert [k["key"] for k in report["keys"]] == ["1", "2", "2+14"]
    for key in report["keys"]:
        assert 0 < key["p50_us"] <= key["p99_us"]
        assert key["host_us"] > 0
        assert 0 < key["graph_launch_us"] < key["host_us"]
        assert 0 < key["python_us"] < key["host_us"]
        assert key["floor"]["total"] > 0
        assert key["new_tokens_per_s"] > 0
    assert report["marks"] == {"python_us": 30.0, "idle_us": 3.0}
    assert "mark 30; launch us" in " ".join(terminal.out.split())
    assert report["parts_key"] == "2"
    assert list(report["parts_us"]) == [
        *("embed", "layer 0 attention", "layer 0 mlp", "layer 1 attention", "layer 1 mlp"),
        *("head", "settle"),
    ]
    record, plot, trace = (out / f"replay_bench.{kind}" for kind in ("json", "png", "trace.json"))
    assert json.loads(record.read_text()) == report
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    events = json.loads(trace.read_text())["traceEvents"]
    assert [event["name"] for event in events] == list(report["parts_us"])
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in events)


def test_replay_bench_takes_the_keys_it_is_told(checkpoint: Path, terminal: Terminal) -> None:
    argv = small(checkpoint, "--ctx-len", "9", "--steps", "2", "--keys", "2,2+14", "--json")
    assert terminal.run(replay_bench.main, *argv, "--no-verify") == 0
    assert [k["key"] for k in terminal.report["keys"]] == ["2", "2+14"]


@pytest.mark.parametrize("context", [1, 56, 57])
def test_replay_bench_takes_every_context_that_it_says_it_takes(
    context: int, checkpoint: Path, terminal: Terminal
) -> None:
    argv = small(checkpoint, "--ctx-len", str(context), "--steps", "4", "--no-verify")
    code = terminal.run(replay_bench.main, *argv)
    if code:
        assert code == 2
        assert f"--ctx-len {context} with 4 steps: expected 1 … " in terminal.err
        assert int(re.findall(r"1 … (\d+)", terminal.err)[0]) < context


def test_replay_bench_of_a_prompt_chunk_longer_than_a_request_may_be(
    checkpoint: Path, terminal: Terminal
) -> None:
    """The default ladder has keys of 512 prompt tokens, whatever --max-seq-len is."""
    argv = [
        *("--model", str(checkpoint), "--device", "cpu", "--bs", "2", "--no-verify", "--json"),
        *("--max-seq-len", "32", "--page-size", "16", "--ctx-len", "8", "--steps", "2"),
    ]
    ladder = ("--ladder", "1,2,2+40,2+80")
    assert terminal.run(replay_bench.main, *argv, *ladder) == 0
    assert [k["key"] for k in terminal.report["keys"]] == ["1", "2"]
    assert terminal.report["skipped_keys"] == ["2+40", "2+80"]
    assert "skipped    2+40, 2+80: a prompt that fills the key is longer" in terminal.out
    assert terminal.run(replay_bench.main, *argv, *ladder, "--keys", "2+40") == 2
    assert "raise it, or name other --keys" in terminal.err


BENCH_REFUSED: dict[str, tuple[list[str], str]] = {
    "context": (["--ctx-len", "2000"], "--ctx-len 2000 with 4 steps: expected 1 … "),
    "no context": (["--ctx-len", "0"], "--ctx-len 0"),
    "no steps": (["--steps", "0"], "--steps"),
    "keys": (["--keys", "3"], "--keys 3: not in the ladder 1,2,2+14"),
    "malformed keys": (["--keys", "two"], "'two' is neither ROWS nor"),
    "no keys": (["--keys", ""], "neither ROWS nor"),
    "bandwidth": (["--bandwidth", "-1"], "--bandwidth"),
    "unknown": (["--proof-replays", "3"], "unrecognized arguments: --proof-replays 3"),
}


@pytest.mark.parametrize("name", BENCH_REFUSED)
def test_replay_bench_refuses_with_the_reason(
    name: str, checkpoint: Path, terminal: Terminal
) -> None:
    more, reason = BENCH_REFUSED[name]
    argv = small(checkpoint, "--ctx-len", "20", "--steps", "4", "--no-verify", *more)
    assert terminal.run(replay_bench.main, *argv) == 2
    assert reason in terminal.err


def test_replay_bench_without_enough_pages_ends_with_1(
    checkpoint: Path, terminal: Terminal
) -> None:
    argv = small(checkpoint, "--ctx-len", "40", "--steps", "2", "--num-pages", "4", "--no-verify")
    assert terminal.run(replay_bench.main, *argv) == 1
    assert terminal.err.startswith("error: OutOfPages: ")


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
