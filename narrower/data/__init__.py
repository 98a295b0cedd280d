"""Images for training, scoring and evaluation."""

from .images import Batch, Images, LazyImages, OwnImages, StreamImages, TensorImages, batches, hold_out, mix
from .sources import ImageData, Reading, digits, folder, from_timm, open_data
from .task import CLASSIFICATION, Classification, OwnTask, Task

__all__ = [
    "CLASSIFICATION",
    "Batch",
    "Classification",
    "ImageData",
    "Images",
    "LazyImages",
    "OwnImages",
    "OwnTask",
    "Reading",
    "StreamImages",
    "Task",
    "TensorImages",
    "batches",
    "digits",
    "folder",
    "from_timm",
    "hold_out",
    "mix",
    "open_data",
]
