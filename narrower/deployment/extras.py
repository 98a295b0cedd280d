"""Optional packages: imported where they are used, and named with the command that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import MissingExtraError

# The extra of pyproject.toml that each package comes with.
EXTRAS = {"onnx": "export", "onnxscript": "export", "onnxruntime": "export", "openvino": "openvino",
          "torch_pruning": "compare", "matplotlib": "compare", "huggingface_hub": "hub"}


def optional(name: str) -> ModuleType:
    """The module `name` of an optional package. Raises MissingExtraError if it is not installed."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = EXTRAS[package]
        raise MissingExtraError(f"{package} is missing ({error}): pip install 'narrower[{extra}]'") from error
