"""The report of a run: one HTML page that needs nothing else, and its pictures as SVG."""

from .facts import Facts, Layer
from .page import render

__all__ = ["Facts", "Layer", "render"]
