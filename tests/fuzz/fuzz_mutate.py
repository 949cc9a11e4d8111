"""Changes what is valid: bytes, the values and shape of a msgpack tree, the fields and lengths of a frame header."""

from __future__ import annotations

import math
import struct
from typing import Any

import fuzz_examples as examples
import msgspec
import numpy as np
from fuzz_choices import Choices

from rdmaxfer.cm import messages as m

EDGES = [
    *(0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 8192, 65535, 65536),
    *((1 << 24) - 1, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 53) - 1, 1 << 53),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1),
]
SCALARS: list[Any] = [
    *(None, False, True, -1, -(1 << 63), 0.0, -1.0, 1e308, math.inf, -math.inf, math.nan, 0.05, 86400.0),
    *("", "x", "\0", "é" * 1024, "x" * 1025, b"", bytes(15), bytes(16), bytes(17), [], {}, [[]], {"x": 1}),
    msgspec.msgpack.Ext(5, b"x"),
    *EDGES,
]
TEXTS = [
    "|O",
    "|S4",
    "<f16",
    "<U1",
    "<M8[generic]",
    "<M8[0us]",
    "<m8[25us]",
    "<i4",
    ">c16",
    "|b1",
    "|u1",
    "struct",
    "array",
]

# --- bytes ------------------------------------------------------------------------------------------------------------


def change_bytes(data: bytes, choose: Choices) -> bytes:
    """One to four changes anywhere."""
    out = bytearray(data)
    for _ in range(1 + choose.below(4)):
        at = choose.below(len(out) + 1)
        match choose.below(8):
            case 0 | 1:
                out[at : at + 1] = choose.some_bytes(1)
            case 2 if out:
                out[at % len(out)] ^= 1 << choose.below(8)
            case 3:
                del out[at : at + 1 + choose.below(16)]
            case 4:
                out[at:at] = choose.some_bytes(1 + choose.below(16))
            case 5:
                out[at:at] = out[at : at + 1 + choose.below(64)]
            case 6:
                del out[at:]
            case _:
                width = choose.pick((1, 2, 4, 8))
                order = choose.pick(("little", "big"))
                out[at : at + width] = (choose.pick(EDGES) % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
    return bytes(out)


# --- trees ------------------------------------------------------------------------------------------------------------


def places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree of dicts and lists."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        found.append((tree, key))
        if isinstance(value, (dict, list)):
            places(value, found)
    return found


def copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list) else tree


def other_value(old: Any, choose: Choices) -> Any:
    """Something else in place of `old`, mostly of the same kind."""
    match choose.below(8):
        case 0:
            return copied(choose.pick(SCALARS))  # theirs must stay as they are
        case 1:
            nested: Any = old
            for _ in range(choose.pick((1, 2, 8, 33, 100))):
                nested = [nested] if choose.one_in(2) else {"x": nested}
            return nested
    match old:
        case bool():
            return not old
        case int():
            return max(
                -(1 << 63), min(choose.pick(EDGES) if choose.one_in(2) else old + choose.below(5) - 2, (1 << 64) - 1)
            )
        case float():
            return old * choose.pick((0.5, 2.0, -1.0)) if choose.one_in(2) else choose.pick(EDGES)
        case str():
            return choose.pick((old + "x", old[:-1], old * 9, old[1:], old.upper(), choose.pick(TEXTS)))
        case bytes():
            return choose.pick((old + b"x", old[:-1], change_bytes(old, choose), choose.some_bytes(len(old))))
        case list():
            return choose.pick((old * 2, old[:-1], old[::-1], old * 40, [*old, None]))
        case dict():
            return {**old, "x": 0} if choose.one_in(2) else dict(list(old.items())[1:])
    return copied(choose.pick(SCALARS))  # theirs must stay as they are


def change_tree(tree: Any, choose: Choices) -> Any:
    """One to three changes somewhere in the tree."""
    tree = copied(tree)
    for _ in range(1 + choose.below(3)):
        everywhere = places(tree, [])
        if not everywhere:
            return other_value(tree, choose)
        container, key = choose.pick(everywhere)
        match choose.below(8):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[choose.pick(("x", "type", "kind", "ring", "session", "request", ""))] = container.pop(key)
            case 1:
                container.append(copied(container[key]))
            case 2:
                donor, its_key = choose.pick(everywhere)
                container[key] = copied(donor[its_key])
            case _:
                container[key] = other_value(container[key], choose)
    return tree


