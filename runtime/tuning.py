"""The choice of kernels of one build: pinned, taken from the store, or measured on the device.

Rank 0 decides and the others take what it says, for a token's bits must not depend on the rank
either. What is measured is kept in the store by shape, so that neither a second capture nor another
ladder measures it again, and neither can come to other bits.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from capture_cache.errors import CaptureError, CorruptBundle
from capture_cache.machine import here
from capture_cache.store import Store
from graphs.aot import AotLauncher
from graphs.buffers import workspace_per_token
from graphs.calls import Call, NoLauncher, RecordingOps
from graphs.candidates import PLANS, Candidate, candidates, named
from graphs.capture import GraphBackend
from graphs.choices import ChosenOps, KernelChoices, Pick, SiteChoice, site_of, tokens_of
from graphs.compile import RecordingLauncher, compile_all
from graphs.keys import GraphKey
from graphs.ops import Ops
from graphs.select import REFERENCE_TOKENS, check_pins, choose_site, confirm, fits_workspace
from graphs.step import DecodeStep
from graphs.timing import Timer, Timing
from graphs.tuning_inputs import on_meta, outcome, rotated, with_tokens
from graphs.weights import shared_joins
from kernels.triton.state import DECODE
from runtime.assemble import listed_transport, listed_vocabulary, make_step
from runtime.config import KERNELS, RuntimeConfig
from runtime.ranks import Ranks
from runtime.selection import Selection

SHARE_TIMEOUT_S = 1800.0
UNCONFIRMED = (
    "each kernel was timed by itself, and no whole step, for one rank's would wait for the others'"
)
PIECE_CHARS = 2000  # of a text that is shared among ranks, a message
# Calls by site and number of tokens, one for each layer.
Calls = Mapping[tuple[str, int], Sequence[Call]]
Progress = Callable[[str, int, object], None]


def check_kernels(options: RuntimeConfig, selection: Selection) -> None:
    """Refuse what cannot be chosen, before anything is built.

    Raises:
        ValueError: measured or pinned kernels without a device, or a file that is none of ours.
    """
    if options.kernels in ("auto", "default"):
        return
    pinned(options)
    if not selection.on_device:
        raise ValueError(
            f"--kernels {options.kernels} is about kernels of a CUDA device, and the CPU twin has "
            "none; leave it at auto"
        )


def pinned(options: RuntimeConfig) -> KernelChoices | None:
    """The choices of `--kernels FILE`; None where it names none.

    Raises:
        ValueError: no such file, or not one of ours.
    """
    if options.kernels in KERNELS:
        return None
    _ = options.kernels_asked  # says what is wrong with a file that cannot be read
    path = Path(options.kernels)
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"--kernels {path}: expected auto, tune, default or a file of kernel choices, and this "
            f"file is no JSON ({error}); write one with python -m runtime.capture --save-kernels"
        ) from error
    if isinstance(record, dict) and "ledger" in record:
        record = record["ledger"].get("choices")  # the report of a capture
    return KernelChoices.from_json(record, origin=str(path))


def record_calls(selection: Selection, views: Mapping[str, torch.Tensor]) -> Calls:
    """Every call that has candidates, of every key, over the arena's own weights; runs nothing."""
    found: dict[tuple[str, int], list[Call]] = defaultdict(list)

    def hook(call: Call) -> None:
        if call.op in PLANS:
            found[site_of(call), tokens_of(call)].append(call)

    nobody = NoLauncher()
    ops = RecordingOps(Ops(nobody), hook)
    # FA3 attention would run its kernel: which attention there is does not matter here.
    plain = replace(selection, step=replace(selection.step, attention="triton"))
    transport = listed_transport(selection, nobody, views)
    vocabulary = listed_vocabulary(selection, views)
    step = make_step(plain, ops, views, transport, vocabulary=vocabulary)
    for key in selection.ladder.keys:
        step.run(key)
    return found


