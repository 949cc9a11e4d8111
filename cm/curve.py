"""CURVE keys: who may talk to whom on the control plane, by ZeroMQ's own authentication and encryption (https://rfc.zeromq.org/spec/26).

A key is two files, as pyzmq writes them: NAME.key is for everybody, NAME.key_secret for its owner alone.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from pathlib import Path
from typing import NamedTuple

from zmq import auth

from rdmaxfer.errors import CurveError

log = logging.getLogger("rdmaxfer")

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"
KEY_CHARS = 40
"""A key's length in Z85."""

SETTLED_NS = 2_000_000_000

_MAKE = "`rdmaxfer keygen NAME` makes a pair of keys."


class Identity(NamedTuple):
    """This side's own pair of keys, in Z85."""

    public: bytes
    secret: bytes


class Curve(NamedTuple):
    """What an object needs to take part: its own keys, and, to be connected to, the directory of those it lets in."""

    identity: Identity
    allowed: AllowedKeys | None


def make_keys(path: Path) -> tuple[Path, Path]:
    """Write a new pair, `path` + .key and + .key_secret; returns both. Raises CurveError; never overwrites anything."""
    public, secret = (path.with_name(path.name + suffix) for suffix in (PUBLIC_SUFFIX, SECRET_SUFFIX))
    made: list[Path] = []
    try:
        # Made beforehand, so that the secret is never readable by others, nor an existing key lost.
        for file, mode in ((public, 0o644), (secret, 0o600)):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
            made.append(file)
        auth.create_certificates(path.parent, path.name)
    except OSError as error:
        for file in made:
            file.unlink()
        fix = (
            "choose another name."
            if isinstance(error, FileExistsError)
            else "choose a directory that can be written to."
        )
        raise CurveError(f"{error.filename} can't be written: {error.strerror}.", fix=fix) from None
    return public, secret


def load_identity(path: str | os.PathLike[str]) -> Identity:
    """A pair of keys, from its NAME.key_secret. Raises CurveError."""
    public, secret = _load(Path(path))
    if secret is None:
        raise CurveError(f"{path} has no secret key.", fix=f"name the file that ends in {SECRET_SUFFIX}.")
    if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        raise CurveError(f"{path} can be read by others, so it is no secret.", fix=f"chmod 600 {path}")
    return Identity(public, secret)


def load_public_key(path: str | os.PathLike[str]) -> bytes:
    """A public key in Z85, from a NAME.key. Raises CurveError."""
    return _load(Path(path))[0]


class AllowedKeys:
    """The public keys in the files *.key of a directory. It is looked at again when files have come or gone."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._changed_ns = -1
        self._names: dict[bytes, str] = {}
        self._left_out: dict[Path, str] = {}
        """Files that can't be used, and why: what the log has been told."""
        if not self.directory.is_dir():
            raise CurveError(
                f"{directory} is no directory.",
                fix="make it, and put the files NAME.key of those who may connect there.",
            )
        for file in sorted(self.directory.glob("*" + PUBLIC_SUFFIX)):
            load_public_key(file)  # a mistake is to be found now, not when somebody is turned away
        self._refresh()

    def __repr__(self) -> str:
        return f"<AllowedKeys {len(self._names)} in {self.directory}>"

    def name_of(self, key: bytes) -> str | None:
        """The name of an allowed key (in Z85), None for any other."""
        self._refresh()
        return self._names.get(key)

    def _refresh(self) -> None:
        try:
            changed_ns = self.directory.stat().st_mtime_ns
        except OSError:
            self._names, self._changed_ns = {}, -1
            return
        # A file system's clock is coarse: what changed just now may change again without its time changing.
        if changed_ns == self._changed_ns and time.time_ns() - changed_ns > SETTLED_NS:
            return
        names: dict[bytes, str] = {}
        left_out: dict[Path, str] = {}
        for file in sorted(self.directory.glob("*" + PUBLIC_SUFFIX)):
            try:
                names[load_public_key(file)] = file.name.removesuffix(PUBLIC_SUFFIX)
            except CurveError as error:
                left_out[file] = str(error)
        for file, text in left_out.items():
            if self._left_out.get(file) != text:  # once: this is done for every peer, as long as the directory is new
                log.warning("a key is left out: %s", text)
        self._names, self._left_out, self._changed_ns = names, left_out, changed_ns


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = auth.load_certificate(path)
    except (OSError, ValueError) as error:
        what = "there is no such file" if isinstance(error, OSError) and not path.exists() else str(error)
        raise CurveError(f"{path} can't be used as a key: {what}.", fix=_MAKE) from None
    for key in (public, secret):
        if key is not None and len(key) != KEY_CHARS:
            raise CurveError(f"{path} has a key of {len(key)} characters, not {KEY_CHARS}.", fix=_MAKE)
    return public, secret
