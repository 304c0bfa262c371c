"""The fingerprint: the named facts that decide whether something stored is valid here.

Equal fields give equal digests whatever their order. A mismatch is always told field by field.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping

from capture_cache.dataclass import dataclass
from capture_cache.errors import FingerprintMismatch

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Fingerprint:
    """Named facts in the order in which they are shown."""

    fields: tuple[tuple[str, Value], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.fields]
        doubles = sorted({n for n in names if names.count(n) > 1})
        if not names or doubles:
            raise ValueError(
                f"a fingerprint needs unique fields, at least one; repeated: {doubles}"
            )
        for name, value in self.fields:
            plain = isinstance(value, str | int | float | bool | None)
            if not isinstance(name, str) or not plain or not _finite(value):
                raise ValueError(
                    f"fingerprint field {name!r} must be a string, a finite number, a bool or "
                    f"None, got {value!r}"
                )

    @classmethod
    def of(cls, fields: Mapping[str, Value]) -> Fingerprint:
        """From a dict, in its order."""
        return cls(tuple(fields.items()))

    @property
    def digest(self) -> str:
        """64 hex digits; the name of the bundle's directory."""
        text = json.dumps(dict(self.fields), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> list[list[Value]]:
        return [[name, value] for name, value in self.fields]

    @classmethod
    def from_json(cls, fields: object) -> Fingerprint:
        """Raises ValueError unless `fields` is a list of [name, value]."""
        pairs = isinstance(fields, list) and all(
            isinstance(f, list) and len(f) == 2 for f in fields
        )
        if not pairs:
            raise ValueError(f"a stored fingerprint is a list of [name, value], got {fields!r:.80}")
        assert isinstance(fields, list)
        return cls(tuple((name, value) for name, value in fields))


def diff(stored: Fingerprint, current: Fingerprint) -> list[str]:
    """The differing fields as "driver 580.159 → 595.20", in the current one's order."""
    old, new = dict(stored.fields), dict(current.fields)
    return [f"{name} {show(old, name)} → {show(new, name)}" for name in differing(stored, current)]


def check(stored: Fingerprint, current: Fingerprint) -> None:
    """Raises FingerprintMismatch naming every differing field."""
    if stored.digest != current.digest:
        raise FingerprintMismatch(
            "the stored bundle was captured elsewhere: "
            + "; ".join(diff(stored, current))
            + ". Capture again on this machine"
        )


def matches(
    stored: Fingerprint, current: Fingerprint, *, unset: Collection[str] = frozenset()
) -> bool:
    """Whether they agree in every field but those of `unset`."""
    return not any(name not in unset for name in differing(stored, current))


def differing(stored: Fingerprint, current: Fingerprint) -> list[str]:
    """Names of the fields that differ, in the current one's order."""
    old, new = dict(stored.fields), dict(current.fields)
    return [
        name
        for name in [*new, *(n for n in old if n not in new)]
        # As JSON, because 1 == True in Python but not in the digest.
        if (name in old, json.dumps(old.get(name))) != (name in new, json.dumps(new.get(name)))
    ]


def nearest(candidates: Iterable[Fingerprint], current: Fingerprint) -> Fingerprint | None:
    """The candidate with the fewest differing fields."""
    return min(candidates, key=lambda c: len(diff(c, current)), default=None)


def show(fields: Mapping[str, Value], name: str) -> str:
    """A field's value as a person reads it."""
    if name not in fields:
        return "(absent)"
    value = fields[name]
    return value if isinstance(value, str) and value else json.dumps(value)


def _finite(value: Value) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
