"""What users get wrong: each is an error of narrower's own that says what was wrong, where, and what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import networks, reference
from support.networks import IMAGES, Plain, images
from torch import Tensor, nn

import narrower


class Function(nn.Module):
    """A forward given by a function, and one convolution."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 6, 3), function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


WRONG_INPUTS: dict[str, Any] = {
    "one channel": images(1), "no batch": IMAGES[0, 0], "flat": torch.randn(4, 3), "integers": torch.zeros(2, 3, 8, 8).long(),
    "too small": torch.randn(1, 3, 2, 2), "double": IMAGES.double(), "two": (IMAGES, IMAGES), "none": None, "text": "image.png",
    "unknown keyword": {"picture": IMAGES}, "empty tuple": (), "empty dict": {}, "a list": [IMAGES], "a number": 3,
    "a shape": (3, 8, 8), "a module": nn.ReLU(),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_inputs_that_the_model_does_not_take_are_named(name: str) -> None:
    with pytest.raises(narrower.TraceError) as error:
        narrower.trace(Plain(), WRONG_INPUTS[name])
    assert "example inputs" in str(error.value) and "Check" in str(error.value)
    assert error.value.__cause__ is not None, "what PyTorch said is kept"


def test_the_message_has_the_shape_and_the_models_own_error() -> None:
    with pytest.raises(narrower.TraceError, match=r"\(4, 1, 8, 8\).*RuntimeError.*channels"):
        narrower.trace(Plain(), images(1))


def test_the_error_of_a_failing_forward_is_quoted() -> None:
    def fails(m: Any, x: Tensor) -> Tensor:
        raise KeyError("no such layer")

    with pytest.raises(narrower.TraceError, match="KeyError.*no such layer"):
        narrower.trace(Function(fails), IMAGES)


def test_a_forward_that_is_interrupted_is_no_error_of_the_model() -> None:
    def stops(m: Any, x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        narrower.trace(Function(stops), IMAGES)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(), nn.MaxPool2d(2), nn.Flatten()])
def test_a_model_without_parameters_is_refused(model: nn.Module) -> None:
    with pytest.raises(narrower.TraceError, match="no parameters"):
        narrower.trace(model, IMAGES)


def test_a_model_without_convolutions_or_linear_layers_is_refused() -> None:
    with pytest.raises(narrower.TraceError, match="convolution"):
        narrower.trace(nn.Sequential(nn.BatchNorm2d(3), nn.PReLU(3)), IMAGES)


@pytest.mark.parametrize("model", [None, "resnet18", torch.zeros(3), Plain, lambda x: x, Plain().state_dict()])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(narrower.ConfigError, match=r"trace takes \(model, example_inputs\): model must be nn\.Module and is "):
        narrower.trace(model, IMAGES)


