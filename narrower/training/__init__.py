"""The reference training loop, its settings, and where it runs."""

from .accelerator import make_accelerator
from .config import TrainConfig
from .evaluate import evaluate
from .settle import Settled, settle
from .train import TrainContext, train

__all__ = ["Settled", "TrainConfig", "TrainContext", "evaluate", "make_accelerator", "settle", "train"]
