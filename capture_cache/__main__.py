"""`python -m capture_cache`: look after a store of captured graphs, kernels and packed weights.

Exit codes: 0 done, 1 something differs or is damaged, 2 bad arguments. Loads neither torch nor the
CUDA driver, but for `diff` of a GPU's bundle against this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from capture_cache import survey
from capture_cache.archive import export, import_file
from capture_cache.command import command, error_line, exit_code, written
from capture_cache.errors import (
    CorruptBundle,
    CudaError,
    FingerprintMismatch,
    StoreError,
)
from capture_cache.fingerprint import show as shown_value
from capture_cache.packed import PackedWeights, is_packed
from capture_cache.prune import Pruned, prune, prune_one
from capture_cache.store import Store
from capture_cache.survey import SHORT
from capture_cache.tables import size, table

Outcome = tuple[int, dict[str, Any]]  # exit code, what --json prints
_MAX_CELL = 48


def parser() -> argparse.ArgumentParser:
    p = command("capture_cache", __doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Outcome], doc: str) -> Any:
        sub = commands.add_parser(name, help=doc, description=doc, allow_abbrev=False)
        sub.add_argument("--store", help="default: $LOCKSTEP_STORE, else ~/.cache/lockstep")
        sub.add_argument("--json", action="store_true", help="print one JSON object and no table")
        sub.set_defaults(run=run)
        return sub

    add("list", run_list, "what the store holds")
    sub = add("show", run_show, "one bundle: fingerprint, ledger, kernels, files")
    sub.add_argument("name", help="the beginning of its fingerprint, or of packed weights' name")
    sub = add("diff", run_diff, "two bundles, or one and this machine, field by field")
    sub.add_argument("name")
    sub.add_argument("other", nargs="?", help="another bundle; left out: this machine")
    sub.add_argument("--device", type=int, default=0, help="GPU to compare with")
    sub = add("verify", run_verify, "read everything and compare every size and hash")
    sub.add_argument("name", nargs="?", help="one bundle, or a directory of packed weights")
    sub = add(
        "prune",
        run_prune,
        "remove what is damaged or of another version; with a limit, the oldest bundles and the "
        "kernels that none uses; or one entry",
    )
    sub.add_argument("--only", metavar="NAME", help="just the entry whose name begins so")
    sub.add_argument("--keep", type=int, metavar="N", help="the newest N bundles stay")
    sub.add_argument("--max-bytes", type=_bytes, metavar="N", help="as 500M or 20G")
    sub.add_argument("--dry-run", action="store_true", help="only say what would go")
    sub = add("export", run_export, "a bundle and its kernels into one file")
    sub.add_argument("name")
    sub.add_argument("file", type=Path)
    sub.add_argument("--force", action="store_true", help="replace the file")
    sub = add("import", run_import, "put what a file holds into the store, every hash checked")
    sub.add_argument("file", type=Path)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        code, report = args.run(args)
    except (ValueError, CorruptBundle, CudaError, FingerprintMismatch, StoreError) as e:
        print(error_line(e), file=sys.stderr)
        return exit_code(e)
    if args.json:
        print(json.dumps(report, allow_nan=False))
    return int(code)


def _store(args: argparse.Namespace, *, made: bool = True) -> Store:
    """The store that is asked for.

    Args:
        made: it must be one already; the default place may not be there yet.

    Raises:
        ValueError: it is none.
    """
    # The one read of the environment outside `runtime/config.py`, which this may not import.
    chosen = args.store or os.environ.get("LOCKSTEP_STORE")
    store = Store(Path(chosen) if chosen else Path.home() / ".cache" / "lockstep")
    if made and (chosen or os.path.lexists(store.root)):
        store.require_store()
    return store


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(text)


def run_list(args: argparse.Namespace) -> Outcome:
    store = _store(args)
    rows, packed, kernels = survey.bundles(store), survey.weights(store), survey.kernels(store)
    _say(args, f"store {store.root}")
    if rows:
        columns = ("bundle", "model", "device", "ranks", "rows", "keys", "graphs", "size", "age")
        cells = [(*_bundle_row(r), r.get("checkpoint") or "-") for r in rows]
        _say(args, "\n" + table((*columns, "checkpoint"), cells))
    if packed:
        names = ("weights", "made from", "content", "format", "ranks", "layers", "size", "state")
        _say(args, "\n" + table(names, [_weights_row(r) for r in packed]))
    if kernels:
        counts = [(arch, k["kernels"], size(k["bytes"])) for arch, k in kernels.items()]
        _say(args, "\n" + table(("kernels", "entries", "size"), counts))
    records = len(store.records())
    if records:
        _say(args, f"\n{_count(records, 'measurement')} of kernels (--kernels tune)")
    if not rows and not packed and not kernels and not records:
        _say(args, "empty: capture with python -m runtime.capture")
    bare = [r for r in rows if not r["problem"] and not r["graphs"]]
    for i, row in enumerate(bare):
        why = row["reason"] or "the manifest does not say why"
        text = f"{row['fingerprint'][:SHORT]} is the record of a capture, no graphs: {why}"
        _say(args, "\n" * (i == 0) + text)
    broken = [r for r in (*rows, *packed) if r["problem"]]
    for row in broken:
        _say(args, f"{_state(row)}: {row['problem']}")
    if broken:
        _say(args, "python -m capture_cache prune removes these; what needs them makes them again")
    report: dict[str, Any] = {
        "store": str(store.root),
        "bundles": rows,
        "weights": packed,
        "kernels": kernels,
    }
    report["measurements"] = records
    return int(any(not r["other_version"] for r in broken)), report


def _bundle_row(row: dict[str, Any]) -> tuple[object, ...]:
    age = _age(time.time() - row["captured"])
    name = row["fingerprint"][:SHORT]
    if row["problem"]:
        return (name, _state(row), "-", "-", "-", "-", "-", size(row["bytes"]), age)
    facts = (_cell(row["model"]), _cell(row["device"]), row["ep size"], row["rows"], row["keys"])
    return (name, *facts, row["graphs"] or "none", size(row["bytes"]), age)


def _weights_row(row: dict[str, Any]) -> tuple[object, ...]:
    name, nbytes = row["identity"][:SHORT], size(row["bytes"])
    if row["problem"]:
        return (name, "-", "-", "-", "-", "-", nbytes, _state(row))
    content = row["content"][:SHORT] or "-"
    facts = (row["origin"] or row["source"], content, row["format"], row["ep size"], row["layers"])
    return (name, *facts, nbytes, "ok")


def _state(row: dict[str, Any]) -> str:
    return "of another version" if row["other_version"] else "damaged"


def _count(number: int, noun: str) -> str:
    """`1 entry`, `2 entries`."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number} {noun if number == 1 else plural}"


