"""Changes to modules that know nothing of channel groups: walk, copy, slice tensors, fit shapes, set attributes."""
