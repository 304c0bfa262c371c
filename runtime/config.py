"""One place where options become configuration; the only place that reads the environment."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from barriers.config import GroupConfig
from barriers.errors import RankError
from capture_cache.dataclass import dataclass
from runtime.bundle_names import SKIP_WEIGHTS
from runtime.scheduler import SchedulerConfig

DEVICES = ("auto", "cuda", "cpu")
ATTENTION = ("auto", "flashinfer", "hopper", "triton")
DEFAULT_SEQ_LEN = 4096  # tokens, where the model has as many positions
KERNELS = ("auto", "tune", "default")  # or a file that pins them
PDL = ("auto", "off", "late", "early")
HEADS = ("whole", "sharded")
CHECK_KEYS = ("first", "all")
# Spellings of other engines for the same thing.
ALIASES = {
    "model_path": "model",
    "ckpt": "model",
    "cuda_graph_bs": "ladder",
    "max_batch_size": "bs",
    "max_model_len": "max_seq_len",
    "context_length": "max_seq_len",
}
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_TOLD = "the other ranks have been told"  # noted on an error


def child_environment(run: str, *, own_gpu: bool = False) -> dict[str, str]:
    """The environment of a process that is this rank in a world of its own, named `run`.

    Args:
        own_gpu: it sees no GPU but this rank's.
    """
    name = "TORCHELASTIC_RUN_ID"  # a part of the ranks' meeting point
    env = {**os.environ, name: f"{os.environ.get(name, '')}/{run}"}
    if own_gpu:
        seen, rank = _visible(), int(env.get("LOCAL_RANK", "0"))
        if 1 < len(seen) <= rank:
            raise ValueError(
                f"{_VISIBLE} names {len(seen)} GPUs, and this is local rank {rank}: name one for "
                "each rank, or leave it unset"
            )
        if len(seen) != 1:  # of a single one it is known whose it is
            env[_VISIBLE] = seen[rank] if seen else str(rank)
    return env


def _visible() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them; none where it is not set."""
    return [name for name in os.environ.get(_VISIBLE, "").split(",") if name]


