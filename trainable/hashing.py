"""A hash that is equal in every process and on every machine. Python's own `hash` is not."""

import hashlib


def stable_hash(*parts: object) -> int:
    """63 bits from the printed parts; equal in every process and on every machine."""
    return stable_bits(*parts) >> 1


def stable_bits(*parts: object) -> int:
    """`stable_hash` with a 64th bit: the key of a Philox stream (philox.py)."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
