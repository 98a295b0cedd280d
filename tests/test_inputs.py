"""Nested inputs and batches: every tensor is reached once, structure is kept, and batches give what the model takes."""

from __future__ import annotations

from collections import UserDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.devices import Calls
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from narrower.deployment import layer_times
from narrower.inputs import (
    call_model,
    device_of,
    first_samples,
    flatten_tensors,
    map_tensors,
    model_inputs,
    move_to,
    opaque,
    precise,
    real_rows,
    sample_count,
    samples,
    shapes_of,
    synchronize,
)


def test_complex_numbers_stay_complex_in_sums_and_distances() -> None:
    rows = torch.randn(5, 3, 2, dtype=torch.cfloat)
    assert precise(rows).dtype == torch.complex128
    assert precise(rows.real).dtype == precise(torch.ones(1).long()).dtype == torch.float64
    assert real_rows(rows).shape == (5, 12)
    assert torch.allclose(real_rows(rows).norm(dim=1), rows.flatten(1).norm(dim=1))
    assert torch.equal(real_rows(rows.real), rows.real)


def test_sums_are_in_float64_where_there_is_float64() -> None:
    assert precise(torch.ones(1)).dtype == torch.float64
    apple: Any = SimpleNamespace(device=torch.device("mps"), to=lambda dtype: dtype, is_complex=lambda: False)
    assert precise(apple) == torch.float32


LEAVES = st.one_of(st.integers(0, 9).map(lambda n: torch.full((2,), n)), st.none(), st.integers(0, 3), st.text(max_size=2))
NESTED = st.recursive(LEAVES, lambda x: st.one_of(
    st.lists(x, max_size=3), st.lists(x, max_size=3).map(tuple), st.dictionaries(st.text(max_size=2), x, max_size=3)))


def leaves(x: Any) -> list[Any]:
    """Everything in nested containers, in order."""
    if isinstance(x, dict):
        x = list(x.values())
    return [leaf for v in x for leaf in leaves(v)] if isinstance(x, (list, tuple)) else [x]


def shape(x: Any) -> Any:
    """The structure with tensors as placeholders."""
    return map_tensors(x, lambda t: "tensor")


@given(NESTED)
def test_mapping_reaches_every_tensor_and_keeps_the_rest(x: Any) -> None:
    mapped = map_tensors(x, lambda t: t + 10)
    assert shape(mapped) == shape(x)
    before, after = flatten_tensors(x), flatten_tensors(mapped)
    assert [id(t) for t in before] == [id(t) for t in leaves(x) if isinstance(t, Tensor)]
    assert len(after) == len(before) and all(torch.equal(b, a + 10) for a, b in zip(before, after, strict=True))


def test_dataclasses_are_flattened_in_the_order_of_their_fields() -> None:
    @dataclass
    class Output:
        logits: Tensor
        states: tuple[Tensor, ...]
        text: str = ""

    first, *states = (torch.zeros(n) for n in range(1, 4))
    assert [len(t) for t in flatten_tensors([Output(first, tuple(states))])] == [1, 2, 3]


class Slotted:
    __slots__ = ("__hidden", "missing")

    def __init__(self, t: Tensor) -> None:
        self.__hidden = t


class Instances:
    """As in detectron2: it has a length, and refuses to be iterated."""

    def __init__(self, t: Tensor) -> None:
        self._fields, self.size, self.kind, self.me = {"boxes": SimpleNamespace(tensor=t)}, (4, 4), torch.float32, self

    def __iter__(self) -> Any:
        raise NotImplementedError


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "object": Instances, "namespace": lambda t: SimpleNamespace(a=1, t=t), "slots": Slotted, "deque": lambda t: deque([t]),
    "values": lambda t: {"a": t}.values(), "items": lambda t: {"a": t}.items(), "mapping": lambda t: UserDict(a=t),
    "proxy": lambda t: MappingProxyType({"a": [t]}), "named tuple": namedtuple("P", "a"), "set": lambda t: {t},
    "distribution": lambda t: torch.distributions.Normal(t, 1.0, validate_args=False),
    "distributions": lambda t: torch.distributions.Independent(torch.distributions.Categorical(logits=t), 1),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_tensors_are_found_in_every_container(name: str) -> None:
    t = torch.rand(2, 5)
    found = flatten_tensors([CONTAINERS[name](t), 1])
    assert any(f.shape == t.shape and (f is t or name.startswith("distribution")) for f in found)
    assert opaque(CONTAINERS[name](t)) is None


