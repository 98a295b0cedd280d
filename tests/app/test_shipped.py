"""The shipped settings: found by name, and each checked on paper against what the authors report.

The support code counts as the authors do. What a network of ours costs at these settings stands in `configs/README.md`.
"""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.published import (
    Layer,
    dense_inputs_gone,
    hrank_count,
    hrank_rates,
    layers_of,
    plus_count,
    rates_in,
    resrep_resnet,
    resrep_resnet50,
)

import narrower
from narrower.app.arguments import parse
from narrower.app.cli import COMMANDS, main
from narrower.app.shipped import FOLDER, PUBLISHED, config_file, names, published
from narrower.errors import ConfigError
from narrower.models import make_model
from narrower.planning.plan import costed_plan
from narrower.planning.rates import rate_by_group

HRANK = {
    "hrank-vgg16-65": "[0.95]+[0.5]*6+[0.9]*4+[0.8]*2",
    "hrank-resnet56-50": "[0.1]+[0.60]*35+[0.0]*2+[0.6]*6+[0.4]*3+[0.1]+[0.4]+[0.1]+[0.4]+[0.1]+[0.4]+[0.1]+[0.4]",
    "hrank-resnet110-38": "[0.1]+[0.40]*36+[0.40]*36+[0.4]*36",
    "hrank-resnet110-69": "[0.1]+[0.70]*36+[0.70]*36+[0.70]*36",
    "hrank-densenet40-41": "[0.0]+[0.1]*6+[0.7]*6+[0.0]+[0.1]*6+[0.7]*6+[0.0]+[0.1]*6+[0.7]*5+[0.0]",
    "hrank-googlenet-70": "[0.10]+[0.8]*5+[0.85]+[0.8]*3",
    "hrank-googlenet-55": "[0.10]+[0.7]+[0.5]+[0.8]*4+[0.5]+[0.6]*2",
    "hrank-resnet50-62": "[0.2]+[0.8]*10+[0.8]*13+[0.55]*19+[0.45]*10",
    "hrank-resnet50-76": "[0.2]+[0.80]*10+[0.80]*13+[0.80]*19+[0.70]*10",
}
PLUS = {
    "hrankplus-vgg16-79": "[0.45]*7+[0.78]*5",
    "hrankplus-resnet56-28": "[0.]+[0.18]*29",
    "hrankplus-resnet110-44": "[0.]+[0.2]*2+[0.3]*18+[0.35]*36",
    "hrankplus-googlenet-57": "[0.3]+[0.6]*2+[0.7]*5+[0.8]*2",
}
# The widths of the narrow ResNet-50 in the last lines of the authors' log (res50_54.5pruned_log.txt); dense shortcut, streams.
RESNET50 = [64, 256, 22, 22, 256, 23, 36, 256, 1, 1, 256, 512, 62, 97, 512, 16, 49, 512, 38, 68, 512, 41, 92, 512,
            1024, 189, 204, 1024, 69, 145, 1024, 65, 139, 1024, 64, 94, 1024, 67, 89, 1024, 86, 95, 1024,
            2048, 473, 488, 2048, 171, 281, 2048, 511, 512, 2048]
DENSE50 = [64, *[256, 64, 64], *[256, 64, 64] * 2, 256, *[512, 128, 128] * 4, 512, *[1024, 256, 256] * 6, 1024,
           *[2048, 512, 512] * 3, 2048]


