"""Images for training, scoring and evaluation."""

from .images import Batch, Images, LazyImages, OwnImages, TensorImages, batches, hold_out
from .seeding import mix
from .sources import ImageData, Parts, Reading, digits, folder, from_timm, open_data
from .streams import StreamImages
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
    "Parts",
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