API: Any = narrower  # untyped, for calls that the type checker would refuse
SWAPPED: dict[str, Any] = {
    r"plan takes \(graph, scores\): graph must be Graph and is a Scores; scores must be": lambda n: API.plan(
        n.scores, n.graph, remove=0.5),
    r"scores must be Mapping\[str, Tensor\] and is a NoneType": lambda n: API.plan(n.graph, None, remove=0.5),
    r"plan .*sensitivity must be Sensitivity \| None and is a Scores": lambda n: API.plan(
        n.graph, n.scores, macs=0.5, sensitivity=n.scores),
    r"narrow takes \(model, plan\): model must be nn\.Module and is a Plan; plan must be Plan and is a Plain": lambda n:
        API.narrow(n.plan, n.model),
    r"narrow .*plan must be Plan and is a Graph": lambda n: API.narrow(n.model, n.graph),
    r"verify takes \(model, small, plan, example_inputs\): small must": lambda n: API.verify(
        n.model, n.plan, n.small, IMAGES),
    r"verify .*plan must be Plan and is a Tensor": lambda n: API.verify(n.model, n.small, IMAGES, n.plan),
    r"taylor .*loss must be Callable\[\[Any, Any\], Tensor\] and is a list": lambda n: API.taylor(
        n.model, n.graph, nn.functional.cross_entropy, [IMAGES]),
    "sensitivity .*graph must be Graph and is a Scores": lambda n: API.sensitivity(n.model, n.scores, n.graph, [IMAGES]),
    "random .*graph must be Graph and is a Plain": lambda n: API.random(n.model),
    "reconstruct .*small must be": lambda n: API.reconstruct(n.model, n.plan, n.small, [IMAGES]),
    "recalibrate .*model must be nn.Module and is a list": lambda n: API.recalibrate([IMAGES], n.model),
    "measure .*model must be": lambda n: API.measure(IMAGES, n.model),
    r"export takes \(module, example_inputs, path\): module must": lambda n: API.export(IMAGES, n.model, "x.onnx"),
    r"export .*path must be str \| os\.PathLike\[str\] and is a Tensor": lambda n: API.export(n.model, "x.onnx", IMAGES),
    r"benchmark .*modules must be Mapping\[str, nn\.Module\] and is a Plain": lambda n: API.benchmark(n.model, IMAGES),
    "tune .*plan must be": lambda n: API.tune(n.model, n.plan, n.small, [IMAGES]),
    "Distillation takes .teacher, student, plan.: student": lambda n: API.Distillation(n.model, n.plan, n.small),
    r"ResRep takes \(model, graph\): model must": lambda n: API.ResRep(n.graph, n.model, macs=0.5, steps=3),
    "SoftPruning .*model must": lambda n: API.SoftPruning(n.graph, n.model, macs=0.5, steps=3),
    "CentripetalSGD .*model must": lambda n: API.CentripetalSGD(n.graph, n.model, macs=0.5, steps=3),
    "compose .*second must be Plan": lambda n: API.compose(n.plan, n.small),
    "fold .*model must": lambda n: API.fold(n.plan, n.model),
    "save .*model must .*folder must": lambda n: API.save("folder", n.small),
    "measure_latency .*graph must": lambda n: API.measure_latency(n.model, IMAGES, n.graph),
    "load takes a function": lambda n: API.load("folder", n.small),
}


@pytest.mark.parametrize("message", SWAPPED)
def test_arguments_in_the_wrong_place_are_named_with_their_order(message: str) -> None:
    model = Plain()
    graph = narrower.trace(model, IMAGES)
    scores = narrower.random(graph)
    plan = narrower.plan(graph, scores, remove=0.5)
    given = SimpleNamespace(model=model, graph=graph, scores=scores, plan=plan, small=narrower.narrow(model, plan))
    with pytest.raises(narrower.ConfigError, match=message):
        SWAPPED[message](given)


def test_a_group_that_is_not_there_is_named_with_the_nearest() -> None:
    graph = narrower.trace(Plain(), IMAGES)
    with pytest.raises(narrower.PlanError, match=r"no group 'conv7'; did you mean conv\d, conv\d, conv\d\?"):
        graph["conv7"]
    with pytest.raises(narrower.PlanError, match=r"no group 0; print\(graph\) lists them"):
        graph[0]  # type: ignore[index]


def test_an_mlp_is_narrowed_like_a_cnn() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 6)
    plan = reference.halved(model, x)
    assert {g.name: g.size for g in plan.graph.free} == {"0": 10, "2": 8}
    reference.exact(model, plan, x)
    assert reference.macs(narrower.narrow(model, plan), x) == plan.macs[1] == 6 * 5 + 5 * 4 + 4 * 3


@pytest.mark.parametrize("model", [nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
                                   nn.Linear(8, 5)])
def test_nothing_is_free_and_the_message_says_what_pins(model: nn.Module) -> None:
    graph = narrower.trace(model, IMAGES)
    assert not graph.free and "network output" in str(graph)
    with pytest.raises(narrower.PlanError, match="nothing is free.*network output"):
        narrower.plan(graph, {}, macs=0.5)


def test_wrapped_models_say_what_to_unwrap() -> None:
    with pytest.raises(narrower.TraceError, match=r"DataParallel.*model\.module"):
        narrower.trace(nn.DataParallel(Plain()), IMAGES)
    compiled: Any = torch.compile(Plain(), backend="eager")
    with pytest.raises(narrower.TraceError, match=r"model\._orig_mod"):
        narrower.trace(compiled, IMAGES)


def test_distributed_models_say_what_to_unwrap() -> None:
    class DistributedDataParallel(nn.Module):  # a real one needs a process group
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(narrower.TraceError, match=r"DistributedDataParallel.*model\.module"):
        narrower.trace(DistributedDataParallel(Plain()), IMAGES)


