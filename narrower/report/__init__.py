"""The report of a run: one HTML page that needs nothing else, and its pictures as SVG; and the card that it is shared with."""

from .card import CARD, check_fields, model_card
from .facts import Facts, Layer, Scored
from .page import render
from .pictures import PICTURE_NAMES

__all__ = ["CARD", "PICTURE_NAMES", "Facts", "Layer", "Scored", "check_fields", "model_card", "render"]
