"""pyverbs in its versions, told by stand-ins; the real one is met in tests/device."""

from __future__ import annotations

import errno
import logging
import struct
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rdmaxfer.errors import VerbsError, VerbsUnavailable
from rdmaxfer.fabric import bridge, native


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


def loader(*names: str, root_handler: bool = False) -> Any:
    """An import function that knows only these modules, and may do to the root logger what pyverbs does."""

    def load(name: str) -> ModuleType:
        if name not in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name="pyverbs" if not names else name)
        if root_handler:
            logging.getLogger().addHandler(logging.StreamHandler())
            logging.getLogger().setLevel(logging.DEBUG)
        return module(name)

    return load


OLD = ("pyverbs.device", "pyverbs.pd", "pyverbs.mr", "pyverbs.enums")
NEW = ("pyverbs.device", "pyverbs.pd", "pyverbs.mr", "pyverbs.libibverbs_enums")


# --- import ---


@pytest.mark.parametrize("names", [OLD, NEW])
def test_the_enums_are_found_under_both_names(names: tuple[str, ...]) -> None:
    assert bridge._import_quietly(loader(*names)).enums.__name__ == names[-1]


def test_importing_leaves_the_root_logger_as_it_was() -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    bridge._import_quietly(loader(*OLD, root_handler=True))
    assert (root.handlers, root.level) == before


def test_without_pyverbs_the_error_names_the_packages_and_the_python() -> None:
    with pytest.raises(
        VerbsUnavailable, match=r"apt install python3-pyverbs.*sudo dnf install.*--system-site-packages"
    ):
        bridge._import_quietly(loader())


def test_a_pyverbs_of_another_version_is_told_from_none() -> None:
    def load(name: str) -> Any:
        raise ImportError("libibverbs.so.1: version `IBVERBS_PRIVATE_59' not found")

    with pytest.raises(VerbsUnavailable, match=r"can't load it: .*IBVERBS_PRIVATE_59"):
        bridge._import_quietly(load)


@pytest.mark.parametrize(
    "enums",
    [
        module("pyverbs.enums", IBV_ACCESS_LOCAL_WRITE=1),
        module("pyverbs.libibverbs_enums", ibv_access_flags=type("flags", (), {"IBV_ACCESS_LOCAL_WRITE": 1})),
    ],
)
def test_an_enum_member_is_found_with_and_without_scope(monkeypatch: pytest.MonkeyPatch, enums: ModuleType) -> None:
    monkeypatch.setattr(bridge, "_modules", SimpleNamespace(enums=enums))
    assert bridge.enum_value("IBV_ACCESS_LOCAL_WRITE") == 1
    with pytest.raises(VerbsUnavailable, match="IBV_NO_SUCH"):
        bridge.enum_value("IBV_NO_SUCH")


# --- the pointer ---

CMD_FD_OFFSET = 152
CONTEXT, DOMAIN = 0x10000, 0x20000


class FakeMemory:
    """Memory with an ibv_context and an ibv_pd in it, behind `bridge._read`."""

    def __init__(self, *, handle: int = 7, cmd_fd: int = 3) -> None:
        self.cells = {
            DOMAIN: struct.pack("=QI", CONTEXT, handle),
            CONTEXT + CMD_FD_OFFSET: struct.pack("=i", cmd_fd),
        }

    def read(self, address: int, nbytes: int) -> bytes | None:
        found = self.cells.get(address)
        return found[:nbytes] if found is not None else None


class PyverbsCM:
    pass


class PD(PyverbsCM):
    handle = 7


class NewPD(PyverbsCM):
    handle = 7
    pd: Any = DOMAIN


class CrashingPD(PD):
    @property
    def pd(self) -> int:
        raise AssertionError("reading PD.pd before version 59 crashes the process")


CrashingPD.__name__ = "PD"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> FakeMemory:
    fake = FakeMemory()
    library = SimpleNamespace(rx_context_cmd_fd_offset=lambda: CMD_FD_OFFSET)
    monkeypatch.setattr(native, "extension", lambda: SimpleNamespace(lib=library))
    monkeypatch.setattr(bridge, "_read", fake.read)
    return fake


def version(monkeypatch: pytest.MonkeyPatch, enums: str) -> None:
    monkeypatch.setattr(bridge, "_modules", SimpleNamespace(enums=module(enums)))


def test_before_59_the_pointer_is_the_first_field_after_the_base_type(
    monkeypatch: pytest.MonkeyPatch, memory: FakeMemory
) -> None:
    version(monkeypatch, "pyverbs.enums")
    pd = PD()
    memory.cells[id(pd) + PyverbsCM.__basicsize__] = struct.pack("P", DOMAIN)
    assert bridge.pd_pointer(pd, SimpleNamespace(cmd_fd=3)) == DOMAIN


def test_before_59_the_property_is_never_read(monkeypatch: pytest.MonkeyPatch, memory: FakeMemory) -> None:
    version(monkeypatch, "pyverbs.enums")
    with pytest.raises(VerbsUnavailable, match="refuses rather than guesses"):
        bridge.pd_pointer(CrashingPD(), SimpleNamespace(cmd_fd=3))


