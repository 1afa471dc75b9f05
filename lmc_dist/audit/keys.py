"""Ed25519 keys of an audit, as PEM files; `cryptography` (the extra `audit`) is imported only where there is one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from lmc_dist.errors import LmcError


class Signer:
    """Signs with a private key. Local.

    Args:
        path: PEM file of an Ed25519 private key.

    Raises:
        LmcError: `cryptography` is not installed, or the file is missing or another kind of key.
    """

    def __init__(self, path: str | Path) -> None:
        serialization, ed25519 = _library()
        try:
            key = serialization.load_pem_private_key(_read(path), password=None)
        except (ValueError, TypeError) as error:  # TypeError: protected by a password
            raise LmcError(
                f"signing key {path}: no private key without password in PEM form: {_short(error)}"
            ) from None
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise LmcError(f"signing key {path} is of another kind than Ed25519: `lmc audit keygen FILE` makes one")
        self._key = key
        self.verifier = Verifier.of(key.public_key())

    def sign(self, message: bytes) -> str:
        """Signature as hex."""
        return self._key.sign(message).hex()


class Verifier:
    """Checks signatures with a public key. Local.

    Args:
        path: PEM file of an Ed25519 public key.

    Raises:
        LmcError: As `Signer`.
    """

    def __init__(self, path: str | Path) -> None:
        serialization, ed25519 = _library()
        try:
            key = serialization.load_pem_public_key(_read(path))
        except ValueError as error:
            raise LmcError(f"public key {path}: no public key in PEM form: {_short(error)}") from None
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise LmcError(f"public key {path} is of another kind than Ed25519")
        self._key = key

    @classmethod
    def of(cls, key: Any) -> Verifier:
        """Of a key in memory."""
        verifier = cls.__new__(cls)
        verifier._key = key
        return verifier

    def holds(self, signature: str, message: bytes) -> bool:
        """Whether a signature (hex) is this key's of a message."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(bytes.fromhex(signature), message)
        except (InvalidSignature, ValueError):
            return False
        return True

    @property
    def name(self) -> str:
        """A short digest of the key, by which people tell keys apart."""
        serialization, _ = _library()
        raw = self._key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return hashlib.blake2b(raw, digest_size=8).hexdigest()


def public_path(path: str | Path) -> Path:
    """Where `keygen` puts the public half of a private key."""
    return Path(f"{path}.pub")


def keygen(path: str | Path) -> Verifier:
    """Makes a key pair: PATH, which only its owner can read, and PATH.pub. Local.

    Raises:
        LmcError: One of them is there already, or cannot be written.
    """
    serialization, ed25519 = _library()
    private, public = Path(path), public_path(path)
    for file in (private, public):
        if file.exists():
            raise LmcError(f"{file} is there already: a key is never replaced")
    key = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    shown = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        private.parent.mkdir(parents=True, exist_ok=True)
        for file, content, mode in ((private, secret, 0o600), (public, shown, 0o644)):
            with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
    except OSError as error:
        raise LmcError(f"the key {path} cannot be written: {error}") from None
    return Verifier.of(key.public_key())


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise LmcError("signatures need the package cryptography: pip install 'lmc_dist[audit]'") from None
    return serialization, ed25519


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LmcError(f"key {path} cannot be read: {error.strerror or error}") from None


def _short(error: Exception) -> str:
    return str(error).split(". ")[0].split("\n")[0][:120]
