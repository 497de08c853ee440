"""Function calls between the sandbox's two processes, as if the code and its tests shared one.

What crosses is a copy, and nothing of the code's acts in the tester. Values of `COPIED` types and
NumPy's arrays and scalars arrive as what they are, a subclass as the nearest of those, a namedtuple
as one with the same fields, an exception as the nearest built-in one. Functions and iterators stay
where they are and are called from the other side. Lists, dicts, sets, ... among the arguments that
a call has changed are changed on the caller's side when it returns. Any other value that the code
returns ends the run, which fails: the tests could mistake an error for one that the code raised.
"""
import builtins
import decimal
import io
import operator
import os
import pickle
import sys
import traceback
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction

PLAIN = dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float, complex, range
# Subclasses before their bases: a value goes as the first that it is an instance of.
COPIED = (Counter, OrderedDict, defaultdict, deque, Fraction, Decimal, datetime, date, time,
          timedelta, timezone, *PLAIN)
MUTABLE = dict, list, set, bytearray, deque
VIEWS = {"keys": type({}.keys()), "values": type({}.values()), "items": type({}.items())}
ERRORS = {t: t.__name__ for t in (*vars(decimal).values(), *vars(builtins).values())
          if isinstance(t, type) and issubclass(t, BaseException)}
NAMED_ERRORS = {name: t for t, name in ERRORS.items()}


def made(kind, *args):
    """In a pickle this stands for the reader's `Peer.made`."""


# What a pickle of the code's may name. Of a class written in Python only its call: pickles can set
# attributes of what they name, and a class so changed would act in the tester.
KNOWN = {(t.__module__, t.__qualname__): t if t in PLAIN else t.__call__ for t in COPIED} | {
    ("builtins", "bool"): bool, ("builtins", "Ellipsis"): ..., ("builtins", "NotImplemented"):
    NotImplemented}


def containers(value) -> list:
    """Every list, dict, set, ... inside a value once, in an order that both processes share."""
    seen, todo = {}, [value]
    while todo:
        x = todo.pop()
        if isinstance(x, (*MUTABLE, tuple)) and id(x) not in seen:
            seen[id(x)] = x
            if not isinstance(x, (set, bytearray)):
                todo.extend(x.values() if isinstance(x, dict) else x)
    return [x for x in seen.values() if not isinstance(x, tuple)]


def flat(container) -> list:
    """What is in it: two of these differ if it has been changed."""
    return [*container, *(container.values() if isinstance(container, dict) else ())]


def change(container, content):
    """Give a container another content, in place."""
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(content)


class Writer(pickle.Pickler):
    """Writes a message; `known` containers, which the reader has too, go as their number."""

    def __init__(self, file, peer, known):
        super().__init__(file, 4)
        self.peer, self.known = peer, {id(x): i for i, x in enumerate(known)}

    def persistent_id(self, x):
        return self.known.get(id(x))

    def reducer_override(self, x):
        if type(x) in COPIED or x is ... or x is NotImplemented or self.has_name(x):
            return NotImplemented
        if isinstance(x, BaseException):
            return made, ("error", *self.error(x))
        np = sys.modules.get("numpy")
        if np and isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "biufcmMSU":
            return made, ("array", x.dtype.str, x.shape, x.tobytes(), isinstance(x, np.generic))
        for kind, view in VIEWS.items():
            if isinstance(x, view):
                return made, ("view", kind, list(x))
        for base in COPIED:
            if isinstance(x, base):
                return self.as_base(x, base)
        if callable(x) and not isinstance(x, type):
            return made, ("function", self.peer.number(x, x))
        if isinstance(x, Iterator):
            return made, ("iterator", self.peer.number(x, x.__next__))
        if not self.peer.trusting:  # what the tests pass may be of any type that pickle knows
            return NotImplemented
        raise TypeError(f"a {type(x).__name__}, here {x.__name__}" if isinstance(x, type) else
                        f"a {type(x).__name__}")

    def has_name(self, x) -> bool:
        """Whether the reader finds a class or function under its name."""
        name = getattr(x, "__module__", None), getattr(x, "__qualname__", None)
        if x is made or self.peer.trusting:
            return x is made or isinstance(x, type) and name in KNOWN
        return getattr(sys.modules.get(name[0]), str(name[1]), None) is x

    def as_base(self, x, base):
        if base is tuple and hasattr(x, "_fields"):
            return made, ("record", type(x).__name__, list(x._fields), list(x))
        if base in (dict, list, tuple, set, frozenset):
            return base, (dict(x) if base is dict else list(x),)
        if base in PLAIN:
            return base, (base.__add__(x, base()),)
        _, args, _, *items = (*base.__reduce_ex__(x, 4), None)[:5]  # without attributes of its own
        return base, args, None, *items

    def error(self, x):
        """(name, args) of the nearest built-in exception."""
        name = next(ERRORS[t] for t in type(x).__mro__ if t in ERRORS)
        try:
            self.peer.pickled(x.args)
            return name, x.args
        except Exception:  # they cannot cross: its text instead
            return name, (str(x),)


