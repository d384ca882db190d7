"""What the compiled module sees of tensors: where they lie, what they are, whether a kernel may read them."""

from __future__ import annotations

import copy
import operator
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast

_C = pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)


class Tagged(Tensor):
    """A subclass."""


def in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(2, 3)


MADE: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.zeros(2, 3),
    "parameter": lambda: nn.Parameter(torch.zeros(2, 3)),
    "fixed parameter": lambda: nn.Parameter(torch.zeros(2, 3), requires_grad=False),
    "wants a gradient": lambda: torch.zeros(2, 3, requires_grad=True),
    "double": lambda: torch.zeros(2, 3, dtype=torch.float64),
    "int": lambda: torch.zeros(2, 3, dtype=torch.int64),
    "int of the same size": lambda: torch.zeros(2, 3, dtype=torch.int32),
    "other shape": lambda: torch.zeros(3, 2),
    "more dims": lambda: torch.zeros(2, 3, 1),
    "0-dim": lambda: torch.zeros(()),
    "empty": lambda: torch.zeros(0, 3),
    "meta": lambda: torch.zeros(2, 3, device="meta"),
    "sparse": lambda: torch.zeros(2, 3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(3)]),
    "subclass": lambda: torch.zeros(2, 3).as_subclass(Tagged),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_facts_hold_for_tensors_of_one_kind_alone() -> None:
    for name, make in MADE.items():
        if name == "nested":  # has no shape
            with pytest.raises(RuntimeError):
                _C.Facts([make()])
            continue
        facts = _C.Facts([torch.ones(1), make()])
        for other, made in MADE.items():
            assert facts.hold([torch.ones(1), made()]) == (name == other), (name, other)
        assert not facts.hold([torch.ones(1)])
        assert not facts.hold([make(), torch.ones(1)])
        tensors = [torch.ones(1), make()]
        named = facts.named(("a", "b"), tensors)
        assert list(named) == ["a", "b"] and all(map(operator.is_, named.values(), tensors))
        assert facts.named(("a", "b"), tensors[1:]) is None
        with pytest.raises(ValueError, match="a key for each"):
            facts.named(("a",), tensors)


def test_facts_hold_for_other_strides_and_signs() -> None:
    """They say nothing of values: a call copies what no kernel reads where it lies."""
    facts = _C.Facts([torch.zeros(2, 3)])
    for same in (torch.zeros(3, 2).t(), torch.zeros(1, 3).expand(2, 3), torch._neg_view(torch.ones(2, 3))):
        assert facts.hold([same])


def test_facts_do_not_hold_for_what_inference_mode_made() -> None:
    assert not _C.Facts([torch.zeros(2, 3)]).hold([in_inference_mode()])


def test_slots_read_what_is_there_now() -> None:
    one, two = {"w": torch.zeros(1)}, {"w": torch.zeros(2), "b": torch.zeros(3)}
    slots = _C.Slots([(one, "w"), (two, "b")], [])
    assert slots.read()[1] is two["b"]
    one["w"] = torch.ones(5)
    assert slots.read()[0] is one["w"]
    one["w"] = two["b"]
    assert slots.read() is None  # one tensor for two
    one["w"] = None  # type: ignore[assignment]
    assert slots.read() is None
    del one["w"]
    assert slots.read() is None


def test_slots_read_nothing_once_a_tie_is_broken() -> None:
    one = {"w": torch.zeros(1)}
    two = {"w": one["w"]}
    slots = _C.Slots([(one, "w")], [(0, two, "w")])
    assert slots.read() == [one["w"]]
    two["w"] = torch.zeros(1)
    assert slots.read() is None
    one["w"] = two["w"]
    assert slots.read() == [one["w"]]


@pytest.mark.parametrize("make", [dict, OrderedDict])
def test_places_know_the_order_of_a_dict(make: Callable[..., Any]) -> None:
    held = make(a=1, b=2)
    places = _C.Places([("order", held, None, tuple(held))], [])
    assert places.hold()
    held["a"] = held.pop("a")
    assert not places.hold()
    held["b"] = held.pop("b")
    assert places.hold()
    held["c"] = 3
    assert not places.hold()
    del held["c"], held["b"]
    assert not places.hold()


