"""What the compiled module sees of tensors: where they lie, what they are, whether a kernel may read them."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
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


def test_places_ask_and_compare() -> None:
    said = [torch.float32]
    places = _C.Places([("answer", lambda: said[0], None, torch.float32)], [])
    assert places.hold()
    said[0] = torch.float64
    assert not places.hold()
    said.clear()
    assert not places.hold()  # what it raises is a change


def repeat(w: Tensor, given: Tensor, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """A parameter, a hyper-parameter, a batch of one tensor and no query."""
    store = {"w": w}
    facts = _C.Facts([w, torch.ones(()), given])
    numbers = options.pop("numbers", None)
    slots, none = _C.Slots([(store, "w")], []), _C.Slots([], [])
    arguments = (numbers, (torch.ones(()),), lambda like: (like.new_tensor(3.0),), 0, [], facts, _C.Facts([]), (1, 0))
    return store, _C.Repeat([], list(options.items()), slots, none, *arguments)


def test_a_call_like_the_last_is_read() -> None:
    x = torch.zeros(2, 3)
    store, last = repeat(torch.zeros(4), x, steps=3)
    store["w"] = torch.ones(4)
    w, rate, batch = last.read({"steps": 3, "more": 1}, (x,), ())
    assert w is store["w"] and batch is x and rate == 3  # no numbers: they are looked for
    other = torch.ones(2, 3)
    assert last.read({"steps": 3}, (other,), ())[2] is other
    for support, query in ([x], ()), ((x, x), ()), ((x,), (x,)), ((x[:1],), ()), ((None,), ()), (x, ()):
        assert last.read({"steps": 3}, support, query) is None
    for made in (in_inference_mode(), x.double(), torch.zeros(2, 3, requires_grad=True)):
        assert last.read({"steps": 3}, (made,), ()) is None
    for wrong in ({"steps": 4}, {}):
        assert last.read(wrong, (x,), ()) is None
    del store["w"]
    assert last.read({"steps": 3}, (x,), ()) is None


def test_a_list_that_is_being_filled_is_shown_to_nobody() -> None:
    """Code of the user's runs meanwhile, and other threads: a list with gaps ends a process that looks at it."""
    x, store = torch.zeros(2, 3), {"w": torch.zeros(4)}
    seen: list[Any] = []

    def find_hyper(like: Tensor) -> tuple[Tensor, ...]:
        seen.extend(r for r in gc.get_referrers(x) if type(r) is list)
        return (torch.ones(()),)

    facts, none = _C.Facts([store["w"], torch.ones(()), x]), _C.Slots([], [])
    slots = _C.Slots([(store, "w")], [])
    arguments = (None, (torch.ones(()),), find_hyper, 0, [], facts, _C.Facts([]), (1, 0))
    made = _C.Repeat([], [], slots, none, *arguments).read({}, (x,), ())
    assert not seen and made is not None and gc.is_tracked(made)


def test_numbers_that_hold_are_the_same_tensors() -> None:
    rule = {"lr": 0.1}
    x = torch.zeros(2)
    _, last = repeat(torch.zeros(4), x, numbers=_C.Places([("item", rule, "lr", rule["lr"])], []))
    assert last.read({}, (x,), ())[1] == 1
    rule["lr"] = 0.2
    assert last.read({}, (x,), ())[1] == 3


def test_repeat_refuses_what_makes_no_sense() -> None:
    slots, none, facts = _C.Slots([({}, "w")], []), _C.Slots([], []), _C.Facts([torch.zeros(1)])
    for like, batches, own in (0, (1, 0), facts), (1, (0, 0), facts), (0, (-1, 1), facts), (0, (0, 0), _C.Facts([])):
        with pytest.raises(ValueError, match="facts of every tensor"):
            _C.Repeat([], [], slots, none, None, (), lambda like: (), like, [], own, _C.Facts([]), batches)
    with pytest.raises(TypeError, match="weak references"):
        arguments = (None, (), lambda like: (), 0, [torch.zeros(1)], facts, _C.Facts([]), (0, 0))
        _C.Repeat([], [], slots, none, *arguments)