def test_what_may_hide_tensors_is_named() -> None:
    t = torch.rand(2)
    plain = (1, 2.0, 1j, "a", b"a", None, True, ..., torch.float32, torch.device("cpu"), t.shape, range(3), slice(2), int, nn)
    assert opaque((t, plain, SimpleNamespace(model=nn.ReLU()))) is None and flatten_tensors((plain, nn.Linear(1, 1))) == []
    hiding: dict[str, Any] = {"generator": (v for v in [t]), "function": lambda: t, "method": nn.ReLU().forward,
                              "numpy.ndarray": t.numpy(), "functools.partial": partial(print, t), "object": object(),
                              "list_iterator": iter([t])}
    for kind, x in hiding.items():
        assert opaque({"a": [t, SimpleNamespace(x=x)]}) == kind


def test_shapes_are_listed_and_inputs_without_tensors_named_by_their_type() -> None:
    assert shapes_of({"x": torch.zeros(2, 3), "y": [torch.zeros(4)]}) == "(2, 3), (4,)"
    assert shapes_of("image.png") == "str"


class One(nn.Module):
    def forward(self, x: Any, scale: float = 1.0) -> Any:
        return x * scale


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Keywords(nn.Module):
    def forward(self, *, x: Tensor, y: Tensor) -> Tensor:
        return x - y


A, B = torch.arange(3.0), torch.ones(3)


@pytest.mark.parametrize(("model", "inputs", "output"), [
    (One(), A, A), (One(), (A, 2.0), 2 * A), (Two(), (A, B), A + B), (Keywords(), {"y": B, "x": A}, A - B)])
def test_tensors_tuples_and_dicts_are_arguments(model: nn.Module, inputs: Any, output: Tensor) -> None:
    assert torch.equal(call_model(model, inputs), output)


@pytest.mark.parametrize("pair", [tuple, list])
def test_of_a_pair_the_model_takes_the_first_part_unless_it_needs_both(pair: Any) -> None:
    assert model_inputs(pair((A, B)), One()) is A, "the second argument has a default: a target"
    both = model_inputs(pair((A, B)), Two())
    assert type(both) is tuple and both[0] is A and both[1] is B
    assert model_inputs(pair(((A, B), "targets")), Two()) == (A, B), "a tuple of inputs, and targets"
    assert model_inputs(pair(({"x": A, "y": B}, B)), Keywords()) == {"x": A, "y": B}


def test_other_batches_are_taken_whole() -> None:
    assert model_inputs(A, One()) is A
    assert model_inputs({"x": A, "y": B}, Keywords()) == {"x": A, "y": B}
    assert model_inputs([A, B, A], One()) == (A, B, A)


IMAGE, TALL = torch.zeros(3, 8, 8), torch.ones(3, 9, 8)


@pytest.mark.parametrize(("inputs", "count"), [
    (torch.zeros(5, 3), 5), ((torch.zeros(5, 3), torch.zeros(2)), 5), ({"x": torch.zeros(4, 3)}, 4),
    ([IMAGE, TALL], 2), (([IMAGE, TALL],), 2), (((IMAGE,),), 1), ({"images": [IMAGE] * 5}, 5), (([IMAGE] * 4, [A]), 4),
    ((torch.zeros(4, 3, 8),), 4), (([torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 4, 4)],), 2), ((None, IMAGE[0]), 8),
    (torch.zeros(()), 1), ("text", 0), ({"t": torch.tensor(0.5), "x": torch.zeros(4, 3)}, 4),
    ((torch.tensor(0.5), [IMAGE] * 2), 2), ((None, torch.tensor(0.5)), 1)])
def test_samples_are_the_first_dimension_or_the_images_of_a_list(inputs: Any, count: int) -> None:
    assert sample_count(inputs) == count


