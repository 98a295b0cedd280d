"""The reference training loop, its settings, and where it runs."""

from .accelerator import make_accelerator
from .config import TrainConfig
from .train import TrainContext, evaluate, train

__all__ = ["TrainConfig", "TrainContext", "evaluate", "make_accelerator", "train"]
