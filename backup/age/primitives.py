"""
The cryptography of age: X25519, HKDF-SHA-256, HMAC-SHA-256 and ChaCha20-Poly1305.

The only user of the package `cryptography`, which is an optional dependency: each function imports what it needs, and
`require` is called before work that needs any of them.
"""

from __future__ import annotations

import hmac
from typing import Protocol

from backup.errors import Failed

KEY = 32
"""Length of a public key, of a private key, and of each derived key (bytes)."""
TAG = 16
"""By how much ChaCha20-Poly1305 lengthens what it encrypts (bytes)."""
Buffer = bytes | bytearray | memoryview


class Cipher(Protocol):
    """ChaCha20-Poly1305 with one key.  Safe to use from several threads."""

    def encrypt_into(self, nonce: Buffer, data: Buffer, associated_data: None, buf: Buffer) -> int:
        """Encrypt data into a buffer that is longer by TAG."""

    def decrypt_into(self, nonce: Buffer, data: Buffer, associated_data: None, buf: Buffer) -> int:
        """Decrypt data into a buffer that is shorter by TAG; raise InvalidTag if the data is not what was encrypted."""


def require() -> None:
    """
    Make sure that the package `cryptography` is there.

    Raises
    ------
    Failed
        The package is missing, or too old.
    """
    try:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    except ImportError as error:
        raise Failed(f"sealed places need the Python package cryptography ({error})", hint=_INSTALL) from None
    if not hasattr(ChaCha20Poly1305, "encrypt_into"):
        raise Failed("the Python package cryptography is too old for sealed places", hint=_INSTALL)


_INSTALL = "install it beside pybackup: `pipx inject pybackup 'cryptography>=47'`; README has both extras"


def cipher(key: bytes) -> Cipher:
    """Return ChaCha20-Poly1305 with this key."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    made: Cipher = ChaCha20Poly1305(key)
    return made


def opens(opening: Cipher, nonce: bytes, sealed: Buffer, into: Buffer) -> bool:
    """Decrypt into a buffer; return False if `sealed` is not what was encrypted with this key and nonce."""
    from cryptography.exceptions import InvalidTag

    try:
        opening.decrypt_into(nonce, sealed, None, into)
    except InvalidTag:
        return False
    return True


def derived(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    """Derive a key for one purpose (HKDF)."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    made: bytes = HKDF(SHA256(), KEY, salt, purpose).derive(key)
    return made


def mac(key: bytes, data: bytes) -> bytes:
    """Return the code that authenticates data (HMAC)."""
    return hmac.digest(key, data, "sha256")


def public_key(private: bytes) -> bytes:
    """Return the public key of a private key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    made: bytes = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return made


def shared_secret(private: bytes, public: bytes) -> bytes | None:
    """Return what two keys have in common; None for a public key that has the same in common with every key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        secret: bytes = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return None
    return secret
