"""The report of a run: one HTML page that needs nothing else, and its pictures as SVG; and the card that it is shared with."""

from .card import CARD, check_fields, model_card
from .facts import Facts, Layer
from .page import render

__all__ = ["CARD", "Facts", "Layer", "check_fields", "model_card", "render"]
