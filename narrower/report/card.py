"""The model card of a run: a README.md whose head a hub reads."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from ..errors import ConfigError, MissingExtraError, similar
from ..extras import optional
from .facts import Facts
from .sections import stages

CARD = "README.md"
TEMPLATE = "card.md.jinja"
OF_THE_RUN = ("eval_results", "ignore_metadata_errors", "kwargs", "self")
"""Parameters of `ModelCardData` that are no fields for a user to give."""


def model_card(facts: Facts, repository: str, command: str, contents: Mapping[str, str], fields: Mapping[str, Any]) -> str:
    """The text of the card.

    Args:
        facts: of a run that has narrowed a network.
        repository: `user/name`.
        command: the command line that makes the run.
        contents: {name of a file beside the card: what it is}.
        fields: of huggingface_hub's `ModelCardData`; they take the place of those that follow from the run.

    Raises:
        ConfigError: there is no field of that name, or its value is none for it.
        MissingExtraError: huggingface_hub or jinja2 is not installed.
    """
    check_fields(fields)
    hub = optional("huggingface_hub")
    given = metadata(facts, repository) | dict(fields)
    try:
        data = hub.ModelCardData(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the card cannot be written with {', '.join(fields)}: {' '.join(str(error).split())}") from error
    template = files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    try:
        card = hub.ModelCard.from_template(
            data, template_str=plain_blocks(template), title=repository.partition("/")[2], summary=summary(facts),
            stages=stages(facts).table, measured=measured(facts), code=usage(facts.settings, repository),
            factory=factory(facts.settings),
            images=images(facts.settings), command=command, versions=versions(facts), files=list(contents.items()),
            licence=licence(given),
        )
    except ImportError as error:
        raise MissingExtraError(f"the card needs jinja2 ({error}): pip install 'narrower[hub]'") from error
    return str(card)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise ConfigError for a field that a card does not have. The message has the nearest name."""
    parameters = inspect.signature(optional("huggingface_hub").ModelCardData.__init__).parameters
    known = [name for name in parameters if name not in OF_THE_RUN]
    for name in fields:
        if name not in known:
            raise ConfigError(f"a model card has no field {name}" + (similar(name, known) or f": it has {', '.join(known)}"))


def plain_blocks(template: str) -> str:
    """The template without line breaks behind its statements: the card library has no option for that."""
    return re.sub(r"(\{% .*? %\})\n", r"\1", template)


def metadata(facts: Facts, repository: str) -> dict[str, Any]:
    """The head of the card, as far as it follows from the run."""
    hub, settings = optional("huggingface_hub"), facts.settings
    method = str(settings.get("method", ""))
    found: dict[str, Any] = {"library_name": "narrower", "tags": ["narrower", "pruning", "channel-pruning", method]}
    data = data_set(settings)
    if str(settings.get("dataset") or "").startswith("hfds/"):
        found["datasets"] = data
    if settings.get("task"):
        return found
    found |= {"pipeline_tag": "image-classification", "model_name": repository.partition("/")[2]}
    top1 = facts.measured.get("narrow", {}).get("top1")
    if top1 is not None and not facts.agreement:
        found["metrics"] = ["accuracy"]
        found["eval_results"] = [hub.EvalResult("image-classification", data, data, "accuracy", round(top1, 4),
                                                metric_name="top-1 (%)")]
    return found


def data_set(settings: Mapping[str, Any]) -> str:
    """A name for the images of a run: that of the data set or of the folder."""
    name = str(settings.get("task") or settings.get("dataset") or settings.get("data_dir") or "digits")
    return name.removeprefix("hfds/") if name.startswith("hfds/") else PurePath(name).name


def summary(facts: Facts) -> str:
    """What the network is, in a sentence or two."""
    settings, found = facts.settings, facts.measured
    parts = [f"{found['narrow'][key] / found['dense'][key]:.1%} of its {title}"
             for key, title in (("macs", "multiply-adds"), ("params", "parameters")) if found["dense"].get(key)]
    return (f"`{settings['model']}` with fewer channels: {' and '.join(parts)}. Made by narrower, method "
            f"`{settings.get('method', 'unknown')}`, for {data_set(settings)}.")


def measured(facts: Facts) -> str:
    """How the figures of the table were measured."""
    about = "agreement is the share of images on which the dense network finds the same class; the images have no classes" \
        if facts.agreement else f"{facts.headline_title} on the images of {data_set(facts.settings)} for validation"
    return f"{about[0].upper()}{about[1:]}. Latency: one image, both networks in turn, on the machine of the run."


def images(settings: Mapping[str, Any]) -> str:
    """How the network takes images."""
    size, channels = settings.get("img_size"), settings.get("in_chans", 3)
    text = f"It takes images `[N, {channels}, {size or 'H'}, {size or 'W'}]`"
    if settings.get("mean") and settings.get("std"):
        text += f", pixels in [0, 1] less the mean {settings['mean']} and divided by {settings['std']}"
    return text + "."


def own(settings: Mapping[str, Any]) -> bool:
    """Whether the dense network comes from a factory of the user's own."""
    return ":" in str(settings["model"])


def factory(settings: Mapping[str, Any]) -> str:
    """What makes the dense network, in a sentence."""
    if not own(settings):
        return "`make_model` makes the dense network."
    where, _, name = str(settings["model"]).rpartition(":")
    given = {"num_classes": settings.get("num_classes"), "in_channels": settings.get("in_chans")}
    arguments = ", ".join(f"{key}={value}" for key, value in given.items() if value)
    return (f"`{name}`, the factory of the dense network, is not in this repository: it is `{name}` of `{where}`, called with "
            f"{arguments} where it takes them.")


def usage(settings: Mapping[str, Any], repository: str) -> str:
    """Python that loads the network."""
    kwargs = dict(settings.get("model_kwargs") or {})
    if own(settings):
        name = str(settings["model"]).rpartition(":")[2]
        arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        return f"import narrower\n\nmodel = narrower.load({repository!r}, lambda: {name}({arguments}))"
    given = {"num_classes": settings.get("num_classes"), "in_channels": settings.get("in_chans", 3)} | kwargs
    arguments = "".join(f", {key}={value!r}" for key, value in given.items())
    return (f"import narrower\nfrom narrower.models import make_model\n\n"
            f"model = narrower.load({repository!r}, lambda: make_model({settings['model']!r}{arguments}))")


def versions(facts: Facts) -> str:
    """What computed the run."""
    start = facts.start
    text = f"Seed {facts.settings.get('seed', 'unknown')}, narrower {start.get('narrower', 'of an unknown version')}"
    return text + (f", torch {start['torch']}, Python {start['python']}." if {"torch", "python"} <= start.keys() else ".")


def licence(fields: Mapping[str, Any]) -> str:
    """What the card says of the licence."""
    name = fields.get("license_name") or fields.get("license")
    text = f"`{name}`." if name else "Not stated by those who share this network."
    base = fields.get("base_model")
    bases = ", ".join(f"`{one}`" for one in ([base] if isinstance(base, str) else base or ()))
    return text + (f" The weights come from {bases}: the terms of those apply too." if bases else "")
