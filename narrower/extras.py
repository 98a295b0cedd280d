"""Optional packages: imported where they are used, and named with the command that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingExtraError

# The extra of pyproject.toml that each package comes with.
EXTRAS = {**dict.fromkeys(("timm", "torchvision", "accelerate", "sklearn"), "cli"),
          **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"), **dict.fromkeys(("matplotlib", "jinja2"), "report"),
          "openvino": "openvino", "torch_pruning": "compare", "huggingface_hub": "hub"}


def optional(name: str) -> ModuleType:
    """The module `name` of an optional package. Raises MissingExtraError if it is not installed."""
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(name)
    except ImportError as error:
        extra = EXTRAS[package]
        raise MissingExtraError(f"{package} is missing ({error}): pip install 'narrower[{extra}]'") from error
