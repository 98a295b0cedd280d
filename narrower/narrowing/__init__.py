"""From a Plan to a narrow module, its proof, and constants that are folded on the way."""

from .fold import Folded, fold
from .narrow import narrow
from .verify import Verification, verify

__all__ = ["Folded", "Verification", "fold", "narrow", "verify"]