def settings(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(config_file(name).read_text(encoding="utf-8"))
    return found


@cache
def graph_of(model: str) -> narrower.Graph:
    size = 224 if "resnet50" in model else 32
    return narrower.trace(make_model(model), torch.zeros(1, 3, size, size))


@cache
def layers(model: str) -> list[Layer]:
    return layers_of(model, 224 if "resnet50" in model else 32)


def plan_of(name: str) -> narrower.Plan:
    graph = graph_of(settings(name)["model"])
    return narrower.plan(graph, narrower.random(graph), remove=settings(name)["remove"])


@pytest.mark.parametrize("name", names())
def test_settings_are_found_by_name_and_taken_by_prune(name: str) -> None:
    _, found, given = parse(COMMANDS, ["prune", "--config", name])
    expected = {key: value for key, value in settings(name).items() if key != PUBLISHED}
    assert {key: getattr(given, key) for key in expected} == expected
    assert found.prune.method in ("hrank", "resrep")


def test_every_published_network_is_checked_here() -> None:
    assert {*HRANK, *PLUS, "resrep-resnet56-53", "resrep-resnet50-55"} == set(names())


@pytest.mark.parametrize("name", HRANK)
def test_hrank_counted_as_its_authors_do_is_what_they_report(name: str) -> None:
    """To half a unit of the last digit that they print."""
    found, all_layers = published(name), layers(settings(name)["model"])
    rates = hrank_rates(all_layers, HRANK[name])
    options: dict[str, Any] = {}
    if "vgg" in name:  # widths are fractions; linear layers count twice in the dense network, never in the narrow one
        assert hrank_count(all_layers, {}, linear=2)[0] == pytest.approx(found.macs[0], abs=0.006)
        options = {"fractions": True, "linear": 0}
    if "densenet" in name:
        options = {"gone": dense_inputs_gone(all_layers, rates)}
    if name == "hrank-googlenet-70":  # a slip in their network: block c4 is counted with the rate of d4
        rates |= {layer: 0.85 for layer, rate in rates.items() if layer.startswith("blocks.5.") and rate}
    macs, params = hrank_count(all_layers, rates, **options)
    digits = 6 if (found.macs[1] or 0) > 400 else 0.03 if "resnet110" in name else 0.007
    assert macs == pytest.approx(found.macs[1], abs=digits)
    assert params == pytest.approx(found.params[1], abs=0.016)


@pytest.mark.parametrize("name", HRANK)
def test_hrank_dense_networks_are_ours(name: str) -> None:
    """To a thousandth (GoogLeNet and ResNet-50 are printed with three digits). Their parameters are without BatchNorm."""
    found, plan = published(name), plan_of(name)
    assert plan.macs[0] / 1e6 == pytest.approx(found.macs[0], rel=1.5e-3)
    assert plan.params[0] / 1e6 == pytest.approx(found.params[0], rel=0.02)


@pytest.mark.parametrize("name", HRANK)
def test_patterns_give_each_layer_its_rate_where_no_stream_forbids_it(name: str) -> None:
    graph, all_layers = graph_of(settings(name)["model"]), layers(settings(name)["model"])
    ours, theirs = rate_by_group(graph, settings(name)["remove"]), hrank_rates(all_layers, HRANK[name])
    inner = {g.layers[0]: g.name for g in graph.free if len(g.layers) == 1}
    assert {layer: ours.get(inner[layer], 0.0) for layer in theirs if layer in inner} == {
        layer: rate for layer, rate in theirs.items() if layer in inner}
    assert not any(ours.get(g.name) for g in graph.free if len(g.layers) > 1)


def plus_widths(name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Outputs and inputs of every layer in the networks of HRankPlus: what stays is rounded down."""
    all_layers, rates = layers(settings(name)["model"]), rates_in(PLUS[name])
    out = {x.name: x.outputs for x in all_layers}
    if "vgg" in name:
        for x, rate in zip(all_layers, rates, strict=False):
            out[x.name] = int(x.outputs * (1 - rate))
        order = [x.name for x in all_layers]
        return out, {x.name: out[order[k - 1]] if k else 3 for k, x in enumerate(all_layers)}
    inputs = {x.name: x.inputs for x in all_layers}
    if "resnet" in name:
        blocks = [x for x in all_layers if x.name.endswith("conv1") and x.name != "conv1"]
        stage, stream = {1: rates[1], 2: rates[2], 3: 0.0}, int(16 * (1 - rates[0]))
        out["conv1"] = stream
        for x, rate in zip(blocks, rates[3:], strict=True):
            second = x.name.replace("conv1", "conv2")
            inputs[x.name], out[x.name] = stream, int(x.outputs * (1 - rate))
            inputs[second], stream = out[x.name], int(out[second] * (1 - stage[int(x.name[5])]))
            out[second] = stream
        return out, inputs
    blocks_of = list(dict.fromkeys(x.name.split(".")[1] for x in all_layers if x.name.startswith("blocks.")))
    before = 192
    for block, rate in zip(blocks_of, rates[1:], strict=True):
        at, last = f"blocks.{block}.", block == blocks_of[-1]
        for branch in ("branch3.1.0", "branch5.1.0", "branch5.2.0"):
            if not last or branch == "branch5.1.0":
                out[at + branch] = int(out[at + branch] * (1 - rate))
        for branch in ("branch1.0", "branch3.0.0", "branch5.0.0", "branch_pool.1.0"):
            inputs[at + branch] = before
        inputs[at + "branch5.2.0"] = out[at + "branch5.1.0"]
        before = sum(out[at + b] for b in ("branch1.0", "branch3.1.0", "branch5.2.0", "branch_pool.1.0"))
    return out, inputs


@pytest.mark.parametrize("name", PLUS)
def test_hrankplus_counted_as_its_authors_do_is_what_they_report(name: str) -> None:
    found = published(name)
    macs, params = plus_count(layers(settings(name)["model"]), *plus_widths(name), biases="resnet" not in name)
    assert macs == pytest.approx(found.macs[1], abs=0.006)
    assert params == pytest.approx(found.params[1], abs=0.011)


@pytest.mark.parametrize("name", PLUS)
def test_the_networks_of_hrankplus_are_ours_to_one_channel(name: str) -> None:
    """Both round to whole channels, they down and `plan` up. Streams, which ours leave whole, are not compared."""
    plan, (out, _) = plan_of(name), plus_widths(name)
    inner = [g for g in plan.graph.free if len(g.layers) == 1 and not g.layers[0].startswith("classifier")]
    assert len(inner) > 10
    assert all(0 <= len(plan.keep[g.name]) - out[g.layers[0]] <= 1 for g in inner)


def test_the_54_5_and_the_56_1_percent_of_resrep_are_one_network() -> None:
    found = published("resrep-resnet50-55")
    for stride_first, share in ((False, 54.54), (True, 56.11)):
        dense = resrep_resnet50(DENSE50, stride_first=stride_first)
        narrow = resrep_resnet50(RESNET50, stride_first=stride_first)
        assert 100 * (1 - narrow[0] / dense[0]) == pytest.approx(share, abs=0.006)
    narrow = resrep_resnet50(RESNET50, stride_first=False)
    assert narrow == pytest.approx((found.macs[1], found.params[1]), abs=0.006)


def test_the_narrow_resnet50_of_resrep_costs_here_what_it_costs_there() -> None:
    """Ours has the stride in the second convolution: torchvision's network. To the last multiply-add."""
    graph = graph_of("resnet50.tv_in1k")
    at = iter(RESNET50[1:])
    keep = {g.name: torch.arange(g.size).numpy() for g in graph.free}
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            _, one, two = next(at), next(at), next(at)
            keep[f"layer{stage}.{block}.conv1"] = keep[f"layer{stage}.{block}.conv1"][:one]
            keep[f"layer{stage}.{block}.conv2"] = keep[f"layer{stage}.{block}.conv2"][:two]
        next(at)
    plan = costed_plan(graph, keep, {})
    for k, widths in enumerate((DENSE50, RESNET50)):
        macs, params = resrep_resnet50(widths, stride_first=False)
        assert plan.macs[k] / 1e6 == pytest.approx(macs, rel=1e-9)
        assert plan.params[k] / 1e6 == pytest.approx(params, rel=1e-9)


def test_the_dense_resnet56_of_resrep_has_one_percent_more_in_its_shortcuts() -> None:
    widths = {f"layer{s}.{b}.conv1": w for s, w in ((1, 16), (2, 32), (3, 64)) for b in range(9)}
    theirs = resrep_resnet(widths, 9)
    ours = sum(x.inputs * x.outputs * x.area * x.positions for x in layers("cifar_resnet56")) / 1e6
    assert theirs - ours == pytest.approx((16 * 32 * 4 * 16**2 + 32 * 64 * 4 * 8**2) / 1e6, abs=1e-9)
    assert (round(ours, 1), round(theirs, 1)) == (125.5, 126.5)


@pytest.mark.parametrize("name", [*HRANK, *PLUS])
def test_the_page_says_what_ours_costs(name: str) -> None:
    """`| name | their dense and narrow MACs | ours | ... |` in configs/README.md."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    plan, found = plan_of(name), published(name)
    assert [float(cell.split()[0].replace(",", "")) for cell in cells[1:5]] == pytest.approx(
        [found.macs[1], plan.macs[1] / 1e6, found.params[1], plan.params[1] / 1e6], abs=0.006)
    assert re.fullmatch(r"[+-]\d+ %", cells[5])
    assert float(cells[5].rstrip(" %")) == pytest.approx(100 * (plan.macs[1] / 1e6 / (found.macs[1] or 1) - 1), abs=0.51)


def test_a_file_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hrank-resnet56-50").write_text("epochs: 3\n")
    assert parse(COMMANDS, ["prune", "--config", "hrank-resnet56-50"])[1].train.epochs == 3


def test_an_unknown_name_suggests_a_known_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="did you mean hrank-resnet56-50"):
        config_file("hrank-resnet56-51")
    assert main(["prune", "--config", "hrank-resnet56-51"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("columns", [80, 220])
def test_configs_lists_all_with_the_figures_of_the_papers(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is cut off where the terminal is narrow."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(f" {name} " in line for line in lines) for name in names()) and not any("…" in line for line in lines)
    first = next(k for k, line in enumerate(lines) if "hrank-resnet56-50" in line)
    cells = zip(*(line.strip("│").split("│") for line in lines[first:first + 3]), strict=True)
    name, *figures, source = (" ".join(" ".join(cell).split()) for cell in cells)
    assert name.startswith("hrank-resnet56-50 cifar_resnet56, CIFAR-10") and source.startswith("HRank (CVPR 2020)")
    for found, wanted in zip(figures, ("93.26 -> 93.17", "125.49 -> 62.72 (-50.0%)", "0.85 -> 0.49"), strict=True):
        assert found.startswith(wanted)


@pytest.mark.parametrize(("name", "images", "batch"), [("resrep-resnet56-53", 50000, 64), ("resrep-resnet50-55", 1281167, 256)])
def test_resrep_has_the_published_schedule(name: str, images: int, batch: int) -> None:
    """The warm-up is 5 epochs of the images, in steps as the authors round them."""
    found = narrower.Forgetting(**settings(name)["forgetting"])
    assert found.warmup_steps == 5 * images // batch and settings(name)["batch_size"] == batch
    assert dataclasses.replace(found, warmup_steps=5) == narrower.Forgetting.published(1)
