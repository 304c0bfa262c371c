"""Streaming text: no character is ever split, nothing is lost, and the command around it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from runtime import Runtime, StepOutput, generate
from runtime.cli import run
from runtime.generate import REPLACEMENT, TextStream
from tests.cpu.terminal import ROOT
from tests.cpu.twins import MAX_SEQ_LEN, PAGE, micro_checkpoint

CORPUS = ["the cat sat on the mat, the cat", "Grüße aus Köln", "日本語の文字", "naïve café"]
TEXTS = [
    "plain text",
    "Grüße, Jürgen! naïve café",
    "日本語とemoji 👩‍👩‍👧‍👦 🇩🇪 mixed",
    "a\ufffdb \ufffd",  # the character itself, which is not an incomplete one
    "ends in a wide one 👍",
    " leading and trailing ",
    "\n\ttabs\n",
]


def byte_level_bpe(vocab_size: int = 300) -> Tokenizer:
    """All 256 bytes, some merges and one special token: characters are split across tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    """As sentencepiece does: a token carries its leading space, which the first one loses."""
    vocab = {"<unk>": 0, "\u2581": 1} | {f"\u2581{w}": i for i, w in enumerate(("the", "cat"), 2)}
    vocab |= {letter: i for i, letter in enumerate("thecasmon", 4)}
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("\u2581", "the"),
        ("c", "a"),
        ("ca", "t"),
        ("\u2581", "cat"),
    ]
    vocab |= {
        "".join(pair): len(vocab) + i for i, pair in enumerate(merges) if "".join(pair) not in vocab
    }
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


TOKENIZER = byte_level_bpe()
BYTE_TOKENS = byte_level_bpe(257)  # no merges: each byte is a token


def stream(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    """What each token completes, and what is left at the end."""
    text = TextStream(tokenizer)
    return [text.push(i) for i in ids], text.finish()


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BYTE_TOKENS], ids=["merges", "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_make_the_text(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text).ids
    pieces, rest = stream(tokenizer, ids)
    assert "".join(pieces) + rest == text
    if REPLACEMENT not in text:
        assert rest == ""
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    ids = BYTE_TOKENS.encode("a👍b").ids
    assert stream(BYTE_TOKENS, ids) == (["a", "", "", "", "👍", "b"], "")


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_an_incomplete_end_is_one_replacement_character(missing: int) -> None:
    ids = BYTE_TOKENS.encode("ok👍").ids[:-missing]
    pieces, rest = stream(BYTE_TOKENS, ids)
    assert pieces == ["o", "k"] + [""] * (4 - missing)
    assert rest == BYTE_TOKENS.decode(ids)[2:]
    assert set(rest) == {REPLACEMENT}


def test_bytes_that_are_no_text_do_not_hold_up_what_follows() -> None:
    broken = BYTE_TOKENS.encode("👍").ids[:2]
    ids = [*broken, *BYTE_TOKENS.encode("then text").ids]
    pieces, rest = stream(BYTE_TOKENS, ids)
    assert pieces[2].endswith("t")
    assert "".join(pieces) + rest == BYTE_TOKENS.decode(ids)
    assert rest == ""


def test_special_tokens_are_not_shown() -> None:
    eos = TOKENIZER.token_to_id("<eos>")
    ids = [*TOKENIZER.encode("one").ids, eos, *TOKENIZER.encode(" two").ids, eos]
    pieces, rest = stream(TOKENIZER, ids)
    assert "".join(pieces) + rest == "one two"


def test_a_space_that_a_token_carries_is_kept() -> None:
    tokenizer = word_pieces()
    ids = tokenizer.encode("the cat the cat").ids
    assert len(ids) == 4
    assert stream(tokenizer, ids) == (["the", " cat", " the", " cat"], "")


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40))
def test_any_tokens_stream_to_what_they_decode_to(ids: list[int]) -> None:
    pieces, rest = stream(TOKENIZER, ids)
    assert "".join(pieces) + rest == TOKENIZER.decode(ids)


def test_a_stream_of_nothing_is_nothing() -> None:
    assert stream(TOKENIZER, []) == ([], "")


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate")
    micro_checkpoint(path, vocab_size=TOKENIZER.get_vocab_size())
    TOKENIZER.save(str(path / "tokenizer.json"))
    return path


