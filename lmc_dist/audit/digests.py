"""Digests of forgotten ids under a secret salt.

An id is a small number: without a secret anybody could hash all of them and compare. With the salt an auditor can show
that an id was forgotten; without it, the digests say no more than how many there were.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from lmc_dist.errors import LmcError
from lmc_dist.trajectory.files import fsync_path

SALT_FILE = "salt.key"
SALT_BYTES = 32


def new_salt() -> bytes:
    """A secret salt. Local."""
    return secrets.token_bytes(SALT_BYTES)


def salted_digest(salt: bytes, id: int | str) -> str:
    """Digest of an id: keyed BLAKE2b of 128 bits, as hex; 7 and "7" are different ids. Local.

    Raises:
        LmcError: A salt that is too short to be a secret, or too long for BLAKE2b.
    """
    if not 16 <= len(salt) <= 64:
        raise LmcError(f"a salt has 16 to 64 bytes, this one {len(salt)}: take new_salt()")
    text = f"int:{id}" if isinstance(id, int) else f"str:{id}"
    return hashlib.blake2b(text.encode(), digest_size=16, key=salt).hexdigest()


def write_salt(path: Path, salt: bytes) -> None:
    """Writes a salt that only its owner can read, on disk when it returns; one that is there is never replaced. Local.

    Raises:
        LmcError: The file is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(salt.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)  # unlike a rename, it does not replace what another process has written meanwhile
    except FileExistsError:
        raise LmcError(
            f"{path} is there already: a salt is never replaced, all digests would lose their meaning"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    fsync_path(path.parent)  # what is digested with it must not outlive it


def read_salt(path: Path) -> bytes:
    """A salt as `write_salt` wrote it. Local.

    Raises:
        LmcError: Missing, or damaged.
    """
    try:
        salt = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except FileNotFoundError:
        raise LmcError(
            f"the salt {path} is missing: put it back from a copy, without it no digest of an id can be made or checked"
        ) from None
    except (OSError, ValueError) as error:
        raise LmcError(f"the salt {path} cannot be read: {error}") from None
    if not 16 <= len(salt) <= 64:
        raise LmcError(f"the salt {path} is damaged: it has {len(salt)} bytes")
    return salt


def salt_at(path: Path) -> bytes:
    """The salt of a file, which is made where there is none. Local; several processes may come at once."""
    if not path.exists():
        salt = new_salt()
        try:
            write_salt(path, salt)
        except LmcError:
            if not path.exists():
                raise
        except OSError as error:
            raise LmcError(f"the salt {path} cannot be written: {error}") from None
    return read_salt(path)