@dataclass
class Tuner:
    """Chooses the kernels of one build.

    Attributes:
        measured: (candidate, tokens) pairs that were timed.
    """

    selection: Selection
    options: RuntimeConfig
    store: Store
    launcher: AotLauncher
    backend: GraphBackend
    timer: Timer
    progress: Progress
    measured: int = 0
    _known: dict[str, SiteChoice] = field(default_factory=dict)
    _defaults: dict[tuple[str, int], str] = field(default_factory=dict)

    def choose(self, calls: Calls) -> KernelChoices:
        """From pins, from the store alone ("auto"), or from the store and measurements.

        Raises:
            ValueError: pins that do not fit.
            CaptureError: a plan that should keep bits does not.
        """
        pins = pinned(self.options)
        if pins is not None:
            first = {key: some[0] for key, some in calls.items()}
            pins = check_pins(pins, first, allow_inexact=self.options.allow_inexact)
            self._check_room(pins, first)
            self._compile(calls, lambda call: [named(call, self._pick(pins, call))], ())
            return pins
        sites: dict[str, dict[int, Sequence[Call]]] = defaultdict(dict)
        for (site, count), some in calls.items():
            sites[site][count] = some
        known = {site: self._load(site) for site in sites}
        if self.options.kernels == "auto":
            return self._stored(calls, known)
        missing = [s for s, k in known.items() if k is None or set(sites[s]) - k.tokens.keys()]
        if missing:
            wanted = {(s, n): c for (s, n), c in calls.items() if s in missing}
            self._compile(wanted, self._found, REFERENCE_TOKENS)
        deadline = time.monotonic() + self.options.tune_s
        chosen = {}
        for site, by_count in sites.items():
            whole = self._choose_site(site, by_count, known[site], deadline)
            self._known[site] = whole
            picks = {count: whole.tokens[count] for count in sorted(by_count)}
            chosen[site] = SiteChoice(whole.bits, picks)
            for count, some in by_count.items():
                self._defaults[site, count] = self._unmeasured(some[0], whole).kernel
            self.progress("tune", len(sites), site)
        origin = "measured" if missing else "stored"
        return KernelChoices(chosen, None, origin)

    def _stored(self, calls: Calls, known: Mapping[str, SiteChoice | None]) -> KernelChoices:
        """What was measured before; of a site that lacks a count, the default of its order."""
        chosen: dict[str, dict[int, Pick]] = defaultdict(dict)
        for (site, count), some in sorted(calls.items(), key=lambda item: item[0]):
            whole = known[site]
            if whole is not None:
                chosen[site][count] = whole.tokens.get(count) or self._unmeasured(some[0], whole)
        if not chosen:
            return KernelChoices()
        sites = {s: SiteChoice(known[s].bits, picks) for s, picks in chosen.items()}  # type: ignore[union-attr]
        choices = KernelChoices(sites, None, "stored")
        taken = {(s, n): some for (s, n), some in calls.items() if s in sites}
        self._compile(taken, lambda call: [named(call, self._pick(choices, call))], ())
        return choices

    def _unmeasured(self, call: Call, whole: SiteChoice) -> Pick:
        same = (c for c in self._found(call) if c.exact and c.bits == whole.bits)
        return Pick(next(same).name)

    def confirm(
        self, choices: KernelChoices, step: DecodeStep, views: Mapping[str, torch.Tensor]
    ) -> KernelChoices:
        """Time whole steps with what was measured, and keep what makes them faster.

        Of several ranks none does, for a step would wait for the others; the choices then say so.
        """
        ops = step.ops
        if self.selection.step.ep_size > 1 and choices.origin in ("measured", "stored"):
            return replace(choices, note=UNCONFIRMED)
        if choices.origin != "measured":
            return choices
        assert isinstance(ops, ChosenOps)
        keys = self.selection.ladder.keys

        def measure(tried: KernelChoices, index: int) -> tuple[Timing, set[tuple[str, int]]]:
            ops.choices = tried
            ops.met.clear()
            with self.backend.on_stream():
                _occupy(views, self.selection, keys[index])
                time = self.timer([partial(step.run, keys[index])])
            return time, set(ops.met)

        kept = confirm(choices, self._defaults, measure, len(keys))
        for site, choice in kept.sites.items():
            if choice != choices.sites[site]:
                whole = self._known[site]
                self.store.publish_record(
                    self._digest(site),
                    SiteChoice(whole.bits, {**whole.tokens, **choice.tokens}).to_json(),
                )
        return kept

    def _choose_site(
        self,
        site: str,
        by_count: Mapping[int, Sequence[Call]],
        known: SiteChoice | None,
        deadline: float,
    ) -> SiteChoice:
        layers = by_count[max(by_count)]
        if known is not None and not set(by_count) - known.tokens.keys():
            return known
        bench = _SiteBench(self, layers)
        choice = choose_site(
            self._found(layers[0]),
            sorted(by_count),
            bench.measure,
            known=known,
            defaults={count: self._found(some[0])[0].name for count, some in by_count.items()},
            allow_inexact=self.options.allow_inexact,
            out_of_time=lambda: time.monotonic() > deadline,
        )
        # Kept even where time ran out: another capture must not come to other bits.
        self.store.publish_record(self._digest(site), choice.to_json())
        return choice

    def _found(self, call: Call) -> list[Candidate]:
        """Candidates that the arena has room for."""
        room = self.room
        return [c for c in candidates(call) if fits_workspace(c, call, room)]

    @property
    def room(self) -> int:
        """float32 elements of workspace for each step token."""
        return workspace_per_token(self.selection.model, self.selection.step)

    def _check_room(self, pins: KernelChoices, first: Mapping[tuple[str, int], Call]) -> None:
        for (site, count), call in first.items():
            candidate = named(call, pins.sites[site].tokens[count].kernel)
            if not fits_workspace(candidate, call, self.room):
                raise ValueError(
                    f"{pins.origin} pins {candidate.name!r} for {site}, whose partial sums need "
                    f"more than the arena's {self.room} words a token; pin fewer splits"
                )

    def _pick(self, choices: KernelChoices, call: Call) -> str:
        return choices.sites[site_of(call)].tokens[tokens_of(call)].kernel

    def _compile(
        self,
        calls: Calls,
        found: Callable[[Call], list[Candidate]],
        references: Sequence[int],
    ) -> None:
        """Every kernel that will be measured or captured, by several processes."""
        recorder = RecordingLauncher(
            self.launcher.arch, num_sms=self.launcher.num_sms, pdl=self.launcher.pdl
        )
        ops = Ops(recorder)
        for (_, count), some in calls.items():
            call = some[0]
            exact = found(call)
            counts = {count, *references} if len({c.bits for c in exact}) > 1 else {count}
            for tokens in counts:
                meta = on_meta(call).replaced(dict(self.inputs(call, tokens, torch.device("meta"))))
                for candidate in exact:
                    if candidate.other is None:
                        candidate.run(ops, meta)
        compile_all(
            recorder.requests,
            self.launcher.compiler,
            progress=lambda name: self.progress("compile", len(recorder.requests), name),
        )

    def inputs(self, call: Call, count: int, device: torch.device) -> Any:
        model, step = self.selection.model, self.selection.step
        return with_tokens(
            call,
            count,
            device,
            workspace_elems=self.room * count,
            world=step.ep_size,
            shared_joins=shared_joins(model, step.transport),
        )

    # ------------------------------------------------------------------ the store

    def _digest(self, site: str) -> str:
        facts = here(on_device=True, ordinal=self.options.local_rank) | {
            "site": site,
            "ep size": self.selection.step.ep_size,
            "pdl": self.selection.step.pdl,
            "inexact": self.options.allow_inexact,
            "room": self.room,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _load(self, site: str) -> SiteChoice | None:
        try:
            record = self.store.load_record(self._digest(site))
            return None if record is None else SiteChoice.from_json(record)
        except (CorruptBundle, ValueError):
            return None  # measured again, and replaced


class _SiteBench:
    """Times the candidates of one site over the weights of several layers."""

    def __init__(self, tuner: Tuner, layers: Sequence[Call]) -> None:
        self._tuner, self._layers = tuner, layers
        self._ops = Ops(tuner.launcher)
        self._device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self._device)
        self._cache_bytes = int(properties.L2_cache_size)
        self._inputs: tuple[int, list[Call]] | None = None
        self._bits: dict[tuple[str, int], torch.Tensor] = {}

    def measure(self, candidate: Candidate, count: int) -> Timing | None:
        """Its time, or None where another library's kernel does not run here."""
        with self._tuner.backend.on_stream():
            calls = self._calls(count)
            try:
                candidate.run(self._ops, calls[0])
                self._compare(candidate, count, outcome(calls[0], candidate))
                runs = [lambda c=c: candidate.run(self._ops, c) for c in calls]  # type: ignore[misc]
                timing = self._tuner.timer(runs)
            except (RuntimeError, TypeError) as error:
                if candidate.other is None or isinstance(error, CaptureError):
                    raise
                return None
        self._tuner.measured += 1
        return timing

    def _calls(self, count: int) -> list[Call]:
        if self._inputs is None or self._inputs[0] != count:
            new = self._tuner.inputs(self._layers[0], count, self._device)
            self._inputs = (count, rotated(self._layers, new, self._cache_bytes))
        return self._inputs[1]

    def _compare(self, candidate: Candidate, count: int, got: torch.Tensor) -> None:
        """Candidates that claim one order of additions must give one result."""
        if not candidate.exact:
            return
        want = self._bits.setdefault((candidate.bits, count), got)
        if not torch.equal(got, want):
            raise CaptureError(
                f"{site_of(self._layers[0])} at {count} tokens: plan {candidate.name!r} gives "
                f"other bits than the plans of the same order ({candidate.bits}); capture with "
                "--kernels default, and report it"
            )


