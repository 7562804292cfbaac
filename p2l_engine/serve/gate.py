"""Who may ask: callers' keys, compared by their hashes in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from p2l_engine.serve.settings import Key


class Unauthorized(PermissionError):
    """No key, or one that the configuration does not name."""


class Gate:
    """keys: those of the configuration; without any, anyone may ask."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = [(bytes.fromhex(key.sha256), key) for key in keys]

    def caller(self, headers: Mapping[str, str]) -> Key | None:
        """Whose request it is; None where no keys are asked for. Raises Unauthorized."""
        if not self._keys:
            return None
        secret = secret_of(headers)
        if secret is None:
            raise Unauthorized("a key is needed: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        hashed = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, key in self._keys:  # all of them, whichever it is
            if hmac.compare_digest(hashed, known):
                found = key
        if found is None:
            raise Unauthorized("the key is not known")
        return found


def secret_of(headers: Mapping[str, str]) -> str | None:
    """The key that a client sent."""
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and secret.strip():
        return secret.strip()
    return headers.get("x-api-key") or None