def test_places_know_the_order_of_an_ordered_dict_that_was_moved_in() -> None:
    held = OrderedDict(a=1, b=2)
    places = _C.Places([("order", held, None, tuple(held))], [])
    held.move_to_end("a")
    assert not places.hold()


def test_slots_refuse_what_makes_no_sense() -> None:
    with pytest.raises(TypeError, match="a dict expected"):
        _C.Slots([([], 0)], [])
    with pytest.raises(ValueError, match="a tie to one of the slots"):
        _C.Slots([({}, "w")], [(1, {}, "w")])


def lying(kind: str, x: Tensor) -> Tensor:
    """The same values, lying otherwise."""
    if kind == "behind others":
        return torch.cat([torch.full_like(x[:1], 9), x])[1:]
    if kind == "turned":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "every other":
        return torch.stack([x, -x], -1)[..., 0]
    return torch._neg_view(-x)


@pytest.mark.parametrize("kind", ["behind others", "turned", "every other", "negated"])
@pytest.mark.parametrize("repeated", [False, True])
def test_tensors_are_read_as_they_lie(kind: str, repeated: bool) -> None:
    """Inputs and parameters, in a first call and in one like the last."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(4, 5, 2, dtype=torch.float64)
    options: dict[str, Any] = {"update": metafast.SGD(lr=0.1), "steps": 2}
    loss, wanted = metafast.InnerLoop(model, F.mse_loss, backend="torch", **options).meta_gradient((x, y), (x, y))
    inner = metafast.InnerLoop(model, F.mse_loss, backend="native", **options)
    if repeated:
        inner.meta_gradient((x, y), (x, y))
    model.weight.data = lying(kind, model.weight.data)
    batch = lying(kind, x), lying(kind, y)
    assert kind != "turned" or not batch[0].is_contiguous()
    got, grads = inner.meta_gradient(batch, batch)
    torch.testing.assert_close(got, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_tensors_of_their_own(dtype: torch.dtype) -> None:
    """They outlive what made them, are written to, and share memory with nothing."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(dtype)
    x, y = torch.randn(4, 5, 3, dtype=dtype, requires_grad=True), torch.randn(4, 5, 2, dtype=dtype)
    inner = metafast.InnerLoop(model, F.mse_loss, update=metafast.SGD(lr=0.1), steps=2, backend="native")
    results = [(loss, *grads.values()) for loss, grads in (inner.meta_gradient((x, y), (x, y)) for _ in range(2))]
    losses, outputs = metafast.InnerLoop(
        model, F.mse_loss, update=metafast.SGD(lr=0.1), steps=2, backend="native", reduction="none", return_outputs=True
    )((x, y), (x, y))
    del inner, model
    made = [tensor for result in results for tensor in result] + [losses.detach(), outputs.detach()]
    before = [tensor.clone() for tensor in made]
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == len(made)
    for tensor, kept in zip(made, before, strict=True):
        assert type(tensor) is Tensor and tensor.is_leaf and not tensor.requires_grad and not tensor.is_inference()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        assert tensor.data_ptr() % 64 == 0 and tensor.stride() == kept.stride() and tensor._version == 0
        assert torch.equal(copy.deepcopy(tensor), kept) and torch.equal(pickle.loads(pickle.dumps(tensor)), kept)
        tensor += 1
        assert tensor._version == 1 and torch.equal(tensor, kept + 1)
        tensor.sub_(1).requires_grad_().sum().backward()
        assert tensor.grad is not None
    assert all(map(torch.equal, *results))


def test_torch_without_views_is_read_by_attributes() -> None:
    """As torch 2.8 is, which has no table of DLPack's functions: these tests once more, without it."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no views: the tests above have shown it")
    code = "import sys, pytest, torch; del torch.Tensor.__dlpack_c_exchange_api__; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", __file__, "-k", "not without_views"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
