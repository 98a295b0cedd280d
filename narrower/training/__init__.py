"""The reference training loop and its settings."""

from .config import TrainConfig
from .train import evaluate, train

__all__ = ["TrainConfig", "evaluate", "train"]