@contextmanager
def told_to_ranks(*, but: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """What fails inside, before ranks have met, is told to those that would wait for this one.

    Once, where one such block lies in another: by the second time they may be gone.

    Args:
        but: failures that do not keep this rank from the meeting.
    """
    try:
        yield
    except but:
        raise
    except Exception as error:
        told = _TOLD in getattr(error, "__notes__", ())
        if not told and tell_ranks(f"{type(error).__name__}: {error}"):
            error.add_note(_TOLD)
        raise


def tell_ranks(reason: str) -> bool:
    """Tell the other ranks that this one cannot start; whether there are any. Never raises."""
    try:
        place = GroupConfig.from_env(os.environ)
    except (ValueError, RankError):
        return False  # it does not know who they are
    if place.world == 1:
        return False
    from barriers.refusal import tell_failure  # sockets, for ranks alone

    tell_failure(place, reason)
    return True


def num_started() -> int:
    """Ranks that torchrun started, this one among them; 1 without it."""
    return GroupConfig.from_env(os.environ).world


@dataclass(frozen=True)
class RuntimeConfig:
    """Everything a runtime is built from.

    Attributes:
        model: Hugging Face directory or preset name.
        bs: global decode batch; a rank holds `bs / ep_size` rows.
        max_seq_len: tokens, prompt and output together; None: 4096, or all that the model has
            positions for where those are fewer.
        num_pages: KV pages of a rank; None: what the rows can use, or what memory allows.
        page_size: tokens.
        ladder: graph keys as text ("1,2,4,8+64"), or a list of them; None: the default ladder.
        layers: run only the first so many layers.
        overrides: "key=value" of the model's config.
        device: auto, cuda or cpu.
        store: directory of compiled kernels and manifests.
        ep_size: ranks that share the experts; None: as many as torchrun started.
        transport: how tokens reach other ranks' experts; a name of `barriers.transport`.
        attention: auto, flashinfer, hopper or triton.
        weights: directory of packed weights (`python -m runtime.pack`); None: those in the
            store, if any.
        verify_weights: compare the sha256 of all packed weights before use.
        pdl: whether a kernel starts while the one before it ends (programmatic dependent launch):
            off, late (once that one has loaded its weights), early (at once); auto decides by chip.
        head: "whole": every rank has the whole head and computes its own rows' logits; "sharded":
            each has a part of the vocabulary, and computes all ranks' logits there.
        overlap: the shared expert runs beside the exchange with other ranks; None: where there are
            both.
        seed: of a preset's random weights.
        kernels: how the kernel of each operation is chosen: "tune" measures on the device and keeps
            the result in the store; "auto" takes what was kept there, and the default for the rest;
            "default" takes the default; a file pins. Only "tune" measures.
        allow_inexact: let kernels in whose bits depend on how many tokens there are.
        tune_s: seconds of measuring at most; what is left over then takes the default.
        verify: prove every key after capture.
        proof_replays: replays per key of that proof; None: 100 on a device, 2 on the CPU twin.
        deadline_s: longest wait for a step, seconds.
        bundle: restore stored graphs, and store captured ones; False: capture, and store none.
        check_keys: whose golden steps are compared when a bundle is restored: "first", the key that
            is built before the load returns; "all", every key, built before it returns. A golden
            step needs all rows free, so none can run beside live steps.
        reservation, prefix_cache, prefill_budget, ageing_steps: see
            `runtime.scheduler.SchedulerConfig`.
        logits_rows: requests of a rank that may have their logits returned at the same time.
    """

    model: str
    bs: int = 256
    max_seq_len: int | None = None
    num_pages: int | None = None
    page_size: int = 64
    ladder: str | None = None
    layers: int | None = None
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    store: str | None = None
    weights: str | None = None
    verify_weights: bool = False
    ep_size: int | None = None
    transport: str = "auto"
    attention: str = "auto"
    pdl: str = "auto"
    overlap: bool | None = None
    head: str = "whole"
    seed: int = 0
    kernels: str = "auto"
    allow_inexact: bool = False
    tune_s: float = 120.0
    verify: bool = True
    proof_replays: int | None = None
    deadline_s: float = 10.0
    bundle: bool = True
    check_keys: str = "first"
    reservation: str = "full"
    prefix_cache: bool = True
    prefill_budget: int | None = None
    ageing_steps: int = 256
    logits_rows: int = 8

    def __post_init__(self) -> None:
        self._check_types()
        for name, choices in (
            ("device", DEVICES),
            ("head", HEADS),
            ("attention", ATTENTION),
            ("pdl", PDL),
            ("check_keys", CHECK_KEYS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("model", "store", "weights", "kernels"):
            if getattr(self, name) is not None and not str(getattr(self, name)):
                raise ValueError(f"{name} must not be empty text; leave it out for the default")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        for name in ("bs", "page_size", "num_ranks", "logits_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise ValueError(
                f"max_seq_len must be at least 2 (a prompt token and a new one), got "
                f"{self.max_seq_len}"
            )
        if self.tune_s <= 0:
            raise ValueError(
                f"--tune-seconds {self.tune_s}: expected more than 0; --kernels default measures "
                "nothing"
            )
        if self.check_keys == "all" and self.weights == SKIP_WEIGHTS:
            raise ValueError(
                f"check_keys='all' needs weights, and weights={SKIP_WEIGHTS!r} leaves them out; "
                "give one of the two"
            )
        if self.allow_inexact and self.kernels == "default":
            raise ValueError(
                "--allow-inexact goes with kernels that are measured or pinned; --kernels default "
                "takes exact ones only"
            )
        self.scheduling  # noqa: B018 - its own checks
        if self.deadline_s <= 0:
            raise ValueError(
                f"deadline_s (--deadline-ms) must be more than 0, got {self.deadline_s} s"
            )
        if self.proof_replays is not None:
            if self.proof_replays < 1:
                raise ValueError(
                    f"--proof-replays {self.proof_replays}: a proof needs at least one replay"
                )
            if not self.verify:
                raise ValueError("--proof-replays goes with the proof; leave out --no-verify")
        if self.bs % self.num_ranks:
            raise ValueError(
                f"bs {self.bs} is global and must divide by ep_size {self.num_ranks}; "
                f"use --bs {-(-self.bs // self.num_ranks) * self.num_ranks}"
            )

    def _check_types(self) -> None:
        """Raises TypeError for a value that later comparisons could only trip over."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if value is None and kind.endswith("| None"):
                continue
            flag = isinstance(value, bool)
            ok, what = {
                "int": (isinstance(value, Integral) and not flag, "a whole number"),
                "float": (isinstance(value, Real), "a number"),
                "str": (isinstance(value, str | os.PathLike), "text"),
                "bool": (flag, "True or False"),
            }.get(kind.removesuffix(" | None"), (True, ""))
            if not ok:
                raise TypeError(f"{field.name} must be {what}, got {value!r}")

    @classmethod
    def of(cls, *, defaults: Mapping[str, Any] | None = None, **options: Any) -> RuntimeConfig:
        """From keyword arguments, the spellings of other engines included.

        Args:
            defaults: values that another spelling of the same option may replace, as long as they
                are this class's own defaults.
        Raises:
            ValueError: an unknown option, or one given twice.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        named: dict[str, Any] = {}
        for key, value in options.items():
            name = ALIASES.get(key, key)
            if name not in known:
                from runtime.other_engines import unknown_keyword  # only mistakes need it

                raise ValueError(unknown_keyword(key, sorted({*known, *ALIASES})))
            if name in named and key != name:
                raise ValueError(f"{key!r} is another spelling of {name!r}, which is given too")
            named[name] = value
        standard = {f.name: f.default for f in dataclasses.fields(cls)}
        for name, value in (defaults or {}).items():
            if name in named and value != standard[name]:
                raise ValueError(f"{name!r} is given twice, as {value!r} and {named[name]!r}")
            named.setdefault(name, value)
        overrides = named.get("overrides")
        if isinstance(overrides, Mapping):
            named["overrides"] = tuple(f"{k}={v}" for k, v in overrides.items())
        elif overrides is not None:
            named["overrides"] = tuple(overrides)
        ladder = named.get("ladder")
        if isinstance(ladder, list | tuple):
            named["ladder"] = ",".join(str(key) for key in ladder)
        return cls(**named)

    def seq_len(self, positions: int) -> int:
        """Tokens of prompt and output together, for a model that has so many positions.

        Raises:
            ValueError: more are asked for than it has.
        """
        if self.max_seq_len is None:
            return min(DEFAULT_SEQ_LEN, positions)
        if self.max_seq_len > positions:
            raise ValueError(
                f"max_seq_len {self.max_seq_len} exceeds the model's {positions} positions; lower "
                "--max-seq-len, or leave it out"
            )
        return self.max_seq_len

    @property
    def scheduling(self) -> SchedulerConfig:
        """How requests share rows, pages and steps."""
        return SchedulerConfig(
            self.reservation, self.prefix_cache, self.prefill_budget, self.ageing_steps
        )

    @property
    def ranks(self) -> GroupConfig:
        """Where this process stands among those that torchrun started; alone without it."""
        return GroupConfig.from_env(os.environ)

    @property
    def kernels_asked(self) -> str:
        """How kernels are to be chosen: a word, or the digest of the file that pins them.

        Raises:
            ValueError: the file cannot be read.
        """
        how = self.kernels
        if how not in KERNELS:
            try:
                how = f"pinned {hashlib.sha256(Path(how).read_bytes()).hexdigest()[:16]}"
            except OSError as error:
                raise ValueError(
                    f"--kernels {self.kernels}: expected {', '.join(KERNELS)} or a file of kernel "
                    f"choices, and that cannot be read ({error.strerror}); write one with "
                    "python -m runtime.capture --save-kernels"
                ) from error
        return f"{how}, inexact ones too" if self.allow_inexact else how

    @property
    def local_rank(self) -> int:
        """The GPU of this process: that of LOCAL_RANK, or the only one that is visible.

        A driver that sees one GPU initialises one: ranks start sooner with only their own visible.
        """
        return 0 if len(_visible()) == 1 else int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def num_ranks(self) -> int:
        """Ranks that share the experts."""
        return self.ranks.world if self.ep_size is None else self.ep_size

    @property
    def rows_per_rank(self) -> int:
        return self.bs // self.num_ranks

    @property
    def store_path(self) -> Path:
        """The store: the option, else $LOCKSTEP_STORE, else ~/.cache/lockstep."""
        chosen = self.store or os.environ.get("LOCKSTEP_STORE")
        return Path(chosen) if chosen else Path.home() / ".cache" / "lockstep"
