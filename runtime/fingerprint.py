"""What a capture depends on: computed from the options alone, and without torch or triton.

The compiler and the player call the same function, so they agree on which bundle is meant before
either has built anything. A field states what was *asked*; what follows from it (the attention that
`auto` means here, the pages that memory allows, the arena table) is a function of the fields and of
the sources, and the manifest records it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from capture_cache.fingerprint import Fingerprint, Value
from capture_cache.machine import (
    PACKAGES,
    absent_packages,
    device_count,
    device_facts,
    installation,
    twin_facts,
)
from capture_cache.restore_driver import Driver
from graphs.keys import Ladder
from graphs.model_config import ModelConfig
from graphs.model_source import ModelSource, model_digest
from runtime.config import RuntimeConfig
from runtime.model import model_of

__all__ = ["FIELDS", "IGNORED", "OPTIONS", "absent_packages", "fingerprint"]
SCHEMA = 2  # raised whenever the meaning of a field changes
# Field → why a change of it makes a stored capture invalid. The order is that of every listing.
FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "schema": "fields of another version may mean something else",
        "device": "tiles, splits and clusters are chosen for one chip",
        "compute capability": "device code runs on the architecture it was compiled for",
        "multiprocessors": "persistent kernels are launched for this many",
        "driver": "graphs and code are handed to it; another one may lay parameters out otherwise",
        **dict.fromkeys(PACKAGES, "another version compiles or launches other code"),
        "sources": "they are what is captured",
        "model": "another checkpoint: other shapes, other golden step",
        "model config": "every size and formula of the step, layers and overrides included",
        "seed": "a preset's weights, which the golden step was taken with",
        "ep size": "experts a rank holds, and the peers its barriers wait for",
        "rows": "row state and ring are laid out for so many; attention's cut follows from it",
        "max seq len": "page tables, the rope table and attention's cut follow from it",
        "page size": "attention and the page tables are compiled for it",
        "num pages": "the KV section's size; auto takes what the rows can use or memory allows",
        "ladder": "one graph for each key",
        "attention": "which attention kernel is captured",
        "transport": "how tokens reach other ranks",
        "pdl": "how kernels overlap; auto is a function of the chip",
        "overlap": "whether the shared expert has a branch of its own; None follows from the model",
        "kernels": "which kernels are captured; what was chosen is in the ledger",
        "logits rows": "buffers for returned logits are laid out for so many",
    }
)
# Options that a field above stands for.
OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "model": "model",
        "bs": "rows",
        "max_seq_len": "max seq len",
        "num_pages": "num pages",
        "page_size": "page size",
        "ladder": "ladder",
        "layers": "model config",
        "overrides": "model config",
        "device": "device",
        "ep_size": "ep size",
        "transport": "transport",
        "attention": "attention",
        "seed": "seed",
        "pdl": "pdl",
        "overlap": "overlap",
        "head": "model config",
        "kernels": "kernels",
        "allow_inexact": "kernels",
        "logits_rows": "logits rows",
    }
)
# Options that change nothing of what is captured, and why.
IGNORED: Mapping[str, str] = MappingProxyType(
    {
        "store": "where a bundle lies is not what it is",
        "weights": "where weights are read from; they are checked by their own digest",
        "verify_weights": "how thoroughly they are checked",
        "verify": "whether it was proved; the ledger says so",
        "proof_replays": "how often it was proved; the ledger says so",
        "bundle": "whether graphs are stored; the manifest says so",
        "check_keys": "how many golden steps a restore compares",
        **dict.fromkeys(
            ("reservation", "prefix_cache", "prefill_budget", "ageing_steps"),
            "how the host schedules requests; no graph knows",
        ),
        "tune_s": "how long measuring may take; the ledger says what it came to",
        "deadline_s": "read from device memory at run time",
    }
)


def fingerprint(
    options: RuntimeConfig,
    *,
    on_device: bool | None = None,
    driver: Callable[[], Driver] | None = None,
) -> Fingerprint:
    """The facts that a stored capture must share to be valid for `options` here.

    Args:
        driver: gives an initialised one; by default this machine's.
        on_device: for a GPU, or for the CPU twin; None: as `options.device` means here.

    Raises:
        ValueError: options or a model that cannot be run.
        CudaError: a GPU is asked for and there is none.
    """
    if on_device is None:
        on_device = options.device != "cpu" and device_count() > 0
    model, source = model_of(options)
    # What needs no device comes first: the driver may still be initialising.
    other = installation() | _asked(options, model, source)
    facts: dict[str, Value] = {"schema": SCHEMA}
    if on_device:
        facts |= device_facts(options.local_rank, driver() if driver else None)
    else:
        facts |= twin_facts()
    facts |= other
    for field in dataclasses.fields(options):  # an option that nobody has judged counts
        if field.name not in OPTIONS and field.name not in IGNORED:
            facts[field.name] = str(getattr(options, field.name))
    return Fingerprint.of(facts)


def _asked(options: RuntimeConfig, model: ModelConfig, source: ModelSource) -> dict[str, Value]:
    rows = options.rows_per_rank
    ladder = Ladder.default(rows) if options.ladder is None else Ladder.parse(options.ladder, rows)
    return {
        "model": source.name
        if source.path is None
        else model_digest(source.path, weights_elsewhere=options.weights is not None),
        "model config": model.digest(),
        "seed": options.seed if source.is_preset else None,
        "ep size": options.num_ranks,
        "rows": rows,
        "max seq len": options.seq_len(model.max_position),
        "page size": options.page_size,
        "num pages": "auto" if options.num_pages is None else options.num_pages,
        "ladder": str(ladder),
        "attention": options.attention,
        "transport": options.transport,
        "pdl": options.pdl,
        "overlap": options.overlap,
        "kernels": options.kernels_asked,
        "logits rows": options.logits_rows,
    }
