"""A kernel's machine code: its instructions, and where each may go next.

Read from the disassembler that comes with Triton. Where control may go is never understated, but a
trap is an end: the launch fails there.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import triton

_LABEL = re.compile(r"^([.$\w]+):")
_CODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);?\s*$")
_TARGET = re.compile(r"`\(([.$\w]+)\)")
_TARGETS = re.compile(r"BRANCH_TARGETS ([^\"]+)")
# After them control does not go on; RET goes back behind a CALL, which is taken to go on by itself.
_ENDS = ("EXIT", "RET", "BRA", "BRX", "JMP", "BPT.TRAP")
_JUMPS = ("BRA", "BRX", "JMP", "CALL", "WARPSYNC.COLLECTIVE")


@dataclass(frozen=True)
class Instruction:
    """One line: predicate, operation with its suffixes, operands; indices of what may come next."""

    predicate: str
    name: str
    operands: str
    next: tuple[int, ...]

    def is_a(self, *names: str) -> bool:
        """Whether it is one of these operations, whatever suffixes follow."""
        return any(self.name == n or self.name.startswith(f"{n}.") for n in names)


@dataclass(frozen=True)
class Sass:
    """A kernel's instructions in their order in memory; it is entered at the first."""

    instructions: tuple[Instruction, ...]

    @classmethod
    def of(cls, cubin: bytes) -> Sass:
        """Disassemble device code that holds one kernel."""
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return cls.parse(done.stdout)

    @classmethod
    def parse(cls, text: str) -> Sass:
        """As `nvdisasm -c` prints it."""
        lines: list[tuple[str, str, str]] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(lines)
            elif code := _CODE.match(line):
                lines.append((code[1] or "", code[2], code[3]))
        assert lines, "no code"
        return cls(
            tuple(
                Instruction(*line, _next(i, line, labels, len(lines)))
                for i, line in enumerate(lines)
            )
        )

    def at(self, *names: str) -> list[int]:
        """Where such operations are."""
        return [i for i, code in enumerate(self.instructions) if code.is_a(*names)]

    def reached_without(self, *names: str, but: Collection[int] = ()) -> set[int]:
        """What can run before any such operation, those at `but` not counted."""
        seen, ahead = set[int](), [0]
        while ahead:
            i = ahead.pop()
            if i in seen or (self.instructions[i].is_a(*names) and i not in but):
                continue
            seen.add(i)
            ahead += self.instructions[i].next
        return seen


def _next(i: int, line: tuple[str, str, str], labels: dict[str, int], size: int) -> tuple[int, ...]:
    predicate, name, operands = line
    after: list[int] = []
    if name.startswith(_JUMPS):
        if several := _TARGETS.search(operands):
            after += [labels[name.strip()] for name in several[1].split(",")]
        else:
            after += [labels[target] for target in _TARGET.findall(operands)]
        assert after, f"a jump to where? {name} {operands}"
    # `BRA P1, …` has a condition beside its predicate.
    conditional = predicate or "." in name or not operands.startswith(("`", "R"))
    ends = name.startswith(_ENDS) and not (name.startswith("BRA") and conditional)
    if (predicate or not ends) and i + 1 < size:
        after.append(i + 1)
    return tuple(dict.fromkeys(after))
