"""Random draws without random state: every draw has a name, and its seed is a function of the name."""

import hashlib


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed for the draw named by `key`, such as `(seed, "rollout", step, row)`; equal keys, equal seeds."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
