"""pyverbs, in all its versions: a guarded import, one spelling of its enums and errors, and the way to its `ibv_pd *`.

The pointer. From version 59 on, `PD.pd` is the address as an int. Before, that property is a broken cast: reading it
crashes the process. There the pointer is the first field that the PD type adds to its base type, so it lies at `id(pd)
+ base.__basicsize__`. It is looked at only through the native core's safe read, and believed only if what it points to
says what pyverbs says: the PD's handle and, through its context, the device's command fd. Otherwise we refuse.
"""

from __future__ import annotations

import importlib
import logging
import struct
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from rdmaxfer.errors import VerbsError, VerbsUnavailable
from rdmaxfer.fabric import native

_POINTER = struct.calcsize("P")

_modules: SimpleNamespace | None = None


def pyverbs() -> SimpleNamespace:
    """The parts of pyverbs in use: `device`, `pd`, `mr` (modules) and `enums`. Raises VerbsUnavailable."""
    global _modules
    if _modules is None:
        _modules = _import_quietly(importlib.import_module)
    return _modules


def _import_quietly(load: Callable[[str], Any]) -> SimpleNamespace:
    # Importing pyverbs calls logging.basicConfig, which is the program's to call.
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return SimpleNamespace(
            device=load("pyverbs.device"), pd=load("pyverbs.pd"), mr=load("pyverbs.mr"), enums=_load_enums(load)
        )
    except ImportError as error:
        raise _unavailable(error) from error
    finally:
        for handler in root.handlers[:]:
            if handler not in handlers:
                root.removeHandler(handler)
                handler.close()
        root.setLevel(level)


def _load_enums(load: Callable[[str], Any]) -> Any:
    try:
        return load("pyverbs.enums")  # up to 58
    except ModuleNotFoundError:
        return load("pyverbs.libibverbs_enums")  # from 59 on


def _unavailable(error: ImportError) -> VerbsUnavailable:
    python = f"{sys.executable} (Python {sys.version_info.major}.{sys.version_info.minor})"
    if isinstance(error, ModuleNotFoundError) and error.name == "pyverbs":
        return VerbsUnavailable(
            f"pyverbs is not importable by {python}.",
            fix="sudo apt install python3-pyverbs, or sudo dnf install python3-pyverbs. It comes with the distribution's own "
            "Python: a virtual environment sees it only if it was made with /usr/bin/python3 -m venv "
            "--system-site-packages.",
        )
    return VerbsUnavailable(
        f"pyverbs is there, but {python} can't load it: {error}.",
        fix="pyverbs must have the version of this machine's libibverbs, and be built for this Python: install the "
        "distribution's python3-pyverbs, and use the distribution's python3 with --system-site-packages.",
    )


def enum_value(name: str) -> int:
    """An enum member by its C name, e.g. IBV_ACCESS_LOCAL_WRITE. Its scope (from 59 on) does not matter."""
    enums = pyverbs().enums
    value = getattr(enums, name, None)
    if value is None:
        for scope in vars(enums).values():
            value = getattr(scope, name, None) if isinstance(scope, type) else None
            if value is not None:
                break
        else:
            raise VerbsUnavailable(f"this pyverbs has no {name}.", fix="install the distribution's python3-pyverbs.")
    return int(value)


def version() -> str:
    """What is known about the version of pyverbs, for messages. Nothing rests on it: distributions ship no metadata."""
    from importlib import metadata

    try:
        return metadata.version("pyverbs")
    except metadata.PackageNotFoundError:
        pass
    from pathlib import Path

    for word in Path("/proc/self/maps").read_text().split():
        # libibverbs.so.1.14.44.0: the number before the last is that of rdma-core, which pyverbs is a part of
        name = word.rpartition("/")[2]
        if name.startswith("libibverbs.so.") and len(name.split(".")) >= 5:
            return f"{name.split('.')[4]} (by {name})"
    return "unknown"


def verbs_error(error: Exception, verb: str) -> VerbsError:
    """A pyverbs exception as ours."""
    code = getattr(error, "error_code", None)
    return native.verbs_error(verb, code if isinstance(code, int) and code > 0 else 0, str(error).rstrip("."))


# --- ibv_pd * ---------------------------------------------------------------------------------------------------------


def pd_pointer(pd: Any, context: Any) -> int:
    """The address of the `struct ibv_pd` of a pyverbs PD of `context`. Raises VerbsUnavailable, never crashes."""
    pointer = _from_property(pd) if _has_usable_property() else _from_layout(pd)
    problem = _mismatch(pointer, pd, context)
    if problem:
        raise VerbsUnavailable(
            "rdmaxfer does not know the layout of this pyverbs "
            f"(version {version()}, Python {sys.version.split()[0]}), and refuses rather than guesses: {problem}.",
            fix="use the distribution's python3-pyverbs, or report the two versions to rdmaxfer.",
        )
    return pointer


def _has_usable_property() -> bool:
    # PD.pd became an int in the version that replaced pyverbs.enums.
    return str(getattr(pyverbs().enums, "__name__", "")).endswith("libibverbs_enums")


def _from_property(pd: Any) -> int:
    value = pd.pd
    return value if isinstance(value, int) else 0


def _from_layout(pd: Any) -> int:
    kind = type(pd)
    if kind.__name__ != "PD" or kind.__base__ is None or kind.__base__.__name__ != "PyverbsCM":
        return 0
    raw = _read(id(pd) + kind.__base__.__basicsize__, _POINTER)
    return int(struct.unpack("P", raw)[0]) if raw is not None else 0


def _mismatch(pointer: int, pd: Any, context: Any) -> str:
    """Why `pointer` can't be the address of the ibv_pd, or an empty string."""
    if pointer == 0:
        return "no pointer where one was expected"
    raw = _read(pointer, _POINTER + 4)
    if raw is None:
        return "the pointer found does not lead to memory"
    context_pointer, handle = struct.unpack("=QI" if _POINTER == 8 else "=II", raw)
    if handle != pd.handle:
        return f"the handle found is {handle}, not {pd.handle}"
    raw = _read(context_pointer + native.extension().lib.rx_context_cmd_fd_offset(), 4)
    if raw is None:
        return "the context found does not lie in memory"
    (cmd_fd,) = struct.unpack("=i", raw)
    if cmd_fd != context.cmd_fd:
        return f"the context found has the command fd {cmd_fd}, not {context.cmd_fd}"
    return ""


def _read(address: int, nbytes: int) -> bytes | None:
    module = native.extension()
    if not 0 < address < 1 << (8 * _POINTER):
        return None
    out = module.ffi.new("char[]", nbytes)
    return bytes(module.ffi.buffer(out)) if module.lib.rx_read_safely(address, out, nbytes) == 0 else None
