"""Networks that travel: a repository on a hub, its files checked by hash. Nothing that a downloaded file names is imported."""

from .checksums import SUMS, checksums
from .hub import fetch, open_hub, reach, upload
from .loading import load

__all__ = ["SUMS", "checksums", "fetch", "load", "open_hub", "reach", "upload"]
