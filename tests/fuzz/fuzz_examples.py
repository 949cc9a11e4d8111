"""What fuzzing starts from: valid messages and frame headers of every kind.

Messages are made from their classes, so that a new field or message is fuzzed without anybody thinking of it: HELLO and
ACCEPT by the fakes of the unit tests, the others from the bounds of their fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import numpy as np
from cm_fakes import RING, VERBS, Server, make_hello
from msgspec import inspect

from rdmaxfer import inband
from rdmaxfer.cm import messages as m
from rdmaxfer.cm.states import REPLIES
from rdmaxfer.errors import LocalProtocolError
from rdmaxfer.frame import HEADER_ROOM, encode_metadata, frame_type

SESSION = bytes(range(1, 17))
KNOWN: dict[type, Any] = {m.RingAddress: RING, m.VerbsAddress: VERBS}
"""Structures whose fields depend on each other."""

# --- messages ---------------------------------------------------------------------------------------------------------


def values(kind: inspect.Type) -> list[Any]:
    """Values that a field of this type may have, those at its bounds among them."""
    match kind:
        case inspect.IntType(ge=low, le=high):
            least = 0 if low is None else low
            return [least, least + 1, (1 << 64) - 1 if high is None else high]
        case inspect.FloatType(ge=low, le=high):
            return [1.0 if low is None else low, 1.0 if high is None else high]
        case inspect.StrType(max_length=most):
            return ["x", "", "é" * (most or 8)]
        case inspect.BytesType(min_length=least, max_length=most):
            return [bytes(least or 0), b"\xff" * (most if most is not None else 8)]
        case inspect.BoolType():
            return [False, True]
        case inspect.NoneType():
            return [None]
        case inspect.LiteralType(values=them):
            return list(them)
        case inspect.EnumType(cls=cls):
            return list(cls)
        case inspect.StructType(cls=cls) if cls in KNOWN:
            return [KNOWN[cls]]
        case inspect.StructType(cls=cls, fields=fields):
            return [cls(**{field.name: values(field.type)[0] for field in fields})]
        case inspect.UnionType(types=types):
            return [value for each in types for value in values(each)]
        case inspect.VarTupleType(item_type=item, min_length=least):
            some = values(item)
            return [tuple(some[:1] * max(least or 0, 1)), tuple(some[: least or 0])]
        case inspect.ListType(item_type=item, min_length=least):
            some = values(item)
            return [some[:1] * max(least or 0, 1), some[: least or 0]]
        case inspect.DictType(key_type=key, value_type=value):
            return [{values(key)[0]: values(value)[0]}, {}]
    raise NotImplementedError(f"no examples of {kind}: add some here")


def first_of(cls: type[m.Message]) -> m.Message:
    """One message of this class."""
    hello = msgspec.structs.replace(make_hello(), session=SESSION)
    if cls is m.Hello:
        return hello
    if cls is m.Accept:
        accepted = Server().hello(hello, "")
        assert isinstance(accepted, m.Accept)
        return accepted
    fields = {field.name: field for field in inspect.type_info(cls).fields}  # type: ignore[attr-defined]
    made: dict[str, Any] = {name: values(field.type)[0] for name, field in fields.items()}
    made.update(session=SESSION, request=2)
    return cls(**made)


def is_valid(message: m.Message) -> bool:
    try:
        m.encode(message)
    except LocalProtocolError:
        return False
    return True


def variants(message: m.Message) -> Iterator[m.Message]:
    """The message with one field changed, where that is valid."""
    for field in inspect.type_info(type(message)).fields:  # type: ignore[attr-defined]
        if field.name in ("session", "request"):
            continue
        for value in values(field.type):
            changed = msgspec.structs.replace(message, **{field.name: value})
            if is_valid(changed):
                yield changed


def _messages() -> list[m.Message]:
    found: list[m.Message] = []
    for cls in get_args(m.Message):
        message = first_of(cls)
        assert is_valid(message), f"no valid {cls.__name__} can be made any more: look at {__name__}"
        found += [message, *variants(message)]
    return found


MESSAGES = _messages()
REQUESTS = [message for message in MESSAGES if type(message) in REPLIES]
REFUSALS = [message for message in MESSAGES if isinstance(message, m.Refuse)]
ENCODED = [m.encode(message) for message in MESSAGES]
BODIES: list[dict[str, Any]] = [msgspec.msgpack.decode(data[m.PREFIX_BYTES :]) for data in ENCODED]

# --- headers ----------------------------------------------------------------------------------------------------------

WHERE: dict[str, int] = {"epoch": 7, "slot": 3, "position": 99}
SLOT_BYTES = 1 << 16

NESTED = np.dtype([("a", "<i4"), ("b", [("c", "f8", (2, 2)), ("d", "M8[us]")]), ("e", "?")])
GAPS = np.dtype({"names": ["x", "y"], "formats": ["<u2", ">f4"], "offsets": [6, 1], "itemsize": 11})
TYPES: list[tuple[tuple[int, ...], Any]] = [
    *(((48, 64, 3), "u1"), ((), "<f8"), ((0, 5), ">c16"), ((7,), "<M8[25us]"), ((2,), "m8"), ((1,) * 8, "?")),
    *(((2, 3), NESTED), ((5,), GAPS), ((SLOT_BYTES,), "i1"), ((0,), NESTED), ((3, 0, 2), "<f2")),
]
METADATA: list[dict[str, Any]] = [
    {},
    {"k": 5},
    {"camera": "left", "gain": 1.5, "tags": ["a", {"b": [None, True, b"\0"]}], "big": (1 << 64) - 1},
    {"at": msgspec.msgpack.decode(b"\xd6\xff\x00\x00\x00\x01")},
    {"long": "x" * 4000},
]


def header(kind: tuple[tuple[int, ...], Any], metadata: dict[str, Any], **numbers: int) -> bytes:
    room = bytearray(HEADER_ROOM)
    numbers = {**WHERE, "seq": 1 << 40, "captured_ns": -1, "pushed_ns": 1, **numbers}
    size = frame_type(*kind).pack_into(room, HEADER_ROOM, metadata=encode_metadata(metadata), **numbers)
    return bytes(room[-size:])


HEADERS = [header(kind, metadata) for kind in TYPES for metadata in METADATA]

# --- in band ----------------------------------------------------------------------------------------------------------

IMMEDIATES = [
    *(inband.pack_bye_imm(), inband.pack_credit_imm(), inband.pack_resize_imm(1 << 20)),
    inband.pack_frame_imm(63, 8192, 65535),
]
IN_BAND = [inband.pack_message(kind, value) for kind in inband.MessageKind for value in (0, 5, (1 << 64) - 1)]