class Reader(pickle.Unpickler):
    def __init__(self, file, peer, known):
        super().__init__(file)
        self.peer, self.known = peer, known

    def persistent_load(self, number):
        return self.known[number]

    def find_class(self, module, name):
        if (module, name) == (made.__module__, "made"):
            return self.peer.made
        return super().find_class(module, name) if self.peer.trusting else KNOWN[module, name]


class Peer:
    """The other process. `reads`, `writes`: binary files. `trusting`: it may send any pickle.

    A message is ("call", number, args, kwargs), answered by ("return" or "raise", value, {number of
    a container among the arguments: its new content}); before the answer the other side may call
    back.
    """

    def __init__(self, reads, writes, trusting):
        self.reads, self.writes, self.trusting = reads, writes, trusting
        self.ours, self.numbers = [], {}

    def number(self, x, function) -> int:
        """The number by which the other side may call `function`; `x` is what it stands for."""
        if id(x) not in self.numbers:
            self.numbers[id(x)] = len(self.ours)
            self.ours.append((function, x))  # x too: its id must stay its own
        return self.numbers[id(x)]

    def pickled(self, message, known=()) -> bytes:
        data = io.BytesIO()
        Writer(data, self, known).dump(message)
        return data.getvalue()

    def send(self, data):
        self.writes.write(data)
        self.writes.flush()

    def receive(self, known=()):
        return Reader(self.reads, self, known).load()

    # ------------------------------------------------------------ calls

    def call(self, number, args=(), kwargs=None):
        """Call the other side's function; ends this process where that cannot be done."""
        try:
            kind, value = self._call(number, args, kwargs or {})
        except (EOFError, BrokenPipeError):
            give_up("the code ended before its tests did")
        except Exception as e:
            give_up(f"a value cannot pass between the code and its tests: {e or type(e).__name__}")
        if kind == "raise":
            raise value
        return value

    def _call(self, number, args, kwargs):
        known = containers((args, kwargs))
        self.send(self.pickled(("call", number, args, kwargs)))
        while (message := self.receive(known))[0] == "call":
            self.serve(*message[1:])
        kind, value, changes = message
        for i, content in changes.items():
            change(known[i], content)
        return kind, value

    def serve(self, number, args, kwargs):
        """Run our function for the other side, and answer."""
        known = containers((args, kwargs))
        before = [flat(x) for x in known]
        try:
            kind, value = "return", self.ours[number][0](*args, **kwargs)
        except BaseException as e:
            kind, value = "raise", e
            if not isinstance(e, StopIteration):
                show(e)
        changed = {i: dict(x) if isinstance(x, dict) else list(x) for i, x in enumerate(known)
                   if len(now := flat(x)) != len(before[i])
                   or not all(map(operator.is_, now, before[i]))}
        try:
            self.send(self.pickled((kind, value, changed), known))
        except BrokenPipeError:
            os._exit(1)
        except BaseException as e:
            give_up(f"the tests cannot receive this value: {e or type(e).__name__}")

    # ------------------------------------------------------------ what is not a plain copy

    def made(self, kind, *args):
        return {"function": self.function, "iterator": self.iterator, "error": error, "view": view,
                "record": record, "array": array}[kind](*args)

    def function(self, number):
        return lambda *args, **kwargs: self.call(number, args, kwargs)

    def iterator(self, number):
        """A generator of the other side's items, each fetched when it is asked for."""
        while True:
            try:
                item = self.call(number)
            except StopIteration:
                return
            yield item


def error(name, args):
    kind = NAMED_ERRORS[name]
    try:
        return kind(*args)
    except Exception:  # some want arguments of their own
        e = kind.__new__(kind)
        e.args = args
        return e


def view(kind, items):
    return (dict(items).items() if kind == "items" else dict.fromkeys(items).keys()
            if kind == "keys" else dict(enumerate(items)).values())


def record(name, fields, values):
    return namedtuple(name, fields)(*values)


def array(dtype, shape, data, scalar):
    import numpy as np
    values = np.frombuffer(data, np.dtype(dtype)).reshape(shape)
    return values[()] if scalar else values.copy()


def show(error):
    try:
        traceback.print_exception(error, limit=-3)
    except BaseException:  # the code may have closed or replaced sys.stderr
        pass


def give_up(why):
    """End this process, and with it the run, which fails; no test can catch that."""
    try:
        os.write(2, f"{why}\n".encode(errors="replace"))
    finally:
        os._exit(1)