def test_from_59_on_the_property_is_the_pointer(monkeypatch: pytest.MonkeyPatch, memory: FakeMemory) -> None:
    version(monkeypatch, "pyverbs.libibverbs_enums")
    assert bridge.pd_pointer(NewPD(), SimpleNamespace(cmd_fd=3)) == DOMAIN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pd": 0}, "no pointer"),
        ({"pd": "0x20000"}, "no pointer"),
        ({"pd": 0x5000}, "does not lead to memory"),
        ({"handle": 8}, "the handle found is 7, not 8"),
    ],
)
def test_a_pointer_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, memory: FakeMemory, change: dict[str, Any], message: str
) -> None:
    version(monkeypatch, "pyverbs.libibverbs_enums")
    pd = NewPD()
    vars(pd).update(change)
    with pytest.raises(VerbsUnavailable, match=message):
        bridge.pd_pointer(pd, SimpleNamespace(cmd_fd=3))


def test_a_context_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, memory: FakeMemory) -> None:
    version(monkeypatch, "pyverbs.libibverbs_enums")
    with pytest.raises(VerbsUnavailable, match="command fd 3, not 4"):
        bridge.pd_pointer(NewPD(), SimpleNamespace(cmd_fd=4))
    del memory.cells[CONTEXT + CMD_FD_OFFSET]
    with pytest.raises(VerbsUnavailable, match="does not lie in memory"):
        bridge.pd_pointer(NewPD(), SimpleNamespace(cmd_fd=3))


def test_the_version_is_never_an_error() -> None:
    assert isinstance(bridge.version(), str)


# --- errors ---


class PyverbsRDMAError(Exception):
    error_code = errno.EBUSY


def test_a_pyverbs_error_becomes_ours() -> None:
    error = bridge.verbs_error(PyverbsRDMAError("Failed to dealloc PD."), "ibv_dealloc_pd")
    assert isinstance(error, VerbsError)
    assert (error.verb, error.errno) == ("ibv_dealloc_pd", errno.EBUSY)
    assert "EBUSY" in str(error)
    assert "Failed to dealloc PD" in str(error)


def test_a_failed_rtr_names_the_usual_cause() -> None:
    assert "GID" in native.verbs_error("ibv_modify_qp(RTR)", errno.EINVAL).fix


def test_an_unknown_errno_is_no_obstacle() -> None:
    assert "ibv_x failed with 9999" in str(native.verbs_error("ibv_x", 9999))


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "WC_SUCCESS"),
        (10, "WC_REM_ACCESS_ERR.*not registered"),
        (12, "WC_RETRY_EXC_ERR.*4791"),
        (13, "WC_RNR_RETRY_EXC_ERR.*no receive"),
        (21, "WC_GENERAL_ERR"),
        (77, "WC_77"),
    ],
)
def test_completions_are_named_and_explained(status: int, text: str) -> None:
    import re

    assert re.search(text, native.completion_error(status))


def test_the_vendors_code_is_told_where_there_is_one() -> None:
    assert "vendor error 0x8a" in native.completion_error(10, 0x8A)


# --- the native core ---


def test_an_installation_without_the_extension_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(native.importlib, "import_module", load)
    with pytest.raises(VerbsUnavailable, match=r"libibverbs-dev.*rdma-core-devel.*reinstall rdmaxfer"):
        native.extension()


def test_a_missing_libibverbs_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rdmaxfer._verbs", reason="built without the native core")
    monkeypatch.setenv("RDMAXFER_LIBIBVERBS", "/nonexistent/libibverbs.so.1")
    with pytest.raises(VerbsUnavailable, match=r"/nonexistent/.*RDMAXFER_LIBIBVERBS"):
        native.library()
    monkeypatch.delenv("RDMAXFER_LIBIBVERBS")
    monkeypatch.setattr(native, "LIBRARY", "libnosuchverbs.so.9")
    with pytest.raises(VerbsUnavailable, match="libibverbs1 ibverbs-providers"):
        native.library()


def test_a_library_without_the_symbols_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rdmaxfer._verbs", reason="built without the native core")
    monkeypatch.setenv("RDMAXFER_LIBIBVERBS", "libm.so.6")
    with pytest.raises(VerbsUnavailable, match="has no ibv_"):
        native.library()


def test_unreadable_memory_is_an_error_and_no_crash() -> None:
    verbs = pytest.importorskip("rdmaxfer._verbs", reason="built without the native core")
    out = verbs.ffi.new("char[]", 16)
    assert verbs.lib.rx_read_safely(0x10, out, 16) == -errno.EFAULT
    source = verbs.ffi.new("char[]", b"0123456789abcdef")
    assert verbs.lib.rx_read_safely(int(verbs.ffi.cast("uintptr_t", source)), out, 16) == 0
    assert bytes(verbs.ffi.buffer(out)) == b"0123456789abcdef"
    assert verbs.lib.rx_read_safely(0x10, out, 5000) == -errno.EINVAL
