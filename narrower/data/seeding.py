"""Random numbers that follow from what they are for."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def mix(*parts: object) -> int:
    """A seed computed from any values, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


def seed_all(seed: int) -> None:
    """Seed the generators that transforms use: of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
