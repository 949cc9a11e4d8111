"""The native core: loading it, and what its return codes mean.

`check` is the one place where a return code becomes an exception.
"""

from __future__ import annotations

import errno
import importlib
import os
import threading
from typing import Any

from rdmaxfer.errors import VerbsError, VerbsUnavailable

LIBRARY = "libibverbs.so.1"

_lock = threading.Lock()
_loaded: dict[str, Any] = {}


def extension() -> Any:
    """The compiled module, with `ffi` and `lib`. Raises VerbsUnavailable if this installation has none."""
    try:
        return importlib.import_module("rdmaxfer._verbs")
    except ModuleNotFoundError as error:
        raise VerbsUnavailable(
            "rdmaxfer was installed without its native core (rdmaxfer._verbs): the headers of libibverbs, those of "
            "Python, or a C compiler were missing when it was built.",
            fix="sudo apt install gcc libibverbs-dev python3-dev, or sudo dnf install gcc rdma-core-devel python3-devel; then "
            "reinstall rdmaxfer (pip install --force-reinstall --no-cache-dir).",
        ) from error
    except ImportError as error:
        raise VerbsUnavailable(
            f"rdmaxfer's native core can't be loaded: {error}.", fix="reinstall rdmaxfer with the Python that runs it."
        ) from error


def library() -> Any:
    """The opened libibverbs (`rx_lib *`). RDMAXFER_LIBIBVERBS names another file. Raises VerbsUnavailable."""
    path = os.environ.get("RDMAXFER_LIBIBVERBS") or LIBRARY
    with _lock:
        if path not in _loaded:
            module = extension()
            message = module.ffi.new("char[]", 512)
            handle = module.lib.rx_open(os.fsencode(path), message, 512)
            if handle == module.ffi.NULL:
                reason = module.ffi.string(message).decode(errors="replace")
                if path != LIBRARY:
                    raise VerbsUnavailable(
                        f"libibverbs could not be opened: {reason}.",
                        fix="let RDMAXFER_LIBIBVERBS name a libibverbs.so.1, or unset it.",
                    )
                raise VerbsUnavailable(
                    f"libibverbs could not be opened: {reason}.",
                    fix="sudo apt install libibverbs1 ibverbs-providers, or sudo dnf install libibverbs rdma-core.",
                )
            _loaded[path] = handle
        return _loaded[path]


# --- return codes -----------------------------------------------------------------------------------------------------

_MEMLOCK = "raise the limit on locked memory (`ulimit -l`), or use fewer or smaller queues."

_RTR = "ibv_modify_qp(RTR)"

_FIXES: dict[tuple[str, int], str] = {
    ("ibv_modify_qp(INIT)", errno.EINVAL): "check that the port number exists on this device (`rdmaxfer devices`).",
    (
        _RTR,
        errno.EINVAL,
    ): "the usual cause is a GID that does not lead to the peer, or a path MTU above the port's active "
    "one: compare `rdmaxfer devices` on both hosts, and name device= and gid_index= if the wrong one was chosen.",
    (_RTR, errno.ENETUNREACH): "there is no route from this GID to the peer's: choose a GID of the peer's network.",
    (_RTR, errno.ETIMEDOUT): "the peer's address did not resolve: is the peer up, and on the network of this GID?",
    (_RTR, errno.EHOSTUNREACH): "the peer's address did not answer: is the peer up, and on the network of this GID?",
    (
        "ibv_reg_mr",
        errno.ENOMEM,
    ): "use fewer or smaller slots: the machine or the device is out of memory, or it is Soft-RoCE, which "
    "takes no more than 1 GiB at once in some kernels.",
    ("ibv_create_cq", errno.EINVAL): "the device allows fewer completion entries: use fewer slots.",
    ("ibv_create_cq", errno.ENOMEM): _MEMLOCK,
    ("ibv_create_qp", errno.EINVAL): "the device allows fewer or smaller work requests: use fewer slots.",
    ("ibv_create_qp", errno.ENOMEM): _MEMLOCK,
    ("ibv_post_send", errno.ENOMEM): "the send queue is full: more was posted than its depth.",
    ("ibv_post_recv", errno.ENOMEM): "the receive queue is full: more was posted than its depth.",
    ("ibv_fork_init", errno.EINVAL): "memory was registered before: open rdmaxfer's devices first, or set the "
    "environment variable RDMAV_FORK_SAFE=1.",
}