def test_the_first_samples_of_a_list_are_whole_images() -> None:
    images, rest = first_samples(([IMAGE, TALL, IMAGE], torch.zeros(3, 2)), 2)
    assert [t.shape for t in images] == [IMAGE.shape, TALL.shape] and rest.shape == (2, 2)
    assert first_samples({"x": A}, 2)["x"].tolist() == [0, 1] and len(first_samples([IMAGE, TALL], 1)) == 1
    assert [t.shape for t in first_samples((torch.tensor(0.5), torch.zeros(3, 2)), 2)] == [(), (2, 2)], "a number has none"


@pytest.mark.parametrize("kind", [tuple, list])
def test_images_and_their_targets_are_a_pair_whose_first_part_is_one_argument(kind: Any) -> None:
    """As the usual collate of detection gives them: tuple(zip(*samples))."""
    batch = kind((kind((IMAGE, TALL)), kind(({"boxes": A}, {"boxes": B}))))
    (images,) = model_inputs(batch, One())
    assert type(images) is list and images[0] is IMAGE and images[1] is TALL
    assert [n for _, n in samples("test", [batch, batch], One(), 3)] == [2, 1]
    signals = (torch.zeros(4, 2, 8), torch.ones(4, 2, 8))
    assert model_inputs((signals, A), One()) is not signals and len(model_inputs((signals, A), One())) == 2, "two arguments"
    assert len(model_inputs((signals, [A, B]), Two())) == 2, "forward needs two"


def test_inputs_go_to_the_device_of_the_model() -> None:
    assert device_of(nn.Conv2d(1, 1, 1, device="meta")) == torch.device("meta")
    assert device_of(nn.BatchNorm2d(2, affine=False, device="meta")) == torch.device("meta"), "buffers count too"
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert model_inputs((A, 0), nn.Linear(3, 1, device="meta")).is_meta


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "cpu"])
def test_only_copies_to_cuda_are_not_waited_for(name: str) -> None:
    """To Apple's GPUs they may read memory that is free again (pytorch issue 189690)."""
    anywhere: Any = SimpleNamespace(to=lambda device, non_blocking: (device, non_blocking))
    assert move_to(anywhere, torch.device(name)) == (torch.device(name), name.startswith("cuda"))


def test_a_batch_on_its_way_to_the_cpu_is_waited_for() -> None:
    with FakeTensorMode(), Calls() as calls:
        batch = torch.zeros(2, 3, device="cuda")
        assert model_inputs((batch, 0), nn.Linear(3, 1)).device.type == "cpu"
    (copy,) = calls.named("_to_copy")
    assert not copy.get("non_blocking")


@pytest.mark.parametrize(("name", "waits"), [("cuda:1", ["cuda:1"]), ("mps", ["mps"]), ("cpu", []), ("meta", [])])
def test_gpus_are_waited_for(name: str, waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(str(device)))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for wait in (synchronize, layer_times.synchronize):
        wait(torch.device(name))
    assert waited == 2 * waits


@given(st.lists(st.integers(1, 4), max_size=5), st.one_of(st.none(), st.integers(1, 12)))
def test_samples_are_the_first_ones_and_are_counted(sizes: list[int], images: int | None) -> None:
    every = torch.arange(float(sum(sizes)))
    asked = []

    def batches() -> Any:
        for part in every.split(sizes) if sizes else ():
            asked.append(len(part))
            yield part, torch.zeros(len(part))

    found = list(samples("test", batches(), One(), images))
    total = sum(sizes) if images is None else min(images, sum(sizes))
    assert all(len(x) == n > 0 for x, n in found) and sum(n for _, n in found) == total
    assert torch.equal(torch.cat([x for x, _ in found]) if found else every[:0], every[:total])
    assert sum(asked[:-1]) < total or not sizes, "no batch is read that is not needed"


def test_every_tensor_of_a_batch_is_cut_to_the_samples_that_are_wanted() -> None:
    batch = {"x": torch.zeros(5, 2), "y": torch.zeros(5)}
    (inputs, count), = samples("test", [batch], Keywords(), 3)
    assert count == 3 and {k: tuple(v.shape) for k, v in inputs.items()} == {"x": (3, 2), "y": (3,)}
