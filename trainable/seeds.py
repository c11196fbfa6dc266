"""Where randomness comes from: a generator for each purpose, made from names instead of carried along.

A trial draws questions, samples tokens and shuffles mini-batches (noise: philox.py). Each draw has its own generator,
seeded by a stable hash (`hashing.py`) of (purpose, trial seed, step, ...). So there is no generator state to
checkpoint: a restored trial at step 12 draws what the undisturbed one drew, a replicate shares its questions with the
control of the same seed, and adding one draw somewhere does not shift every later one.
"""

import torch

from trainable.hashing import stable_hash


def generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose, e.g. generator("shuffle", seed, step)."""
    return torch.Generator(device=device).manual_seed(stable_hash(*parts))