def packed(tree: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(tree)
    except (TypeError, ValueError, OverflowError, RecursionError):  # text that is no Unicode, say
        return b"\xc1"


# --- messages ---------------------------------------------------------------------------------------------------------


def message(choose: Choices) -> bytes:
    """The bytes of a valid message, or of one that was changed."""
    index = choose.below(len(examples.BODIES))
    return change_message(examples.ENCODED[index], examples.BODIES[index], choose)


def change_message(data: bytes, body: dict[str, Any], choose: Choices) -> bytes:
    match choose.below(10):
        case 0:
            return data if choose.one_in(2) else data + bytes(choose.pick((1, m.MAX_MESSAGE_BYTES)))
        case 1 | 2 | 3:
            return change_bytes(data, choose)
        case 4:  # fields of another message, too
            return m.MAGIC + b"\x01" + packed({**body, **choose.pick(examples.BODIES)})
        case 5:
            return m.MAGIC + choose.some_bytes(1) + packed(change_tree(body, choose) if choose.one_in(2) else body)
        case 6:
            return m.MAGIC + b"\x01" + change_bytes(packed(change_tree(body, choose)), choose)
    return m.MAGIC + b"\x01" + packed(change_tree(body, choose))


# --- headers ----------------------------------------------------------------------------------------------------------


def item_bytes(kind: Any) -> int:
    """The size of a type in wire form, 0 if that can't be told."""
    match kind:
        case str():
            try:
                return np.dtype(kind).itemsize
            except Exception:  # numpy raises many things for text that is no type
                return 0
        case ["struct", int(size), *_]:
            return size
        case ["array", base, [*dims]] if all(type(dim) is int for dim in dims):
            return math.prod(dims) * item_bytes(base)
    return 0


def wire_type(dtype: np.dtype[Any]) -> Any:
    """The wire form of a dtype, by the table in docs/protocol.md."""
    if dtype.subdtype is not None:
        return ["array", wire_type(dtype.subdtype[0]), list(dtype.subdtype[1])]
    if dtype.fields is not None:
        fields = [[name, wire_type(field[0]), field[1]] for name, field in dtype.fields.items()]
        return ["struct", dtype.itemsize, fields]
    return dtype.str


KINDS = [([*shape], wire_type(np.dtype(dtype))) for shape, dtype in examples.TYPES]


def assembled(shape: list[Any], kind: Any, metadata: bytes, choose: Choices) -> bytes:
    """A header whose lengths agree with what is in it, but for one in four."""
    try:
        dims = struct.pack(f"<{len(shape)}Q", *shape)
    except struct.error:
        shape, dims = [1], struct.pack("<Q", 1)
    text = isinstance(kind, str) and not choose.one_in(16)
    description = kind.encode("utf-8", "replace") if text else packed(kind)
    payload = math.prod(shape) * item_bytes(kind)
    used = 64 + len(dims) + len(description) + len(metadata)
    size = -(-used // 64) * 64
    fields: list[Any] = [
        *(b"RXFR", 1, len(shape), 0, size, len(description), len(metadata), 0),
        *(examples.WHERE["epoch"], examples.WHERE["slot"], 1, examples.WHERE["position"], payload, 0, 0),
    ]
    widths = (4, 1, 1, 2, 2, 2, 2, 2, 4, 4, 8, 8, 8, 8, 8)
    if choose.one_in(4):
        at = 1 + choose.below(len(fields) - 1)
        old = fields[at]
        fields[at] = choose.pick(EDGES) if choose.one_in(2) else old + choose.below(131) - 65
    fields[1:] = [value % (1 << 8 * width) for value, width in zip(fields[1:], widths[1:], strict=True)]
    return (struct.pack("<4sBBHHHHHIIQQQQQ", *fields) + dims + description + metadata).ljust(size, b"\0")


def header(choose: Choices) -> bytes:
    """A valid header, or one that was changed."""
    match choose.below(10):
        case 0:
            return choose.pick(examples.HEADERS)
        case 1 | 2 | 3:
            return change_bytes(choose.pick(examples.HEADERS), choose)
    shape, kind = choose.pick(KINDS)
    metadata = choose.pick(examples.METADATA)
    match choose.below(4):
        case 0:
            shape = (
                [other_value(dim, choose) for dim in shape] if choose.one_in(2) else shape + [1, 0][: choose.below(3)]
            )
        case 1 | 2:
            kind = change_tree(kind, choose) if isinstance(kind, list) else other_value(kind, choose)
        case _:
            metadata = change_tree(metadata, choose)
    more = b"" if metadata == {} else packed(metadata)
    if choose.one_in(8):
        more = change_bytes(more, choose)
    return assembled(shape, kind, more, choose)


def in_band(choose: Choices) -> bytes:
    """An immediate (4 bytes), or a message in band."""
    if choose.one_in(2):
        imm = choose.pick(examples.IMMEDIATES) ^ (1 << choose.below(32) if choose.one_in(2) else choose.below(1 << 32))
        return imm.to_bytes(4, "big")
    return change_bytes(choose.pick(examples.IN_BAND), choose)
