"""Images for training, scoring and evaluation."""

from .images import Batch, Images, LazyImages, StreamImages, TensorImages, batches, hold_out, mix
from .sources import ImageData, Reading, digits, folder, from_timm, open_data

__all__ = [
    "Batch",
    "ImageData",
    "Images",
    "LazyImages",
    "Reading",
    "StreamImages",
    "TensorImages",
    "batches",
    "digits",
    "folder",
    "from_timm",
    "hold_out",
    "mix",
    "open_data",
]
