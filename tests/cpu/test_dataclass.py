"""Our frozen dataclasses against the standard ones: what a user of a class sees is the same."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import field
from functools import cached_property
from typing import Any

import pytest

from capture_cache.dataclass import dataclass


def body(decorate: Callable[[type], type]) -> Any:
    """The same class under one of the two decorators."""

    class Thing:
        """Doc."""

        name: str
        size: int = 3
        tags: dict[str, int] = field(default_factory=dict, hash=False)
        note: str = field(default="", compare=False, repr=False)

        def __post_init__(self) -> None:
            if self.size < 0:
                raise ValueError(f"size {self.size}")

        @cached_property
        def twice(self) -> int:
            return 2 * self.size

    return decorate(Thing)


OURS, STANDARD = body(dataclass(frozen=True)), body(dataclasses.dataclass(frozen=True))
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("a",), {}),
    (("a", 5), {"note": "n"}),
    (("a", 5, {"x": 1}, "n"), {}),
    ((), {"name": "a", "tags": {"y": 2}}),
    ((), {}),
    ((), {"size": 1}),
    (("a",), {"name": "b"}),
    (("a",), {"other": 1}),
    (("a", 1, {}, "", 5), {}),
    (("a", -1), {}),
]


def outcome(made: Callable[[], Any]) -> Any:
    try:
        thing = made()
    except (TypeError, ValueError) as e:
        return type(e)
    return dataclasses.asdict(thing), repr(thing), hash(thing), thing.twice


@pytest.mark.parametrize(("args", "named"), CALLS)
def test_instances_are_alike(args: tuple[Any, ...], named: dict[str, Any]) -> None:
    assert outcome(lambda: OURS(*args, **named)) == outcome(lambda: STANDARD(*args, **named))


def test_what_is_wrong_with_a_call_is_named() -> None:
    with pytest.raises(TypeError, match="missing 1 required argument.*'name'"):
        OURS()
    with pytest.raises(TypeError, match="unexpected keyword argument 'nmae'"):
        OURS(nmae="x")
    with pytest.raises(TypeError, match="multiple values for argument 'name'"):
        OURS("x", name="y")
    with pytest.raises(TypeError, match="takes 5 positional arguments but 6 were given"):
        OURS(1, 2, 3, 4, 5)


@pytest.mark.parametrize("kind", [OURS, STANDARD])
def test_comparison_and_hash(kind: Any) -> None:
    assert kind("a", 1, note="n") == kind("a", 1, note="m"), "a field that is not compared"
    assert kind("a", 1) != kind("a", 2)
    assert kind("a", 1) != ("a", 1)
    assert hash(kind("a", tags={"x": 1})) == hash(kind("a", tags={"y": 1}))
    thing = kind("a", 1)
    _ = thing.twice  # what is cached is no part of it
    assert thing == kind("a", 1)
    assert kind("a").tags is not kind("a").tags


@pytest.mark.parametrize("decorate", [dataclass, dataclasses.dataclass])
def test_methods_of_the_class_itself_stay(decorate: Any) -> None:
    class Own:
        name: str

        def __hash__(self) -> int:
            return 7

        def __repr__(self) -> str:
            return "own"

    class Compared:
        name: str

        def __eq__(self, other: object) -> bool:
            return True

    own, compared = decorate(frozen=True)(Own), decorate(frozen=True)(Compared)
    assert (hash(own("a")), repr(own("a")), own("a") == own("b")) == (7, "own", False)
    assert compared("a") == compared("b")
    assert hash(compared("a")) == hash(("a",))


@pytest.mark.parametrize("kind", [OURS, STANDARD])
def test_nothing_can_be_assigned_or_deleted(kind: Any) -> None:
    thing = kind("a")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'size'"):
        thing.size = 4
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'new'"):
        thing.new = 4
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'size'"):
        del thing.size


@pytest.mark.parametrize("kind", [OURS, STANDARD])
def test_the_standard_module_knows_it(kind: Any) -> None:
    assert dataclasses.is_dataclass(kind)
    assert [f.name for f in dataclasses.fields(kind)] == ["name", "size", "tags", "note"]
    assert dataclasses.replace(kind("a", 1), size=2) == kind("a", 2)
    assert copy.deepcopy(kind("a", 1)) == kind("a", 1)
    assert kind.__doc__ == "Doc."
    with pytest.raises(ValueError, match="size -1"):
        dataclasses.replace(kind("a", 1), size=-1)
    match kind("a", 1):
        case kind("a", size):
            assert size == 1


def test_signatures_are_alike() -> None:
    ours, standard = (inspect.signature(kind).parameters for kind in (OURS, STANDARD))
    assert list(ours) == list(standard)
    assert [p.kind for p in ours.values()] == [p.kind for p in standard.values()]
    assert ours["size"].default == standard["size"].default == 3
    assert ours["name"].default is standard["name"].default is inspect.Parameter.empty


@dataclass(frozen=True)
class Sent:
    """A class that pickle can find."""

    value: int


def test_it_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(Sent(3))) == Sent(3)


def test_its_own_methods_stay() -> None:
    @dataclass(frozen=True)
    class Shown:
        value: int

        def __repr__(self) -> str:
            return "shown"

    assert repr(Shown(1)) == "shown"


def test_what_is_not_only_frozen_is_the_standard_one() -> None:
    @dataclass
    class Changing:
        value: int = 0

    @dataclass(frozen=True, order=True)
    class Ordered:
        value: int

    thing = Changing()
    thing.value = 4
    assert thing == Changing(4)
    assert Ordered(1) < Ordered(2)
    assert {Ordered(1): "x"}[Ordered(1)] == "x"


def test_what_it_does_not_do_is_refused() -> None:
    with pytest.raises(AssertionError, match="use the standard dataclass"):

        @dataclass(frozen=True)
        class Hidden:
            value: int = field(default=0, init=False)

    with pytest.raises(AssertionError, match="use the standard dataclass"):

        @dataclass(frozen=True)
        class Child(Sent):
            more: int = 0
