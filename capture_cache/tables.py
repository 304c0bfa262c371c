"""Plain fixed-width text tables, for a package that may import no others."""

from __future__ import annotations

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns two spaces apart; one whose values are all numbers or sizes is right-aligned."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [
        max(len(columns[i]), *(len(row[i]) for row in cells)) if cells else len(columns[i])
        for i in range(len(columns))
    ]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    lines = [columns, ["-" * w for w in widths], *cells]
    return "\n".join(
        "  ".join(
            value.rjust(width) if number else value.ljust(width)
            for value, width, number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def size(nbytes: int) -> str:
    """Bytes as a person reads them."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _is_number(text: str) -> bool:
    return text == "-" or text.split(" ")[0].replace(",", "").replace(".", "", 1).isdigit()