def arguments(path: Path, *more: str) -> list[str]:
    sizes = ["--max-seq-len", str(MAX_SEQ_LEN), "--page-size", str(PAGE), "--ladder", "1,1+15"]
    where = ["--device", "cpu", "--store", str(path / "store")]
    return ["--model", str(path), *sizes, *where, *more]


def command(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        run(generate.main, argv)
    assert isinstance(end.value.code, int)
    return end.value.code


def test_text_is_streamed_and_summed_up(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(checkpoint, "--prompt", "Grüße, 日本", "--max-tokens", "24", "--json")
    assert command(argv) == 0
    shown, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    report = json.loads(last)
    assert report["prompt_tokens"] == len(TOKENIZER.encode("Grüße, 日本").ids)
    assert len(report["tokens"]) == 24
    assert report["finish_reason"] == "length"
    assert report["text"] == TOKENIZER.decode(report["tokens"]) == shown
    assert command(argv) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["tokens"] == report["tokens"], "the same prompt gave other tokens"


def test_the_models_end_of_sequence_ends_the_text(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--prompt", "the", "--max-tokens", "8", "--json")
    assert command(arguments(checkpoint, *argv)) == 0
    tokens = json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]
    path = micro_checkpoint(tmp_path, vocab_size=TOKENIZER.get_vocab_size(), eos_token_id=tokens[3])
    TOKENIZER.save(str(path / "tokenizer.json"))
    assert command(arguments(path, *argv)) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["tokens"] == tokens[: tokens.index(tokens[3]) + 1]
    assert report["finish_reason"] == "stop"
    assert command(arguments(path, *argv, "--ignore-eos")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == tokens


def test_sampled_text_can_be_had_again(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--prompt", "the", "--max-tokens", "16", "--json", "--temperature", "1.5")
    reports = []
    for _ in range(2):
        assert command(arguments(checkpoint, *argv, "--top-p", "0.95")) == 0
        reports.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert reports[0]["tokens"] != reports[1]["tokens"]
    seed = str(reports[1]["sample_seed"])
    assert command(arguments(checkpoint, *argv, "--top-p", "0.95", "--sample-seed", seed)) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["tokens"] == reports[1]["tokens"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "x", "--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["--prompt", ""], "prompt is a non-empty list"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["--prompt", "x", "--max-tokens", "96"], "exceeds max_seq_len 96"),
        (["--prompt", "x", "--model", "tiny"], "text needs a checkpoint directory with its token"),
        (["--prompt", "x", "--num-pages", "6", "--max-tokens", "95"], "lower --max-tokens"),
        (["--prompt", "x", "--ep-size", "2"], "a command of one process and one GPU, and this is"),
        ([], "the following arguments are required: --prompt"),
        (["--prompt", "x", "--temprature", "1"], "unrecognized arguments: --temprature"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_end_with_2_and_the_reason(
    more: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(arguments(checkpoint, *more)) == 2
    assert message in capsys.readouterr().err


def test_one_of_several_ranks_is_refused_clearly(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert command(arguments(checkpoint, "--prompt", "x")) == 2
    assert "this is one of 2 ranks: start it without torchrun" in capsys.readouterr().err


def test_a_terminal_that_knows_no_utf8_still_gets_its_text(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert command(arguments(checkpoint, "--prompt", "the", "--max-tokens", "12")) == 0
    assert len(raw.getvalue()) >= 12


def test_who_reads_no_further_ends_it_without_a_word(checkpoint: Path) -> None:
    argv = arguments(checkpoint, "--prompt", "the", "--max-tokens", "90")
    program = [sys.executable, "-m", "runtime.generate", *argv]
    with subprocess.Popen(program, cwd=ROOT, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        told = process.stderr.read().decode()
    assert process.returncode == 128 + signal.SIGPIPE
    assert "Error" not in told
    assert "Traceback" not in told


def test_an_interrupt_is_told_on_a_line_of_its_own(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, left = Runtime.step, iter((True, True, False))

    def interrupted(runtime: Runtime) -> StepOutput:
        if next(left):
            return step(runtime)
        raise KeyboardInterrupt

    monkeypatch.setattr(Runtime, "step", interrupted)
    assert command(arguments(checkpoint, "--prompt", "the", "--max-tokens", "9")) == 130
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert captured.err.endswith("interrupted; nothing half-made was stored\n")


@pytest.mark.parametrize("module", ["runtime.generate", "runtime.capture", "bench.prefill"])
def test_an_interrupt_of_the_imports_is_one_line(module: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT, env=env, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == b"interrupted before it had begun\n"
