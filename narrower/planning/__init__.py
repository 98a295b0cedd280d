"""From scores and a request (a budget or rates) to a Plan: how many channels each group keeps, and which."""

from .composition import compose
from .damage import Sensitivity
from .plan import Plan, plan

__all__ = ["Plan", "Sensitivity", "compose", "plan"]
