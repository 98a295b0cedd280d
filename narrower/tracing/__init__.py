"""trace: a model and example inputs to a Graph, by running its forward with channel ids beside the tensors."""

from .tracer import trace

__all__ = ["trace"]
