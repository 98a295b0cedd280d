"""Networks by name: the CIFAR networks of the two papers, those of timm and torchvision, and the user's own.

| name                                             | comes from                                        |
|--------------------------------------------------|---------------------------------------------------|
| `cifar_resnet56`, `cifar_vgg16_bn`, ...          | this package (`CIFAR_MODELS`)                     |
| `torchvision/resnet50`                           | `torchvision.models`                              |
| `package.module:factory`, `path/file.py:factory` | the user's own function that returns an nn.Module |
| anything else, such as `resnet50.a1_in1k`        | `timm.create_model`                               |
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, HubError, similar
from ..extras import optional
from ..sharing import reach
from .densenet import cifar_densenet40
from .googlenet import cifar_googlenet
from .mobilenet import cifar_mobilenet_v1
from .resnet import cifar_resnet20, cifar_resnet32, cifar_resnet44, cifar_resnet56, cifar_resnet110
from .vgg import cifar_vgg16_bn

__all__ = ["CIFAR_MODELS", "expected_images", "import_named", "make_model", "origin"]

CIFAR_MODELS: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (
        cifar_resnet20,
        cifar_resnet32,
        cifar_resnet44,
        cifar_resnet56,
        cifar_resnet110,
        cifar_vgg16_bn,
        cifar_densenet40,
        cifar_googlenet,
        cifar_mobilenet_v1,
    )
}


def make_model(
    name: str, num_classes: int | None = None, *, pretrained: bool = False, in_channels: int = 3, **kwargs: Any
) -> nn.Module:
    """The network called `name` (see the table above), mapping `[N, in_channels, H, W]` to `[N, num_classes]`.

    Args:
        name: a CIFAR network, `torchvision/NAME`, `module:factory`, `file.py:factory`, or a timm name.
        num_classes: number of outputs. None keeps the network's default.
        pretrained: load published weights (timm, torchvision, or a factory with an argument `pretrained`).
        in_channels: channels of the images.
        kwargs: passed on to the factory.

    Raises:
        MissingExtraError: the library of the network is missing.
        ConfigError: the name is unknown, or the factory fails with these arguments.
    """
    if ":" in name:
        return _own(name, num_classes, pretrained, in_channels, kwargs)
    if name.startswith("torchvision/"):
        return _torchvision(name.removeprefix("torchvision/"), num_classes, pretrained, in_channels, kwargs)
    if name in CIFAR_MODELS:
        if pretrained:
            raise ConfigError(f"{name} has no published weights: train it, or load a file with --checkpoint")
        return _call(name, CIFAR_MODELS[name], _given(num_classes=num_classes, in_channels=in_channels, **kwargs))
    return _timm(name, num_classes, pretrained, in_channels, kwargs)


def expected_images(name: str) -> dict[str, Any]:
    """How a network of timm or torchvision reads images: {large (pixels), mean, std, crop_pct, crop_mode, interpolation}.

    Of the CIFAR networks {large}. {} for other names, and for torchvision's detectors and the like.
    """
    if name in CIFAR_MODELS:
        return {"large": 32}
    if name.startswith("torchvision/"):
        return _torchvision_images(name.removeprefix("torchvision/"))
    known = _published(name)
    if known is None:
        return {}
    same = {key: getattr(known, key) for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}
    return {"large": known.input_size[-1], **same}


def _torchvision_images(name: str) -> dict[str, Any]:
    """As `expected_images`, for the weights that `make_model` loads."""
    try:
        from torchvision import models

        known = models.get_model_weights(name).DEFAULT.transforms()
    except (ImportError, ValueError):  # an unknown name: make_model raises an error with advice
        return {}
    crop: list[int] = getattr(known, "crop_size", [])
    if len(crop) != 1:  # videos have two numbers
        return {}
    return {"large": crop[0], "mean": tuple(known.mean), "std": tuple(known.std), "crop_pct": crop[0] / known.resize_size[0],
            "interpolation": known.interpolation.value}


def origin(name: str) -> dict[str, str]:
    """Where the published weights of a network of timm come from: {base_model (on the hub), license}, as far as timm knows."""
    known = _published(name)
    found = {"base_model": getattr(known, "hf_hub_id", None), "license": getattr(known, "license", None)}
    return {key: str(value) for key, value in found.items() if value and value != "unknown"}


def _published(name: str) -> Any:
    """What timm knows of the published weights of a network. None for other names."""
    if ":" in name or "/" in name or name in CIFAR_MODELS:
        return None
    try:
        from timm.models import get_pretrained_cfg
    except ImportError:
        return None
    try:
        return get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag: make_model raises an error with advice
        return None


def _given(**kwargs: Any) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if value is not None}


def _call(name: str, factory: Callable[..., Any], kwargs: dict[str, Any]) -> nn.Module:
    try:
        model = factory(**kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise ConfigError(f"{name}({arguments}) failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned {type(model).__name__}, not an nn.Module")
    return model


def _unknown(name: str, known: list[str], hint: str) -> ConfigError:
    return ConfigError(f"no network is called {name!r}{similar(name, known, most=4)} ({hint})")


def _timm(name: str, num_classes: int | None, pretrained: bool, in_channels: int, kwargs: dict[str, Any]) -> nn.Module:
    timm = optional("timm")
    if not timm.is_model(name):  # is_model takes `name.tag` too
        hint = "names are ours (cifar_...), timm's, torchvision/NAME or package.module:factory"
        raise _unknown(name, [*CIFAR_MODELS, *timm.list_models()], hint)
    if pretrained:
        _reach_hub(name)
    return _call(
        f"timm {name}",
        timm.create_model,
        _given(model_name=name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **kwargs),
    )


def _reach_hub(name: str) -> None:
    """Raise ConfigError at once where the hub with timm's weights cannot be reached. Its client would try for a minute."""
    try:
        reach()
    except HubError as error:
        raise ConfigError(f"the published weights of {name} cannot be fetched: {error}; give a file with --checkpoint, or set "
                          "HF_HUB_OFFLINE=1 if they were fetched before") from error