def run_show(args: argparse.Namespace) -> Outcome:
    store = _store(args)
    path = survey.named(store, args.name)
    if is_packed(path):
        return _show_weights(args, path)
    path, manifest = survey.manifest_of(store, args.name)
    fields = dict(manifest.fingerprint.fields)
    _say(args, f"bundle {path.name}\n")
    made_from = survey.checkpoint(manifest)
    if made_from is not None:
        _say(args, f"captured from {made_from}\n")
    _say(args, table(("field", "value"), [(n, shown_value(fields, n)) for n in fields]))
    keys = survey.ledger_keys(manifest)
    if keys:
        plain = [n for n, v in keys[0].items() if isinstance(v, str | int | float)]
        names = sorted(plain, key=lambda n: n != "key")
        _say(args, "\n" + table(names, [[_number(k.get(n)) for n in names] for k in keys]))
    rows = survey.kernel_rows(store, manifest)
    columns = ("name", "arch", "registers", "spill_bytes", "shared_bytes", "digest")
    cells = [
        [_cell(_dash(r.get(c)), 16 if c == "digest" else _MAX_CELL) for c in columns] for r in rows
    ]
    if rows:
        _say(args, "\n" + table(columns, cells))
    files = {n: r.nbytes for n, r in manifest.files.items()}
    if files:
        _say(args, "\n" + table(("file", "bytes"), sorted(files.items())))
    restore = manifest.restore if isinstance(manifest.restore, dict) else {}
    _say(
        args, f"\nrestore {restore.get('kind', 'none')}: {restore.get('reason') or 'by the player'}"
    )
    arena = None if manifest.arena is None else manifest.arena.section_bytes
    for name, nbytes in (arena or {}).items():
        _say(args, f"arena {name:<10} {size(nbytes):>12}")
    report = {
        "fingerprint": path.name,
        "fields": fields,
        "checkpoint": made_from,
        "ledger": manifest.ledger,
        "kernels": rows,
        "files": files,
        "restore": manifest.restore,
        "arena": arena,
        "arena_digest": None if manifest.arena is None else manifest.arena.digest,
    }
    return int(any(r["problem"] for r in rows)), report


def _show_weights(args: argparse.Namespace, path: Path) -> Outcome:
    packed = PackedWeights(path)
    fields = dict(packed.index.identity.fields)
    _say(args, f"weights {path}\n")
    index = packed.index
    if index.origin:
        _say(args, f"packed from {index.origin}, content {index.content}\n")
    _say(args, table(("field", "value"), [(n, shown_value(fields, n)) for n in fields]))
    shards = {name: shard.nbytes for name, shard in packed.shards.items()}
    _say(args, "\n" + table(("shard", "size"), [(n, size(b)) for n, b in shards.items()]))
    tensors = {t.name: [list(t.shape), t.dtype] for t in packed.index.tensors}
    report = {"identity": path.name, "fields": fields, "shards": shards, "tensors": tensors}
    return 0, report | {"origin": index.origin, "content": index.content}


