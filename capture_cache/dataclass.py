"""`dataclass` as the standard one, made without compiling methods for each class.

A player's first step waits for its imports, and half of our own went into compiling six methods for
each of forty small frozen classes. Here the methods of all such classes are the same few functions.
What users of a class see is the same: arguments, defaults, comparison, hash, text, `fields`,
`replace`, `asdict`; `tests/cpu/test_dataclass.py` compares them. A class that is not only frozen
(slots, order, one that changes) is made by the standard one, whose methods are faster to call.
"""

from __future__ import annotations

import dataclasses

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls=None, /, **options):
        """As `dataclasses.dataclass`."""
        if options != {"frozen": True}:
            return dataclasses.dataclass(cls, **options)
        return _frozen if cls is None else _frozen(cls)

    def _frozen(cls):
        # Without methods to compile this gives `fields` and what is made of them.
        cls = dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
        found = dataclasses.fields(cls)
        plain = all(f.init and not f.kw_only for f in found)
        plain = plain and cls.__mro__[1:] == (object,)
        assert plain, f"{cls}: use the standard dataclass"
        methods = {
            "__init__": _init(cls, found),
            "__signature__": _Signature(),
            "__repr__": _repr(tuple(f.name for f in found if f.repr)),
            "__setattr__": _refuse("assign to"),
            "__delattr__": _refuse("delete"),
            **_comparison(found),
        }
        for name, method in methods.items():
            # A class with a comparison of its own has None, from Python, for a hash.
            if cls.__dict__.get(name) is None:
                setattr(cls, name, method)
        return cls

    def _init(cls, found):
        names = tuple(f.name for f in found)
        missing = dataclasses.MISSING
        defaults = {f.name: f.default for f in found if f.default is not missing}
        makers = {f.name: f.default_factory for f in found if f.default_factory is not missing}
        then = getattr(cls, "__post_init__", None)

        def __init__(self, *args, **named):
            own = self.__dict__  # assignment is what a frozen class refuses
            if len(args) == len(names) and not named:
                own.update(zip(names, args, strict=True))
            else:
                _bind(cls.__qualname__, names, args, named)
                given = dict(zip(names, args, strict=False)) | named
                for name in names:
                    if name in given:
                        own[name] = given[name]
                    elif name in makers:
                        own[name] = makers[name]()
                    elif name in defaults:
                        own[name] = defaults[name]
                absent = [name for name in names if name not in own]
                if absent:
                    raise TypeError(
                        f"{cls.__qualname__}.__init__() missing {len(absent)} required "
                        f"argument(s): {', '.join(map(repr, absent))}"
                    )
            if then is not None:
                then(self)

        return __init__

    def _bind(shown, names, args, named):
        """Raises TypeError for arguments that fit no field, or the same twice."""
        if len(args) > len(names):
            raise TypeError(
                f"{shown}.__init__() takes {len(names) + 1} positional arguments but "
                f"{len(args) + 1} were given"
            )
        taken = names[: len(args)]
        for name in named:
            if name in taken:
                raise TypeError(f"{shown}.__init__() got multiple values for argument {name!r}")
            if name not in names:
                raise TypeError(f"{shown}.__init__() got an unexpected keyword argument {name!r}")

    class _Signature:
        """The constructor's, made for who asks."""

        def __get__(self, thing, owner):
            import inspect

            missing = dataclasses.MISSING
            parameters = []
            for f in dataclasses.fields(owner):
                default = inspect.Parameter.empty if f.default is missing else f.default
                if f.default_factory is not missing:
                    default = f.default_factory
                kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
                parameters.append(
                    inspect.Parameter(f.name, kind, default=default, annotation=f.type)
                )
            return inspect.Signature(parameters)

    def _repr(names):
        def __repr__(self):
            shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
            return f"{type(self).__qualname__}({shown})"

        return __repr__

    def _comparison(found):
        compared = tuple(f.name for f in found if f.compare)
        hashed = tuple(f.name for f in found if (f.compare if f.hash is None else f.hash))

        def __eq__(self, other):
            if type(other) is not type(self):
                return NotImplemented
            mine, theirs = self.__dict__, other.__dict__
            return tuple(mine[n] for n in compared) == tuple(theirs[n] for n in compared)

        def __hash__(self):
            own = self.__dict__
            return hash(tuple(own[n] for n in hashed))

        return {"__eq__": __eq__, "__hash__": __hash__}

    def _refuse(doing):
        def refuse(self, name, *_):
            raise dataclasses.FrozenInstanceError(f"cannot {doing} field {name!r}")

        return refuse