def ready_call() -> tuple[metafast.InnerLoop, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    inner = metafast.InnerLoop(nn.Linear(3, 2), F.mse_loss, update=metafast.SGD(lr=0.1), steps=2, backend="native")
    for _ in range(2):  # the second is like the first
        inner.meta_gradient((x, y), (x, y))
    return inner, (x, y)


def noted(inner: metafast.InnerLoop) -> Any:
    assert inner._outline is not None
    return inner._outline._lasts[0].settled.get("ready")


def test_a_call_that_is_ready_gives_what_any_call_gives() -> None:
    inner, batch = ready_call()
    assert noted(inner) is not None
    loss, gradients = inner.meta_gradient(batch, batch)
    inner(batch, batch).backward()
    plain = {name: p.grad for name, p in inner.model.named_parameters()}
    anew = metafast.InnerLoop(inner.model, F.mse_loss, update=metafast.SGD(lr=0.1), steps=2, backend="native")
    wanted, expected = anew.meta_gradient(batch, batch)
    assert torch.equal(loss, wanted) and list(gradients) == list(expected)
    for name, grad in expected.items():
        assert torch.equal(gradients[name], grad) and torch.equal(plain[name], grad)  # type: ignore[arg-type]


def test_what_stands_against_a_ready_call_is_seen() -> None:
    """Strides, signs and values that are not finite: each is as if nobody had been ready."""
    inner, (x, y) = ready_call()
    expected = inner.meta_gradient((x, y), (x, y))[1]
    for kind in ("transposed", "negated"):
        same = x.transpose(1, 2).contiguous().transpose(1, 2) if kind == "transposed" else torch._neg_view(-x)
        torch.testing.assert_close(inner.meta_gradient((same, y), (x, y))[1], expected)
        assert noted(inner) is not None
    with pytest.warns(metafast.NonFiniteWarning, match="task 1"):
        inner.meta_gradient((x, y.index_fill(0, torch.tensor([1]), float("inf"))), (x, y))
    inner.nonfinite = "raise"
    with pytest.raises(metafast.NonFiniteError, match="task 1"):
        inner.meta_gradient((x, y.index_fill(0, torch.tensor([1]), float("inf"))), (x, y))
    torch.testing.assert_close(inner.meta_gradient((x, y), (x, y))[1], expected)


def test_ready_calls_see_threads_settings_and_options() -> None:
    inner, batch = ready_call()
    expected = inner.meta_gradient(batch, batch)
    ready, tensors = noted(inner), inner._problem(batch, batch, gradient=True)[0].tensors
    assert ready.run(tensors) is not None
    with pytest.raises(ValueError, match="as many tensors"):
        ready.run([])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert ready.run(tensors) is None
        assert torch.equal(inner.meta_gradient(batch, batch)[0], expected[0])
    finally:
        torch.set_num_threads(threads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ready.run(tensors) is None
    with metafast.passes.without("clusters"):
        assert ready.run(tensors) is None
    with torch.inference_mode():
        assert ready.run(tensors) is None
        assert not inner.meta_gradient(batch, batch)[0].is_inference()
    inner.reduction = "sum"
    torch.testing.assert_close(inner.meta_gradient(batch, batch)[0], 4 * expected[0])
    inner.backend = "torch"
    torch.testing.assert_close(inner.meta_gradient(batch, batch)[0], 4 * expected[0])
    assert noted(inner) is None


def test_calls_that_take_turns_are_each_known() -> None:
    inner, (x, y) = ready_call()
    expected = inner.meta_gradient((x, y), (x, y))
    for few in (4, 3, 2) * 3:
        loss, _ = inner.meta_gradient((x[:, :few], y[:, :few]), (x, y))
        anew = metafast.InnerLoop(inner.model, F.mse_loss, update=metafast.SGD(lr=0.1), steps=2, backend="native")
        assert torch.equal(loss, anew.meta_gradient((x[:, :few], y[:, :few]), (x, y))[0])
        inner.adapt((x, y))
    assert inner._outline is not None and len(inner._outline._lasts) == 4
    assert torch.equal(inner.meta_gradient((x, y), (x, y))[0], expected[0])


def test_an_inner_loop_is_gone_with_its_last_reference() -> None:
    """What is noted of the last call holds nothing that holds it: no collector is needed."""
    inner, _ = ready_call()
    model = weakref.ref(inner.model)
    gc.collect()
    gc.disable()
    try:
        del inner
        assert model() is None
    finally:
        gc.enable()


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


def test_two_cores_have_a_round_trip_and_one_has_none() -> None:
    script = """
import os
from metafast import _C
trip, many = _C.round_trip(), len(os.sched_getaffinity(0)) > 1
assert 0 < trip < 1 if many else trip is None, trip
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
assert _C.round_trip() is None
"""
    if not hasattr(os, "sched_setaffinity"):
        trip = _C.round_trip()
        assert trip is None or trip > 0
        return
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_torch_without_views_is_read_by_attributes() -> None:
    """As torch 2.8 is, which has no table of DLPack's functions: these tests once more, without it."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no views: the tests above have shown it")
    code = "import sys, pytest, torch; del torch.Tensor.__dlpack_c_exchange_api__; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", __file__, "-k", "not without_views"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
