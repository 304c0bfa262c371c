"""`python -m runtime.generate --model DIR --prompt "…"`: stream text, with DIR's tokenizer."""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from runtime.build import build
from runtime.cli import Bar, add_selection, command, longest, print_json, run, selection, write_out
from runtime.config import num_started, told_to_ranks
from runtime.driver import Runtime
from runtime.sampling import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What streaming needs of a `tokenizers.Tokenizer`."""

    def encode(self, text: str) -> Any: ...

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class TextStream:
    """Turns tokens into text as they come, never splitting a character.

    A token may hold a part of a UTF-8 character, and what a token decodes to may depend on the one
    before it. So a window of tokens is decoded with and without the new one, and text is held back
    while it ends in a replacement character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text has been given out
        self._start = 0  # first token of the window: context for the decoder

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """What is left, an incomplete character as a replacement character."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        after = self._tokenizer.decode(self._ids[self._start :])
        if not final and (after.endswith(REPLACEMENT) or len(after) <= len(before)):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


def load_tokenizer(model: str) -> Tokenizer:
    """The checkpoint's `tokenizer.json`.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer as Fast

    path = Path(model) / "tokenizer.json"
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a file, got a directory or device; download it again")
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: text needs a checkpoint directory with its tokenizer; "
            "presets have none (step them through Runtime.add with token ids)"
        )
    try:
        tokenizer: Tokenizer = Fast.from_file(str(path))
    except Exception as e:  # the library raises no narrower one, and says what is wrong
        raise ValueError(
            f"{path}: expected a tokenizer that the tokenizers library reads, got: {e}; download "
            "it again, whole"
        ) from e
    return tokenizer


def parser() -> argparse.ArgumentParser:
    p = command("runtime.generate", __doc__)
    add_selection(p)
    p.set_defaults(bs=1)
    p.add_argument("--prompt", required=True, help="text to go on from")
    p.add_argument("--max-tokens", type=int, default=128, help="new tokens at most")
    p.add_argument(
        "--ignore-eos", action="store_true", help="go on past the model's end of sequence"
    )
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--top-k", type=int, default=0, help="most probable tokens to draw from; 0: all")
    p.add_argument("--top-p", type=float, default=1.0, help="probability mass to draw from")
    p.add_argument("--min-p", type=float, default=0.0, help="least share of the best token's")
    p.add_argument("--sample-seed", type=int, help="of the draws; default: the operating system's")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    _check_alone(args)
    with told_to_ranks():
        tokenizer, prompt, params = _understand(args)
    with Bar() as bar:
        engine = build(selection(args), bar)
    tokens: list[int] = []
    reason = ""
    stream = TextStream(tokenizer)
    with Runtime(engine, engine.options.scheduling) as runtime:
        seed = runtime.seed_of(runtime.add(prompt, params))
        start = time.perf_counter()
        try:
            while runtime.num_running:
                out = runtime.step()
                for token, why in zip(
                    out.tokens.tolist(), out.finish_reasons.tolist(), strict=True
                ):
                    reason = why
                    if token >= 0:
                        tokens.append(token)
                        write_out(stream.push(token))
        except KeyboardInterrupt:
            write_out("\n")  # what is said of it begins a line of its own
            raise
        seconds = time.perf_counter() - start
    write_out(stream.finish() + "\n")
    if args.json:
        print_json(
            {
                "prompt_tokens": len(prompt),
                "tokens": tokens,
                "text": tokenizer.decode(tokens),
                "finish_reason": reason,
                "sample_seed": seed,
                "seconds": seconds,
            }
        )
    return 1 if reason == "error" else 0


def _check_alone(args: argparse.Namespace) -> None:
    """Raises ValueError as one of several ranks, each of which would have to have a prompt."""
    ranks = max(num_started(), args.ep_size or 1)
    if ranks > 1:
        raise ValueError(
            f"runtime.generate is a command of one process and one GPU, and this is one of "
            f"{ranks} ranks: start it without torchrun and --ep-size; "
            "several ranks are stepped from Python (Runtime.load, on each of them), or timed with "
            "runtime.replay_bench"
        )


def _understand(
    args: argparse.Namespace,
) -> tuple[Tokenizer, list[int], SamplingParams]:
    """The prompt as tokens, and what is asked of it; raises ValueError where that cannot be."""
    tokenizer = load_tokenizer(args.model)
    prompt = tokenizer.encode(args.prompt).ids
    seq_len = longest(args)
    params = SamplingParams(
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.sample_seed,
    )
    if not prompt:
        raise ValueError("a prompt is a non-empty list of token ids; this --prompt has none")
    if len(prompt) + params.max_tokens > seq_len:  # said before minutes of capture
        raise ValueError(
            f"prompt of {len(prompt)} tokens + --max-tokens {params.max_tokens} exceeds "
            f"max_seq_len {seq_len}; lower --max-tokens or shorten the prompt"
        )
    pages = -(-(len(prompt) + params.max_tokens - 1) // args.page_size)
    if args.num_pages is not None and pages > args.num_pages - 1:
        raise ValueError(
            f"--num-pages {args.num_pages}: prompt of {len(prompt)} tokens + --max-tokens "
            f"{params.max_tokens} takes {pages} pages of {args.page_size} tokens and the null "
            f"page; give --num-pages {pages + 1}, or lower --max-tokens"
        )
    return tokenizer, prompt, params


if __name__ == "__main__":
    run(main)
