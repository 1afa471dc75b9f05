"""The seed of the noise: 32 bytes that nobody can guess, and that no result repeats.

Whoever has the seed subtracts the noise. So it comes from the system's randomness and is forgotten at once, or from a
file that the settings name and whose content never goes into a result; a salted digest says afterwards which one it
was.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, broadcast_object

SEED_BYTES = 32


@dataclass(frozen=True, repr=False)
class Seed:
    """The seed, and what may be told of it.

    Attributes:
        secret: Never to be written or shown.
        told: For result.json.
    """

    secret: bytes
    told: dict[str, str]


def read_seed(path: str | Path) -> bytes:
    """The seed in a file of 64 hexadecimal digits. Local.

    Raises:
        LmcError: No such file, or something else in it. The message does not repeat it.
    """
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * SEED_BYTES}}}", text):
        raise LmcError(
            f"privacy.seed_file {path} does not hold {2 * SEED_BYTES} hexadecimal digits: make it with "
            f"python -c 'import secrets; print(secrets.token_hex({SEED_BYTES}))', and never use it for anything else"
        )
    return bytes.fromhex(text)


def seed_digest(secret: bytes, salt: str) -> str:
    """By which a seed's holder can show that it was this one; useless to others, since a seed cannot be guessed."""
    return hashlib.blake2b(secret, salt=bytes.fromhex(salt), person=b"lmc noise seed").hexdigest()


def make_seed(path: str | None) -> Seed:
    """The seed that the settings name, or a new one that ends with the run; the same on every rank. Collective.

    Raises:
        LmcError: As of `read_seed`, on every rank.
    """
    found: Seed | None = None
    with agreement():
        if is_first():
            if path is None:
                found = Seed(secrets.token_bytes(SEED_BYTES), {"source": "drawn for this run and not kept"})
            else:
                secret, salt = read_seed(path), secrets.token_hex(16)
                found = Seed(secret, {"source": "file", "salt": salt, "digest": seed_digest(secret, salt)})
    result: Seed = broadcast_object(found)
    return result


def is_first() -> bool:
    """Whether this process is the first of the default group, or alone. Local."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0
