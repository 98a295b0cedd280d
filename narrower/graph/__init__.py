"""What a network is to narrower: channel groups, their costs, equal-count constraints, and what stays of each tensor."""

from .types import ChannelGroup, Graph, Scores, Slice

__all__ = ["ChannelGroup", "Graph", "Scores", "Slice"]