_FIX_BY_ERRNO: dict[int, str] = {
    errno.EPERM: "the process lacks a permission: check the rights on /dev/infiniband, and in a container the device "
    "and capability options.",
    errno.EACCES: "the process may not open the device: check the rights on /dev/infiniband.",
    errno.ENODEV: "the device has gone: check `rdma link`.",
    errno.EIO: "the device has failed or has gone: check `rdma link` and the kernel log.",
    errno.EMFILE: "too many open files: raise `ulimit -n`.",
    errno.ENOSPC: "the device is out of resources of this kind: close what is unused (`rdma resource show`).",
    errno.EOPNOTSUPP: "the device's driver can't do this.",
}


def fix_for(verb: str, code: int) -> str:
    """What to do about an error of a verb, or an empty string."""
    return _FIXES.get((verb, code)) or _FIX_BY_ERRNO.get(code, "")


def verbs_error(verb: str, code: int, detail: str = "") -> VerbsError:
    """The exception for a verb that failed with `code` (an errno)."""
    name = errno.errorcode.get(code, str(code))
    text = f"{verb} failed with {name} ({os.strerror(code)})" + (f": {detail}" if detail else "") + "."
    return VerbsError(text, verb=verb, errno=code, fix=fix_for(verb, code))


def check(rc: int, error: Any) -> int:
    """`rc` itself, or VerbsError if it is negative; `error` is the `rx_error *` that the call filled."""
    if rc >= 0:
        return rc
    raise verbs_error(extension().ffi.string(error.verb).decode(), error.err)


# --- completions ------------------------------------------------------------------------------------------------------

# enum ibv_wc_status, verbs.h
_STATUS = (
    "WC_SUCCESS",
    "WC_LOC_LEN_ERR",
    "WC_LOC_QP_OP_ERR",
    "WC_LOC_EEC_OP_ERR",
    "WC_LOC_PROT_ERR",
    "WC_WR_FLUSH_ERR",
    "WC_MW_BIND_ERR",
    "WC_BAD_RESP_ERR",
    "WC_LOC_ACCESS_ERR",
    "WC_REM_INV_REQ_ERR",
    "WC_REM_ACCESS_ERR",
    "WC_REM_OP_ERR",
    "WC_RETRY_EXC_ERR",
    "WC_RNR_RETRY_EXC_ERR",
    "WC_LOC_RDD_VIOL_ERR",
    "WC_REM_INV_RD_REQ_ERR",
    "WC_REM_ABORT_ERR",
    "WC_INV_EECN_ERR",
    "WC_INV_EEC_STATE_ERR",
    "WC_FATAL_ERR",
    "WC_RESP_TIMEOUT_ERR",
    "WC_GENERAL_ERR",
    "WC_TM_ERR",
    "WC_TM_RNDV_INCOMPLETE",
)

WC_SUCCESS = 0
WC_WR_FLUSH_ERR = 5

_MEANING: dict[str, str] = {
    "WC_LOC_LEN_ERR": "a message was longer than the receive buffer or than max_msg_sz",
    "WC_LOC_QP_OP_ERR": "the device could not carry out a work request of ours",
    "WC_LOC_PROT_ERR": "a work request of ours names memory that is not registered in this protection domain",
    "WC_WR_FLUSH_ERR": "the queue pair was moved to the error state while this was outstanding",
    "WC_REM_INV_REQ_ERR": "the peer's queue pair does not allow this operation",
    "WC_REM_ACCESS_ERR": "the peer's memory is not registered (any more), or its key, address or rights don't fit",
    "WC_REM_OP_ERR": "the peer's device could not carry out the request",
    "WC_RETRY_EXC_ERR": "the peer did not answer: it has gone, the network is cut, the path MTU is too large, "
    "or UDP port 4791 is closed by a firewall",
    "WC_RNR_RETRY_EXC_ERR": "the peer had no receive posted for too long",
    "WC_FATAL_ERR": "the device has failed",
}


def completion_name(status: int) -> str:
    """The name of an `enum ibv_wc_status` value, without IBV_."""
    return _STATUS[status] if 0 <= status < len(_STATUS) else f"WC_{status}"


def completion_error(status: int, vendor_err: int = 0) -> str:
    """A failed completion in words."""
    name = completion_name(status)
    meaning = _MEANING.get(name)
    vendor = f", vendor error {vendor_err:#x}" if vendor_err else ""
    return f"{name} (status {status}{vendor})" + (f": {meaning}" if meaning else "")