def test_scripted_models_are_refused() -> None:
    scripted: Any = torch.jit.trace(Plain().eval(), IMAGES)
    with pytest.raises(narrower.TraceError, match="jit"):
        narrower.trace(scripted, IMAGES)


def test_a_part_that_cannot_be_traced_is_named() -> None:
    for part, error in ((torch.jit.trace(nn.Conv2d(3, 3, 1), IMAGES), "1 is compiled by torch.jit.*in its place"),
                        (nn.DataParallel(nn.Conv2d(3, 3, 1)), r"1 is wrapped in DataParallel: put 1\.module in its place")):
        with pytest.raises(narrower.TraceError, match=error):
            narrower.trace(nn.Sequential(Plain(), part), IMAGES)


def test_a_part_that_is_compiled_is_traced() -> None:
    part: Any = torch.compile(nn.Conv2d(3, 6, 1), backend="eager")
    assert narrower.trace(nn.Sequential(part, nn.Conv2d(6, 2, 1)), IMAGES).free


def test_symbolically_traced_models_are_models() -> None:
    """What torchvision's feature extractors are."""
    exported = torch.fx.symbolic_trace(Plain().eval())
    plan = reference.halved(exported, IMAGES)
    reference.exact(exported, plan, IMAGES)


def test_lazy_layers_ask_to_be_run_once() -> None:
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    with pytest.raises(narrower.TraceError, match=r"0\.weight is not initialised.*run the model once"):
        narrower.trace(model, IMAGES)
    model(IMAGES)
    assert [g.name for g in narrower.trace(model, IMAGES).free] == ["0"]


def test_lazy_batch_norm_asks_to_be_run_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.LazyBatchNorm2d(), nn.Conv2d(6, 4, 3))
    with pytest.raises(narrower.TraceError, match="not initialised"):
        narrower.trace(model, IMAGES)


def test_a_model_that_cannot_be_copied_is_named_or_narrowed() -> None:
    model = Plain()
    model.file = open(__file__)  # type: ignore[assignment]  # noqa: SIM115
    try:
        plan = reference_or_error(model)
        if plan is not None:
            narrower.narrow(model, plan)
    except narrower.NarrowerError as e:
        assert "copied" in str(e) or "file" in str(e)
    finally:
        model.file.close()  # type: ignore[union-attr, operator]


def reference_or_error(model: nn.Module) -> narrower.Plan | None:
    graph = narrower.trace(model, IMAGES)
    return narrower.plan(graph, narrower.random(graph), remove=0.5)


def test_other_models_and_plans_do_not_mix() -> None:
    plan = reference.halved(Plain(), IMAGES)
    with pytest.raises(narrower.PlanError, match="not the one that was traced"):
        narrower.narrow(networks.UNet(), plan)
    with pytest.raises(narrower.NarrowerError):
        narrower.verify(networks.UNet(), Plain(), plan, IMAGES)


def test_verify_names_inputs_that_the_model_does_not_take() -> None:
    model = Plain()
    plan = reference.halved(model, IMAGES)
    with pytest.raises(narrower.VerifyError, match="inputs"):
        narrower.verify(model, narrower.narrow(model, plan), plan, images(1))


LIKE_BATCHES: dict[str, tuple[Any, str]] = {
    "array": (IMAGES.numpy(), r"torch\.from_numpy"), "list": ([IMAGES], "A list is one argument.*give the tensor in it"),
    "labels": ((IMAGES, torch.zeros(4).long()), "without labels: give the images"), "none": (None, "Give a tensor"),
    "dict": ({"image": IMAGES, "label": torch.zeros(4)}, r"give batch\['image'\]"),
    "bytes": ((255 * IMAGES.abs()).to(torch.uint8), "as floating-point numbers"),
}