def run_diff(args: argparse.Namespace) -> Outcome:
    store = _store(args)
    _, manifest = survey.manifest_of(store, args.name)
    stored, names = manifest.fingerprint, (args.name, args.other or "this machine")
    if args.other is None:
        other = survey.machine(stored, args.device)
        arena = None
    else:
        _, second = survey.manifest_of(store, args.other)
        other = second.fingerprint
        arena = [m.arena.digest if m.arena else None for m in (manifest, second)]
    rows = survey.compared(stored, other)
    one, two = dict(stored.fields), dict(other.fields)
    cells = [
        # Where they differ, all of both: the difference may be at the end.
        (n, *(shown_value(v, n) if d else _cell(shown_value(v, n)) for v in (one, two)), _mark(d))
        for n, _, _, d in rows
    ]
    if arena is not None and arena[0] != arena[1]:
        cells.append(("arena table", str(arena[0]), str(arena[1]), _mark(True)))
    _say(args, table(("field", names[0], names[1], ""), cells))
    differing = [c[0] for c in cells if c[3]]
    _say(
        args,
        f"\n{len(differing)} of {len(cells)} fields differ" + ": capture again" * bool(differing),
    )
    fields = [{"field": n, "stored": a, "other": b, "differs": d} for n, a, b, d in rows]
    return int(bool(differing)), {"differing": differing, "fields": fields, "arena": arena}


def run_verify(args: argparse.Namespace) -> Outcome:
    if args.name and is_packed(Path(args.name)):
        found = [survey.verify_weights(Path(args.name))]
    else:
        store = _store(args)
        chosen = survey.named(store, args.name) if args.name else None
        found = []
        for row in survey.verify(store, chosen):
            if sys.stderr.isatty():
                print(f"{row[0]}  {size(row[1])}", file=sys.stderr)
            found.append(row)
    problems = [p for _, _, p in found if p is not None]
    for problem in problems:
        _say(args, f"damaged: {problem.message}")
    nbytes = sum(n for _, n, _ in found)
    _say(args, f"{_count(len(found), 'entry')}, {size(nbytes)} read, {len(problems)} damaged")
    bad = [{"path": p.path, "problem": p.message} for p in problems]
    return int(bool(problems)), {"entries": len(found), "bytes": nbytes, "damaged": bad}


def run_prune(args: argparse.Namespace) -> Outcome:
    store = _store(args)
    if args.only is not None:
        if args.keep is not None or args.max_bytes is not None:
            raise ValueError("--only names one entry; give it without --keep and --max-bytes")
        done = prune_one(store, args.only, dry_run=args.dry_run)
    else:
        done = prune(store, keep=args.keep, max_bytes=args.max_bytes, dry_run=args.dry_run)
    for line in _pruned(done, "would remove" if args.dry_run else "removed"):
        _say(args, line)
    report = {
        "dry_run": args.dry_run,
        "bundles": list(done.bundles),
        "weights": list(done.weights),
        "broken": dict(done.broken),
        "kernels": ["/".join(k) for k in done.kernels],
        "bytes": done.nbytes,
        "left_bytes": done.left_bytes,
    }
    return 0, report


def _pruned(done: Pruned, verb: str) -> Iterator[str]:
    for entry, why in done.broken:
        yield f"{verb} {entry}, {why}"
    for name in done.bundles:
        yield f"{verb} bundle {name[:SHORT]}"
    for name in done.weights:
        yield f"{verb} packed weights {name[:SHORT]}"
    more = [(done.weights, "set of packed weights"), (done.broken, "unusable entry")]
    counts = [_count(len(done.bundles), "bundle")]
    counts += [_count(len(found), noun) for found, noun in more if found]
    counts += [_count(len(done.kernels), "kernel")]
    yield (
        f"{verb} {', '.join(counts[:-1])} and {counts[-1]}, {size(done.nbytes)}; "
        f"{size(done.left_bytes)} stay, packed weights not counted"
    )


def run_export(args: argparse.Namespace) -> Outcome:
    store = _store(args)
    path, manifest = survey.manifest_of(store, args.name)
    nbytes = export(store, manifest, args.file, force=args.force)
    _say(
        args,
        f"{args.file}: bundle {path.name[:SHORT]} and {_count(len(manifest.kernels), 'kernel')}, "
        f"{size(nbytes)}",
    )
    return 0, {"file": str(args.file), "fingerprint": path.name, "bytes": nbytes}


def run_import(args: argparse.Namespace) -> Outcome:
    done = import_file(_store(args, made=False), args.file)
    for word, entries in (("added", done.added), ("present", done.present)):
        bundles = [e[:SHORT] for e in entries if "/" not in e]
        kernels = len(entries) - len(bundles)
        _say(
            args,
            f"{word:<8} {_count(kernels, 'kernel')}, {_count(len(bundles), 'bundle')} "
            f"{' '.join(bundles)}".rstrip(),
        )
    return 0, {"added": list(done.added), "present": list(done.present)}


def _bytes(text: str) -> int:
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    number, shift = (
        (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 0)
    )
    if not number.isdigit():
        raise argparse.ArgumentTypeError(f"expected bytes, as 500M or 20G, got {text!r}")
    return int(number) << shift


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _mark(differs: bool) -> str:
    return "differs" if differs else ""


def _cell(value: object, most: int = 20) -> str:
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _dash(value: object) -> object:
    return "-" if value is None else value


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(_dash(value))


if __name__ == "__main__":
    sys.exit(written(main))