def _occupy(views: Mapping[str, torch.Tensor], selection: Selection, key: GraphKey) -> None:
    """As many decoding rows as the key has, over a few random pages that they share; for timing."""
    step, vocab = selection.step, selection.model.vocab_size
    pages = min(step.num_pages - 1, step.max_pages, 32)
    for layer in range(selection.model.num_layers):
        views[f"kv.{layer}"][: (pages + 1) * step.page_size].normal_()
    views["phase"].zero_()
    views["phase"][: key.rows] = DECODE
    # Each timed step appends a token; they may not leave the last page.
    views["seq_len"].fill_(max(1, (pages - 1) * step.page_size))
    views["limit"].fill_(step.max_seq_len + 1)
    tokens = torch.randint(0, vocab, (step.max_rows,), generator=torch.Generator().manual_seed(0))
    views["last_token"].copy_(tokens.to(torch.int32))
    listed = torch.arange(1, pages + 1, dtype=torch.int32)
    views["page_table"][:, :pages].copy_(listed.expand(step.max_rows, pages))


def share(ranks: Ranks, choices: KernelChoices | None) -> KernelChoices:
    """Rank 0's choices, on every rank.

    Args:
        choices: None on the other ranks.
    """
    text = "" if choices is None else json.dumps(choices.to_json())
    pieces = [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]
    group = ranks.group
    count = group.allgather("kernels", len(pieces), timeout_s=SHARE_TIMEOUT_S)[0].value
    whole = "".join(
        group.allgather(f"kernels {i}", pieces[i] if i < len(pieces) else "")[0].value
        for i in range(count)
    )
    origin = json.loads(whole)["origin"]
    return KernelChoices.from_json(json.loads(whole), origin=origin)
