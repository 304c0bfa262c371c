"""The operations of a step as values: what was called, with which tensors.

The step is run once with operations that note each call, and execute it or not. Benchmarks and the
choice of kernels then work on exactly what a step launches, whatever its shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from barriers.transport import Received, Stateless, Transport
from graphs.ops import Op, Ops
from kernels.triton.launch import Arg
from kernels.triton.overlap import OFF


@dataclass(frozen=True, eq=False)
class Call:
    """One operation of a step.

    Attributes:
        op: its name in `Ops`.
        args, kwargs: as the step gave them, the launcher left out.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> Iterator[tuple[int | str, torch.Tensor]]:
        """(position or keyword, tensor) of every tensor argument."""
        named: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        for key, value in named:
            if isinstance(value, torch.Tensor):
                yield key, value

    def __getitem__(self, key: int | str) -> Any:
        return self.args[key] if isinstance(key, int) else self.kwargs[key]

    def replaced(self, new: dict[int | str, Any]) -> Call:
        """The same call with other arguments at some places."""
        args = tuple(new.get(i, a) for i, a in enumerate(self.args))
        return dataclasses.replace(
            self, args=args, kwargs={k: new.get(k, v) for k, v in self.kwargs.items()}
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for calls that launch the same kernels over the same shapes."""

        def fact(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return tuple(value.shape), str(value.dtype), value.stride()
            if isinstance(value, Mapping):
                return tuple((name, fact(value[name])) for name in sorted(value))
            return value if isinstance(value, int | float | bool | str | None) else str(type(value))

        named = sorted((k, fact(v)) for k, v in self.kwargs.items())
        return self.op, tuple(fact(a) for a in self.args), tuple(named)


Hook = Callable[[Call], None]


class RecordingOps(Ops):
    """Operations that tell `hook` of each call instead of running it.

    Args:
        inner: whose operations are taken; its launcher is that of this object, too.
    """

    def __init__(self, inner: Ops, hook: Hook) -> None:
        self.launch, self._hook = inner.launch, hook
        for name in op_names(inner):
            setattr(self, name, self._recorded(name))

    def _recorded(self, name: str) -> Op:
        def record(*args: Any, **kwargs: Any) -> None:
            self._hook(Call(name, args, kwargs))

        return record


class RecordingBranches(RecordingOps):
    """Tells `hook` of the calls of a step's branches as well, in the order of the code."""

    def ordinary(self) -> Ops:
        """These operations: nothing is launched, so there is nothing to depend on."""
        return self


class RecordingTransport(Stateless):
    """A transport whose `dispatch` is another's and whose weighted sum is told to `hook`.

    Args:
        inner: of one rank, and without host state; a transport between ranks would wait for them.
    """

    def __init__(self, inner: Transport, hook: Hook) -> None:
        self.name, self.config = inner.name, inner.config
        self.dispatch, self._hook = inner.dispatch, hook

    def combine(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        received: Received,
        ids: torch.Tensor,
        shared: torch.Tensor | None,
        *,
        layer: int = 0,
    ) -> None:
        """As `Transport.combine`."""
        args = (y, received.ids, received.weights, shared)
        self._hook(Call("combine", args, {"out": out}))


class NoLauncher:
    """Launches nothing: a step is recorded with it, on whatever machine."""

    arch, num_sms, pdl = "none", 0, OFF

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Arg, **options: Any) -> None:
        """Forget it."""


def op_names(ops: Ops) -> list[str]:
    """Names of all operations, in the order of `Ops`."""
    return [n for n, op in vars(ops).items() if n != "launch" and callable(op)]
