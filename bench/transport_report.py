"""What all ranks of `bench.transport_microbench` found, as one verdict and a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

MAX_ERROR = 3e-3  # of bf16 sums against float64


def merge(
    ranks: list[dict[str, Any]], *, link_gbps: float, sweep: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One mode's verdict and numbers from what each rank found.

    Args:
        ranks: by rank: cases, and sweep if asked for.
        sweep: the tunings of the sweep, in order.

    Where dispatch is timed and combine is not, combine is what both take beyond dispatch; it says
    `derived`.
    """
    cases = []
    for same in zip(*(v["cases"] for v in ranks), strict=True):
        sent = max(c["bytes"][0] for c in same)
        got = max(c["bytes"][1] for c in same)
        case: dict[str, Any] = {
            "rows": same[0]["rows"],
            "rel_error": max(c["rel_error"] for c in same),
            "repeats": all(c["repeats"] for c in same),
            "oracle_bits": all(c["oracle_bits"] for c in same),
            "bytes_dispatch": sent,
            "bytes_combine": got,
            "floor_us": round((sent + got) / link_gbps / 1e3, 2),
        }
        for part in same[0]["us"]:
            spreads = [c["us"][part] for c in same]
            times = [s["median"] for s in spreads]
            case[f"{part}_us"] = {
                "mean": round(sum(times) / len(times), 2),
                "max": max(times),
                "p10": min(s["p10"] for s in spreads),
                "p90": max(s["p90"] for s in spreads),
            }
        if "sum" in same[0]["us"]:
            case["net_us"] = _beyond(same, "sum")
        if "dispatch_us" in case and "combine_us" not in case:
            case["combine_us"] = _beyond(same, "dispatch") | {"derived": True}
        case["gb_per_s"] = _speed(sent + got, case["both_us"]["max"])
        case["ok"] = case["rel_error"] < MAX_ERROR and case["repeats"]
        cases.append(case)
    merged: dict[str, Any] = {"ok": all(c["ok"] for c in cases), "cases": cases}
    if "sweep" in ranks[0]:
        merged["sweep"] = [
            {"tuning": dict(change), "both_us": [max(times) for times in zip(*lines, strict=True)]}
            for change, *lines in zip(sweep, *(v["sweep"] for v in ranks), strict=True)
        ]
    return merged


def _speed(nbytes: int, us: float) -> float | None:
    """GB/s; None where nothing crosses a link, or next to no time is left without the meetings."""
    return round(nbytes / us / 1e3, 1) if nbytes and us > 0 else None


def _beyond(same: Sequence[Mapping[str, Any]], part: str) -> dict[str, Any]:
    """What `both` takes beyond `part`, of all ranks."""
    times = [c["us"]["both"]["median"] - c["us"][part]["median"] for c in same]
    return {"mean": round(sum(times) / len(times), 2), "max": round(max(times), 2)}


def _told(part: str, us: Mapping[str, Any]) -> str:
    spread = f" ({us['p10']:.1f}-{us['p90']:.1f})" if "p10" in us else ""
    if us.get("derived"):
        spread = " (derived: both - dispatch)"
    return f"{part} {us['mean']:.1f}/{us['max']:.1f}{spread}"


def print_mode(name: str, result: Mapping[str, Any], file: TextIO) -> None:
    """A line a case, for people."""
    for case in result.get("cases", ()):
        times = "  ".join(
            _told(part, case[f"{part}_us"])
            for part in ("dispatch", "combine", "sum", "both", "net", "step")
            if f"{part}_us" in case
        )
        verdict = "ok" if case["ok"] else "WRONG"
        bits = "yes" if case["oracle_bits"] else "no"
        speed = "-" if case["gb_per_s"] is None else f"{case['gb_per_s']:.0f}"
        print(
            f"{name:14s} rows {case['rows']:4d}  us mean/max (p10-p90): {times}"
            f"  floor {case['floor_us']:.1f}  {speed} GB/s"
            f"  error {case['rel_error']:.1e}  oracle bits {bits}  {verdict}",
            file=file,
        )
    for line in result.get("sweep", ()):
        print(f"  {line['both_us']} us both  {line['tuning'] or 'default'}", file=file)
    if "error" in result:
        verdict = "absent" if result.get("absent") else f"FAILED {result.get('doing', '')}".rstrip()
        print(f"{name}: {verdict}: {result['error']}", file=file)
    file.flush()
