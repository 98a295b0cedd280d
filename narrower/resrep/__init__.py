"""ResRep: compactors on a model, trained towards zero rows, merged into a narrower network."""

from .schedule import Forgetting
from .trainer import ResRep

__all__ = ["Forgetting", "ResRep"]