@pytest.mark.parametrize("name", LIKE_BATCHES)
def test_inputs_like_a_loaders_batches_are_told_what_to_give(name: str) -> None:
    """In one line: PyTorch lists all signatures of an operator below its error."""
    model = Plain()
    given, message = LIKE_BATCHES[name]
    plan = reference.halved(model, IMAGES)
    calls: list[tuple[type[Exception], Any]] = [
        (narrower.TraceError, lambda: narrower.trace(model, given)),
        (narrower.VerifyError, lambda: narrower.verify(model, narrower.narrow(model, plan), plan, given, dtype=None)),
        (narrower.DataError, lambda: narrower.export(model, given, "network.pt2")),
        (narrower.DataError, lambda: narrower.benchmark({"dense": model}, given)),
        (narrower.DataError, lambda: narrower.measure_latency(model, plan.graph, given)),
        (narrower.DataError, lambda: narrower.write_latency_jobs(model, plan.graph, given, "folder")),
    ]
    for kind, call in calls:
        with pytest.raises(kind, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def calls_on(model: nn.Module, graph: narrower.Graph) -> dict[str, Any]:
    """What reads batches as they come, one after the other."""
    return {
        "hrank": lambda batches: narrower.hrank(model, graph, batches),
        "recalibrate": lambda batches: narrower.recalibrate(model, batches),
        "obs": lambda batches: narrower.obs(model, graph, batches),
        "taylor": lambda batches: narrower.taylor(model, graph, [(x, torch.zeros(4).long()) for x in batches],
                                                  nn.functional.cross_entropy),
        "measure": lambda batches: narrower.measure(model, next(iter(batches)), seconds=0.0),
    }


WRONG_BATCHES: dict[str, tuple[Any, str]] = {
    "one channel": (images(1), r"\(\d, 1, 8, 8\).*channels"),
    "labels in a dict": ({"image": IMAGES, "label": torch.zeros(4)}, r"unexpected keyword.*labels: give batch\['image'\]"),
    "bytes": ((255 * IMAGES.abs()).to(torch.uint8), "(Byte|unsigned char).*as floating-point numbers"),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
@pytest.mark.parametrize("call", ["hrank", "recalibrate", "obs", "taylor", "measure"])
def test_batches_that_the_model_does_not_take_leave_it_as_it_was(call: str, name: str) -> None:
    model = Plain()
    batch, message = WRONG_BATCHES[name]
    with pytest.raises(narrower.DataError, match=f"{call}: the model does not run on inputs of shape.*{message}"):
        calls_on(model, narrower.trace(model, IMAGES))[call]([batch])
    assert model.training and model.bn1.momentum == 0.1


@pytest.mark.parametrize("call", ["hrank", "recalibrate", "obs"])
def test_batches_without_tensors_are_not_passed_over(call: str) -> None:
    model = Plain()
    run = calls_on(model, narrower.trace(model, IMAGES))[call]
    for batches, message in (
        ([IMAGES, IMAGES.numpy()], r"batch 1 is a ndarray without a tensor of images in it.*torch\.from_numpy"),
        ([(IMAGES.numpy(), torch.zeros(4))], "batch 0 is a tuple without a tensor of images"),
        (["image.jpg"], "batch 0 is a str without a tensor of images"),
        (IMAGES, r"one tensor of shape \(4, 3, 8, 8\): give a list of batches"),
    ):
        with pytest.raises(narrower.DataError, match=f"{call}: .*{message}"):
            run(batches)


@pytest.mark.parametrize("images_wanted", [-1, 0, 2.5, float("nan"), True])
@pytest.mark.parametrize("call", ["hrank", "obs", "recalibrate", "sensitivity", "reconstruct", "tune"])
def test_a_number_of_images_that_is_none_is_refused(call: str, images_wanted: Any) -> None:
    """Less than none took all but one, or none without a word."""
    model, x = Plain().eval(), images(seed=3).repeat(6, 1, 1, 1)
    graph = narrower.trace(model, IMAGES)
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    given = {"hrank": (model, graph), "obs": (model, graph), "recalibrate": (model,), "sensitivity": (
        model, graph, narrower.random(graph))}.get(call, (model, narrower.narrow(model, plan), plan))
    with pytest.raises(narrower.ConfigError, match=f"{call}: images={images_wanted}: give a whole number from 1"):
        getattr(narrower, call)(*given, [x], images=images_wanted)


@pytest.mark.parametrize("shares", [(-0.5,), (0.0, 0.5), (1.0,), (1.5,), (float("nan"),), (), 0.5, ("a",)])
def test_shares_that_are_no_fractions_are_refused(shares: Any) -> None:
    graph = narrower.trace(Plain(), IMAGES)
    with pytest.raises(narrower.ConfigError, match="shares="):
        narrower.sensitivity(Plain(), graph, narrower.random(graph), [IMAGES], shares=shares)


@pytest.mark.parametrize("budget", [{"macs": -1}, {"macs": 0}, {"params": float("nan")}, {"macs": "a"}, {"macs": 1}])
def test_a_budget_that_is_none_is_refused_before_ranks_are_taken(budget: Any) -> None:
    """With few images no plan was made, and the budget was not looked at."""
    graph = narrower.trace(Plain(), IMAGES)
    with pytest.raises(narrower.PlanError, match=f"{next(iter(budget))}=.*give"):
        narrower.hrank(Plain(), graph, [IMAGES], **budget)


@pytest.mark.parametrize("tolerance", [-1, float("nan"), "1"])
def test_a_tolerance_that_is_none_is_not_put_down_to_the_network(tolerance: Any) -> None:
    model = Plain()
    plan = reference.halved(model, IMAGES)
    with pytest.raises(narrower.ConfigError, match="tolerance=.*give a number from 0"):
        narrower.verify(model, narrower.narrow(model, plan), plan, IMAGES, tolerance=tolerance)
    with pytest.raises(narrower.ConfigError, match="tolerance=.*give a number from 0"):
        narrower.export(model, IMAGES, "network.pt2", tolerance=tolerance)


@pytest.mark.parametrize("settings", [{"batch_sizes": (0,)}, {"batch_sizes": (1.5,)}, {"batch_sizes": ()}, {"batch_sizes": 2},
                                      {"threads": (0,)}, {"threads": ()}, {"threads": 2}])
def test_a_benchmark_of_no_samples_or_threads_is_refused(settings: Any) -> None:
    with pytest.raises(narrower.ConfigError, match=f"{next(iter(settings))}=.*give"):
        narrower.benchmark({"dense": Plain()}, IMAGES, **settings)


@pytest.mark.parametrize(("given", "message"), [((1, 3, 8, 8), "Give a tensor"), (IMAGES.numpy(), "ndarray.*torch.from_numpy")])
def test_measure_names_inputs_that_are_no_tensors(given: Any, message: str) -> None:
    with pytest.raises(narrower.DataError, match=message) as error:
        narrower.measure(Plain(), given, seconds=0.0)
    assert "\n" not in str(error.value), "PyTorch's list of signatures is left out"


def test_a_lack_of_memory_is_not_put_down_to_the_data() -> None:
    def fails(m: Any, x: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        narrower.measure(Function(fails), IMAGES, seconds=0.0)


SCORES_OF: dict[str, Any] = {
    "magnitude": narrower.magnitude, "fpgm": narrower.fpgm, "bn_scale": narrower.bn_scale,
    "taylor": lambda model, graph: narrower.taylor(model, graph, [(IMAGES, torch.zeros(4).long())],
                                                   nn.functional.cross_entropy),
    "hrank": lambda model, graph: narrower.hrank(model, graph, [IMAGES]),
    "obs": lambda model, graph: narrower.obs(model, graph, [IMAGES]),
}


@pytest.mark.parametrize("name", SCORES_OF)
def test_scores_are_of_the_traced_model_only(name: str) -> None:
    """Not of a wider one with the same names, nor of one in a wrapper, under whose names nothing is found."""
    model, wider, cut = (nn.Sequential(nn.Conv2d(3, w, 3), nn.BatchNorm2d(w), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                       nn.Linear(w, 5)).eval() for w in (8, 12, 4))
    graph = narrower.trace(model, IMAGES)
    assert SCORES_OF[name](model, graph).keys() == {"0"}
    for other in (wider, cut, networks.UNet()):
        with pytest.raises(narrower.PlanError, match="not the one that was traced: 0"):
            SCORES_OF[name](other, graph)
    compiled: Any = torch.compile(model, backend="eager")
    for wrapped, inner in ((nn.DataParallel(model), "module"), (compiled, "_orig_mod")):
        with pytest.raises(narrower.PlanError, match=rf"wrapped in {type(wrapped).__name__}: give model\.{inner} instead"):
            SCORES_OF[name](wrapped, graph)


def test_scores_of_another_model_are_refused() -> None:
    graph = narrower.trace(Plain(), IMAGES)
    with pytest.raises(narrower.PlanError, match="same graph"):
        narrower.plan(graph, narrower.random(narrower.trace(networks.UNet(), IMAGES)), macs=0.5)