def _torchvision(
    name: str, num_classes: int | None, pretrained: bool, in_channels: int, kwargs: dict[str, Any]
) -> nn.Module:
    models = optional("torchvision.models")
    if name not in models.list_models():
        raise _unknown(f"torchvision/{name}", [f"torchvision/{known}" for known in models.list_models()], "torchvision")
    if in_channels != 3:
        raise ConfigError(f"torchvision/{name} takes images of 3 channels, not {in_channels}")
    if not pretrained:
        return _call(f"torchvision/{name}", models.get_model, _given(name=name, num_classes=num_classes, **kwargs))
    model = _call(f"torchvision/{name}", models.get_model, {"name": name, "weights": "DEFAULT", **kwargs})
    return model if num_classes is None else _new_head(name, model, num_classes)


def _new_head(name: str, model: nn.Module, num_classes: int) -> nn.Module:
    """Replace the last linear layer of a pretrained torchvision network if its number of classes differs."""
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ConfigError(f"torchvision/{name} ends in no linear layer: its weights fit its own classes only")
    path, head = linears[-1]
    if head.out_features != num_classes:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Linear(head.in_features, num_classes, head.bias is not None))
    return model


def _own(name: str, num_classes: int | None, pretrained: bool, in_channels: int, kwargs: dict[str, Any]) -> nn.Module:
    """Call the user's factory with those of our arguments that its signature accepts."""
    factory = import_named(name)
    parameters = inspect.signature(factory).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    ours = _given(num_classes=num_classes, in_channels=in_channels)
    if pretrained:
        if "pretrained" not in parameters and not takes_all:
            raise ConfigError(f"{name} has no argument `pretrained`: load a file with --checkpoint instead")
        ours["pretrained"] = True
    return _call(name, factory, {key: value for key, value in ours.items() if takes_all or key in parameters} | kwargs)


def import_named(name: str, flag: str = "--model") -> Callable[..., Any]:
    """What is called `package.module:name` or `file.py:name`: a function or a class.

    Raises:
        ConfigError: it cannot be imported, or is not there. The message names the flag.
    """
    where, _, attribute = name.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(spec.name, module)  # so that its classes can be copied and pickled
            sys.path.insert(0, folder := str(Path(where).absolute().parent))  # for the files beside it
            try:
                spec.loader.exec_module(module)
            finally:
                sys.path.remove(folder)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")  # a console script does not import from the current folder
            module = importlib.import_module(where)
    except Exception as error:  # the user's file may raise anything
        raise ConfigError(f"cannot import {where!r} for {flag} {name}: {type(error).__name__}: {error}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{flag} {name}: {where!r} has no function or class {attribute!r}; it has "
                          f"{', '.join(names) or 'none'}")
    return factory
