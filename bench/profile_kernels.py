"""Summaries of a profile: by kernel, by layer, and what has changed between two of them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from bench.profile_map import Event, Placed

Row = dict[str, Any]


def split_steps(events: Sequence[Event], steps: int, first: str) -> list[list[Event]]:
    """Events of each step; a step begins with its first kernel.

    Args:
        first: name of the kernel that opens a step.
    Raises:
        RuntimeError: not as many steps as were run.
    """
    parts: list[list[Event]] = []
    for event in sorted(events, key=lambda e: e.begin):
        if event.name == first:
            parts.append([])
        if parts:
            parts[-1].append(event)
    if len(parts) != steps:
        raise RuntimeError(
            f"the profile holds {len(parts)} steps (kernels named {first}), {steps} were run; "
            "run it again with fewer --steps, for a profiler's buffers may have overflowed"
        )
    return parts


def by_kernel(
    steps: Sequence[Sequence[Placed]], span_us: float, read_bytes_per_s: float | None
) -> list[Row]:
    """One row for each kernel and weight, the dearest first; times are of one step."""
    found: dict[tuple[str, str], list[Placed]] = defaultdict(list)
    for step in steps:
        for p in step:
            found[p.event.name, p.label].append(p)
    count = len(steps)
    rows = []
    for (name, label), placed in found.items():
        us = sum(p.event.us for p in placed) / count
        nbytes = sum(p.floor_bytes for p in placed) / count
        floor_us = nbytes / read_bytes_per_s * 1e6 if read_bytes_per_s and nbytes else None
        rows.append(
            {
                "name": name,
                "label": label,
                "count": len(placed) / count,
                "median_us": statistics.median(p.event.us for p in placed),
                "us_per_step": us,
                "share": us / span_us,
                "floor_us": floor_us,
                "gap_us": sum(p.gap for p in placed) / count,
            }
        )
    return sorted(rows, key=lambda r: -float(r["us_per_step"]))


def by_part(
    steps: Sequence[Sequence[Placed]],
    clock_us: Mapping[str, float],
    part_bytes: Mapping[str, int],
    read_bytes_per_s: float | None,
) -> list[Row]:
    """One row for each part of the step, in order.

    Args:
        clock_us: time of each part by the stamps inside the graph.
        part_bytes: that each part must read.
    """
    kernels: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    gaps: dict[str, float] = defaultdict(float)
    for step in steps:
        for p in step:
            name = f"{p.event.name} {p.label}".strip()
            kernels[p.part][name] += p.event.us / len(steps)
            gaps[p.part] += p.gap / len(steps)
    rows = []
    for part, us in clock_us.items():
        nbytes = part_bytes.get(part, 0)
        floor_us = nbytes / read_bytes_per_s * 1e6 if read_bytes_per_s and nbytes else None
        rows.append(
            {
                "part": part,
                "clock_us": us,
                "kernels_us": sum(kernels[part].values()),
                "gap_us": gaps[part],
                "floor_us": floor_us,
                "kernels": dict(sorted(kernels[part].items(), key=lambda item: -item[1])),
            }
        )
    return rows


def layer_kind(part: str, first_dense: int) -> str:
    """A part's kind: layers of one kind are shown together."""
    if not part.startswith("layer "):
        return part
    _, layer, kind = part.split(" ", 2)
    if kind == "attention":
        return kind
    return "dense mlp" if int(layer) < first_dense else "experts"


def diff(before: Row, after: Row) -> list[Row]:
    """Kernels of two profiles side by side, the largest change first.

    Raises:
        ValueError: one of them is no profile.
    """
    sides: list[dict[str, Row]] = []
    for report in (before, after):
        try:
            sides.append(
                {f"{k['name']} {k.get('label', '')}".strip(): k for k in report["kernels"]}
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"expected the JSON of python -m bench.decode_profile, got an object without "
                f"{error}"
            ) from error
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        a, b = (side.get(name) for side in sides)
        us_a, us_b = (0.0 if k is None else float(k["us_per_step"]) for k in (a, b))
        rows.append(
            {
                "name": name,
                "state": "new" if a is None else "gone" if b is None else "both",
                "count": [None if k is None else k["count"] for k in (a, b)],
                "us": [us_a, us_b],
                "delta_us": us_b - us_a,
            }
        )
    return sorted(rows, key=lambda r: -abs(float(r["delta_us"])))
