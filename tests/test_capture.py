"""What a capture sees and refuses, and that it leaves everything as it was."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast.capture import Trace, Unsupported, capture, capture_function, find_externs
from metafast.errors import InputError, InputTypeError
from metafast.graph import Graph, evaluate
from metafast.normalise import normalise

F64 = torch.float64


def run(model: nn.Module, objective: Callable[..., Any], *batch: Tensor, **more: Any) -> Trace:
    params = dict(model.named_parameters())
    keys = [f"support/{i}" for i in range(len(batch))]
    return capture(model, objective, params, dict(model.named_buffers()), batch, keys, **more)


def ordinary(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def squared(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().mean()


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(6, 4, dtype=F64, generator=g), torch.tensor([0, 1, 2, 0, 1, 2])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)


def values(graph: Graph, model: nn.Module, trace: Trace, batch: Any) -> dict[tuple[str, str], Tensor]:
    """The numbers for a graph's inputs, from where a backend would take them."""
    tensors = {f"param/{n}": p for n, p in model.named_parameters()}
    tensors |= {f"buffer/{n}": b for n, b in model.named_buffers()}
    tensors |= {f"support/{i}": t for i, t in enumerate(batch)} | dict(trace.externs)
    return {(i.role, i.name): tensors[f"{i.role}/{i.name}"].detach() for i in graph.inputs}


def check(model: nn.Module, objective: Callable[..., Any], *batch: Tensor) -> Graph:
    """Capture on these numbers; the graph gives the eager loss."""
    trace = run(model, objective, *batch)
    graph = normalise(trace)
    got = evaluate(graph, values(graph, model, trace, batch))
    result = objective(model, batch)
    loss = result[0] if isinstance(result, tuple) else result
    torch.testing.assert_close(got["loss"], loss.detach(), rtol=1e-12, atol=1e-12)
    assert trace.loss is not None
    torch.testing.assert_close(trace.loss, loss.detach(), rtol=1e-14, atol=0)
    return graph


# ---- what is written down -------------------------------------------------------------------------------------


def test_origins_name_the_module_and_the_users_line() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(x)

    model = nn.Sequential(mlp(), nn.Sequential(Block()))
    origins = {c.op: str(c.origin) for c in run(model, squared, data()[0]).calls}
    assert origins["aten.exp.default"].startswith("1.0: test_capture.py:")
    assert origins["aten.exp.default"].endswith("`return torch.exp(x)`")
    assert origins["aten.addmm.default"].startswith("0.2: test_capture.py:")


def test_gradients_are_those_of_the_eager_loss() -> None:
    model, (x, y) = mlp(), data()
    trace = run(model, ordinary, x, y)
    expected = torch.autograd.grad(ordinary(model, (x, y)), list(model.parameters()))
    for (name, _), grad in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(trace.gradients[f"param/{name}"], grad)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "window", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}]
)
def test_large_images_are_pooled_to_the_same_bits(window: dict[str, Any], dtype: torch.dtype) -> None:
    """Equal values, both zeros, NaN and infinities among them; several parts, of which the last has one image."""
    x = torch.randint(-2, 3, (19, 32, 29, 30), generator=torch.Generator().manual_seed(0)).to(dtype)
    for number, value in enumerate((-0.0, float("nan"), -float("inf"), float("inf"))):
        x.view(-1)[number::101] = value
    pooled: list[Any] = []

    def objective(model: nn.Module, batch: Any) -> Tensor:
        made = F.max_pool2d(batch[0] * model.weight, **window, return_indices=True)
        pooled.append(made)
        return made[0].nan_to_num().mean()

    model = nn.LayerNorm(30, elementwise_affine=True, dtype=dtype)
    trace = run(model, objective, x)
    assert any("max_pool2d_with_indices" in call.op for call in trace.calls)
    objective(model, (x,)).backward()
    (values, indices), (same_values, same_indices) = pooled
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.equal(values.detach().view(bits), same_values.detach().view(bits))
    assert torch.equal(indices, same_indices)
    assert [values.stride(), indices.stride()] == [same_values.stride(), same_indices.stride()]
    torch.testing.assert_close(trace.gradients["param/weight"], model.weight.grad, rtol=0, atol=0, equal_nan=True)


def test_data_that_requires_grad_has_a_gradient() -> None:
    model, (x, y) = mlp(), data()
    trace = run(model, ordinary, x.requires_grad_(), y)
    assert set(trace.gradients) == {"support/0", *(f"param/{n}" for n, _ in model.named_parameters())}
    assert x.grad is None


def test_tied_parameters_are_one_input_under_the_first_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).to(F64)
    model[2].weight = model[0].weight
    graph = check(model, squared, data()[0])
    assert [(i.role, i.name) for i in graph.inputs if i.role == "param"] == [("param", "0.weight")]
    assert model[2].weight is model[0].weight


def test_a_module_tied_as_a_whole() -> None:
    layer = nn.Linear(4, 4).to(F64)
    graph = check(nn.Sequential(layer, nn.Tanh(), layer), squared, data()[0])
    assert {i.name for i in graph.inputs if i.role == "param"} == {"0.weight", "0.bias"}


def test_other_parameters_than_the_models_own() -> None:
    model, (x, y) = mlp(), data()
    other = {n: p.detach() + 1 for n, p in model.named_parameters()}
    trace = capture(model, ordinary, other, {}, (x, y), ["support/0", "support/1"])
    expected = torch.func.functional_call(model, other, (x,))
    assert trace.loss is not None
    torch.testing.assert_close(trace.loss, F.cross_entropy(expected, y))


def test_outputs_and_nested_batches() -> None:
    model, (x, y) = mlp(), data()

    def objective(model: nn.Module, batch: Any) -> Any:
        logits = model(batch["input"][0])
        return F.cross_entropy(logits, batch["target"]), {"logits": logits, "x": batch["input"][0]}

    batch = {"input": [x], "target": y}
    trace = capture(model, objective, dict(model.named_parameters()), {}, batch, ["support/0", "support/1"])
    graph = normalise(trace)
    got = evaluate(graph, values(graph, model, trace, (x, y)))
    torch.testing.assert_close(got["output/0"], model(x).detach())
    torch.testing.assert_close(got["output/1"], x)
    assert set(normalise(trace, outputs=False).outputs) == {"loss"}


def test_unsupported_outputs_do_not_matter_where_only_the_loss_is_wanted() -> None:
    model, (x, y) = mlp(), data()
    trace = run(model, lambda m, b: (ordinary(m, b), m(b[0]).argsort(1)), x, y)
    normalise(trace, outputs=False)
    with pytest.raises(Unsupported, match="sort"):
        normalise(trace)


def test_frozen_parameters_as_class_weights_fall_back() -> None:
    model, (x, y) = mlp(), data()
    model.register_parameter("w", nn.Parameter(torch.ones(3, dtype=F64), requires_grad=False))
    with pytest.raises(Unsupported, match="not differentiable"):
        run(model, lambda m, b: F.cross_entropy(nn.Sequential.forward(m, b[0]), b[1], m.w), x, y)


# ---- tensors found outside ------------------------------------------------------------------------------------


def test_closures_and_attributes_become_externs() -> None:
    model, (x, y) = mlp(), data()
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    model.shift = torch.ones(4, dtype=F64, requires_grad=True)

    def objective(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0] + model.shift), batch[1], weight)

    trace = run(model, objective, x, y)
    assert [t is s for (_, t), s in zip(trace.externs, (model.shift, weight), strict=True)] == [True, True]
    assert all(key.startswith("extern/") for key, _ in trace.externs)
    grads = trace.gradients
    key = trace.externs[0][0]
    expected = torch.autograd.grad(objective(model, (x, y)), model.shift)[0]
    torch.testing.assert_close(grads[key], expected)
    check(model, objective, x, y)
    found = find_externs(model, objective, dict(model.named_parameters()), {}, (x, y))
    assert [id(t) for t in found] == [id(model.shift), id(weight)]


def test_known_externs_keep_their_key() -> None:
    model, (x, y) = mlp(), data()
    shift = torch.ones(4, dtype=F64, requires_grad=True)
    trace = run(model, lambda m, b: ordinary(m, (b[0] + shift, b[1])), x, y, known={"extern/0": shift})
    assert [key for key, _ in trace.externs] == ["extern/0"]
    graph = normalise(trace)
    assert graph.input("extern", "0") is not None


def test_update_rules_find_externs_too() -> None:
    gain = torch.ones((), dtype=F64, requires_grad=True)
    inputs = {("param", "w"): torch.ones(3, dtype=F64), ("grad", "w"): torch.ones(3, dtype=F64)}
    trace = capture_function(
        lambda t: {"param/w": t["param", "w"] - gain * t["grad", "w"]}, inputs, known={"extern/0": gain}
    )
    graph = normalise(trace)
    assert {(i.role, i.name) for i in graph.inputs} == {("param", "w"), ("grad", "w"), ("extern", "0")}


def test_externs_are_found_whatever_else_the_loss_does() -> None:
    model, (x, y) = mlp(), data()
    late = torch.ones(3, dtype=F64, requires_grad=True)
    counter = torch.zeros((), dtype=F64)

    def objective(model: nn.Module, batch: Any) -> Tensor:
        h = F.dropout(model(batch[0]), 0.5)
        if h.sum().item() > 0:
            h = h.cumsum(0)
        counter.add_(1)
        return F.cross_entropy(h * late, batch[1])

    found = find_externs(model, objective, dict(model.named_parameters()), {}, (x, y))
    assert [id(t) for t in found] == [id(counter), id(late)]
    assert counter.item() == 0


# ---- running statistics ---------------------------------------------------------------------------------------


def conv(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, **options)
    return nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).to(F64)


def image() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(5, 2, 5, 5, dtype=F64, generator=g), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_in_training_gives_its_statistics(momentum: float | None) -> None:
    model, (x, y) = conv(momentum=momentum), image()
    model(x)  # the lazy layer
    before = {n: b.clone() for n, b in model.named_buffers()}
    trace = run(model, ordinary, x, y)
    assert {n: b.tolist() for n, b in model.named_buffers()} == {n: b.tolist() for n, b in before.items()}
    assert [(s.path, s.output, s.momentum, s.count) for s in trace.stats] == [("1", "stat/1/0", momentum, 45)]
    graph = normalise(trace)
    assert not [i for i in graph.inputs if i.role == "buffer"]
    got = evaluate(graph, values(graph, model, trace, (x, y)))
    h = model[0](x).detach()
    torch.testing.assert_close(got["stat/1/0/mean"], h.mean((0, 2, 3)))
    torch.testing.assert_close(got["stat/1/0/var"], h.var((0, 2, 3), correction=0))
    torch.testing.assert_close(got["loss"], ordinary(model, (x, y)).detach())


def test_batch_norm_called_twice_gives_two_records() -> None:
    norm = nn.BatchNorm1d(4).to(F64)
    model = nn.Sequential(norm, nn.Linear(4, 4).to(F64), norm)
    trace = run(model, squared, data()[0])
    assert [s.output for s in trace.stats] == ["stat/0/0", "stat/0/1"]
    assert {"stat/0/0/mean", "stat/0/1/var"} <= set(normalise(trace).outputs)


def test_batch_norm_in_evaluation_reads_its_buffers() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).to(F64)
    model(data()[0])
    graph = check(model.eval(), squared, data()[0])
    assert {i.name for i in graph.inputs if i.role == "buffer"} == {"0.running_mean", "0.running_var"}


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4, affine=False)])
def test_batch_norm_without_parts(layer: nn.Module) -> None:
    check(nn.Sequential(layer, nn.Linear(4, 3)).to(F64), squared, data()[0])


def test_statistics_that_are_read_are_told_from_those_that_are_updated() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).to(F64)
    both = {"buffer/0.running_mean", "buffer/0.running_var"}
    all_ = both | {"buffer/0.num_batches_tracked"}
    plain = run(model, squared, data()[0])
    assert (set(plain.reads), plain.updates) == (set(), all_)
    read = run(model, lambda m, b: squared(m, b) + m[0].running_mean.sum(), data()[0])
    assert [str(op) for op, _ in read.reads.values()] == ["aten.sum.default"]
    assert (set(read.reads), read.updates) == ({"buffer/0.running_mean"}, all_)
    still = run(model.eval(), squared, data()[0])
    assert (set(still.reads), set(still.updates)) == (both, set())


# ---- hazards --------------------------------------------------------------------------------------------------


class Sign(torch.autograd.Function):
    """The straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


class Reverse(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return -g


class Nothing(Reverse):
    """Gradient reversal whose forward calls no op at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


class Split(torch.autograd.Function):
    """A forward that sees no context."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


class Wrapped(Sign):
    """A forward in another one."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()


class Outer(Sign):
    """A forward that applies another function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Sign.apply(x) + 1


class InPlace(Sign):
    """A forward that returns its own argument, changed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.sign_()


class Net(nn.Module):
    """A small net around one function of its hidden values."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 5).to(F64)
        self.register_buffer("count", torch.zeros((), dtype=F64))
        self.f = f
        self.history: list[Any] = []
        self.aliases = (self.layer.bias,)
        self.note = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, self.layer(x))


def _attribute(self: Any, h: Tensor) -> Tensor:
    self.last = h
    return h


def _number(self: Any, h: Tensor) -> Tensor:
    self.note += 1
    return h


def _list(self: Any, h: Tensor) -> Tensor:
    self.history.append(h)
    return h


def _hook(self: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda g: g * 2)
    return h


def _graph_hook(self: Any, h: Tensor) -> Tensor:
    h.grad_fn.register_hook(lambda inputs, outputs: tuple(2 * g for g in inputs))  # type: ignore[union-attr]
    return h


def _graph_prehook(self: Any, h: Tensor) -> Tensor:
    h.grad_fn.register_prehook(lambda outputs: tuple(2 * g for g in outputs))  # type: ignore[union-attr]
    return h


def _edge(self: Any, h: Tensor) -> Tensor:
    torch.autograd.graph.register_multi_grad_hook([h], lambda grads: None)
    return h


def _packed(self: Any, h: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: 2 * t, lambda t: t):
        return h * h


def _clip(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.layer.weight.clamp_(-0.1, 0.1)
    return h


def _grad(self: Any, h: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(h.square().sum(), self.layer.weight, create_graph=True)
    return h + g.sum()


def _swallowed(self: Any, h: Tensor) -> Tensor:
    try:
        return h if h.sum() > 0 else h * 2
    except Exception:
        return h


def _evaluate(self: Any, h: Tensor) -> Tensor:
    self.eval()
    return h


def _new_weight(self: Any, h: Tensor) -> Tensor:
    self.layer.weight = nn.Parameter(self.layer.weight.detach() * 2)
    return h


OUTSIDE = torch.zeros(5, dtype=F64)
GENERATOR = torch.Generator()
HAZARDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "straight-through": (lambda self, h: Sign.apply(h), r"Sign in Net: test_capture.py.*own gradient"),
    "gradient reversal": (lambda self, h: Reverse.apply(h), r"Reverse in .*own gradient"),
    "tensor hook": (_hook, r"Tensor\.register_hook in Net: .*hook"),
    ".data": (lambda self, h: h.data * h, r"Tensor\.data .*past autograd"),
    ".data of a parameter": (lambda self, h: h * self.layer.weight.data.sum(), r"Tensor\.data .*past autograd"),
    "Parameter(h)": (lambda self, h: nn.Parameter(h) * 1, "past autograd"),
    "autograd.grad": (_grad, "gradient is taken inside the loss"),
    "func.grad": (lambda self, h: torch.func.grad(lambda v: v.square().sum())(h), "gradient is taken inside the loss"),
    "item": (lambda self, h: h * h.sum().item(), "_local_scalar_dense"),
    "branch": (lambda self, h: h if h.sum() > 0 else -h, "steers Python"),
    "swallowed branch": (_swallowed, "steers Python"),
    "tolist": (lambda self, h: h * sum(h.detach().sum(1).tolist()), r"Tensor\.tolist"),
    "numpy": (lambda self, h: h * float(h.detach().numpy().sum()), r"Tensor\.numpy"),
    "asarray": (lambda self, h: h * float(np.asarray(h.detach()).sum()), "leave for Python"),
    "equal": (lambda self, h: h * torch.equal(h, h * 1), "aten.equal"),
    "allclose": (lambda self, h: h * torch.allclose(h, h * 1), "aten"),
    "nonzero": (lambda self, h: h * h.nonzero().shape[0], "aten.nonzero"),
    "masked_select": (lambda self, h: h.masked_select(h > 0), "aten.masked_select"),
    "boolean index": (lambda self, h: h[h > 0], "boolean mask"),
    "unique": (lambda self, h: h * len(h.unique()), "aten._unique2"),
    "hook of the graph": (_graph_hook, r"Tensor\.grad_fn in Net: test_capture\.py:\d+ `h\.grad_fn\..*hooks"),
    "prehook of the graph": (_graph_prehook, r"Tensor\.grad_fn in Net: .*hooks"),
    "gradient edge": (_edge, r"Tensor\.grad_fn in Net: test_capture\.py:\d+ .*hooks"),
    "hooks for saved tensors": (_packed, r"aten\.mul\.Tensor in Net: test_capture\.py:\d+ .*hooks for saved tensors"),
    "dropout": (lambda self, h: F.dropout(h, 0.5, training=True), "draws random numbers"),
    "rand": (lambda self, h: h + torch.rand_like(h), "draws random numbers"),
    "randn": (lambda self, h: h + torch.randn(5, generator=GENERATOR, dtype=F64), "draws random numbers"),
    "random": (lambda self, h: h * random.random(), r"random in Net: test_capture\.py:\d+ .*draws random numbers"),
    "numpy.random": (
        lambda self, h: h * float(np.random.rand()),
        r"numpy\.random in Net: test_capture\.py:\d+ .*draws random numbers",
    ),
    "from_numpy": (lambda self, h: h + torch.from_numpy(np.ones(5)), "NumPy array"),
    "as_tensor": (lambda self, h: h + torch.as_tensor(np.ones(5)), "NumPy array"),
    "tensor(numpy)": (lambda self, h: h + torch.tensor(np.ones(5)), "NumPy array"),
    "frombuffer": (lambda self, h: h + torch.frombuffer(bytearray(40), dtype=F64), "out of sight"),
    "self.last": (_attribute, r"Net: test_capture\.py:\d+ `self\.last = h`: .*changes its module: last"),
    "self.note": (_number, r"`self\.note \+= 1`: .*changes its module: note"),
    "self.history": (_list, r"`self\.history\.append\(h\)`: .*changes its module: history"),
    "self.eval": (_evaluate, r"`self\.eval\(\)`: .*changes its module: training"),
    "new parameter": (_new_weight, "changes its module: layer.weight"),
    "clipped weights": (_clip, "changes parameter layer.weight in place"),
    "counter": (lambda self, h: h + self.count.add_(1), "changes buffer count in place"),
    "outer tensor": (lambda self, h: h + OUTSIDE.add_(1), "changes a tensor found outside in place"),
    "tensor of tensors": (lambda self, h: h * torch.tensor([[1.0, h.sum()]]).sum(), r"torch\.tensor in Net.*frozen"),
    "as_tensor of tensors": (lambda self, h: h * torch.as_tensor((h.sum(), h.std())).sum(), "would be frozen"),
    "new_tensor of tensors": (lambda self, h: h * h.new_tensor([h.sum()]), "would be frozen"),
    "asarray of tensors": (lambda self, h: h * torch.asarray([h.sum()]), "would be frozen"),
    "new of tensors": (lambda self, h: h * h.new([h.sum()]), "would be frozen"),
    "DoubleTensor of tensors": (lambda self, h: h * torch.DoubleTensor([1.0, h.sum()]).sum(), "leave for Python"),
    "list of tensors as index": (lambda self, h: h[:, [[h[0].argmax(), 0]]], "would be frozen"),
    "long list of tensors as index": (lambda self, h: h[:, [h[0].argmax()] * 40], "would be frozen"),
    "str": (lambda self, h: h * len(str(h)), "leave for Python"),
    "sparse": (lambda self, h: h.to_sparse().to_dense(), "aten._to_sparse"),
    "parameter by another way": (lambda self, h: h + self.aliases[0], "past its module's attribute"),
    "half": (lambda self, h: h.half().double(), "float16"),
    "float": (lambda self, h: h + (h.float() * 2).sum(), "float32"),
    "complex": (lambda self, h: h + torch.fft.fft(h).real, "aten._fft"),
}


@pytest.mark.parametrize("function", [Sign, Reverse, Nothing, Split, Wrapped, Outer, InPlace])
def test_a_custom_gradient_is_shown_where_it_is_applied(function: Any) -> None:
    apply = function.apply
    net = Net(lambda self, h: apply(h * 2))  # the line to show
    with pytest.raises(Unsupported) as caught:
        run(net, squared, data()[0])
    assert caught.value.op == function.__name__
    assert re.fullmatch(r"Net: test_capture.py:\d+ `net = Net\(.*the line to show`", caught.value.origin)


@pytest.mark.parametrize("name", HAZARDS)
def test_hazards_are_refused_and_nothing_is_changed(name: str) -> None:
    f, words = HAZARDS[name]
    model, x = Net(f), data()[0]
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    before = {k: v.clone() for k, v in (*params.items(), *buffers.items())}
    attributes, history = dict(model.__dict__), list(model.history)
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Unsupported, match=words):
            normalise(run(model, squared, x))
    assert dict(model.named_parameters()).keys() == params.keys()
    assert all(v is params[k] for k, v in model.named_parameters())
    assert all(v is buffers[k] for k, v in model.named_buffers())
    assert all(torch.equal(v, before[k]) for k, v in (*params.items(), *buffers.items()))
    assert all(p.grad is None for p in params.values())
    assert dict(model.__dict__) == attributes
    assert model.history == history
    assert torch.equal(OUTSIDE, torch.zeros(5, dtype=F64))
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert np.random.get_state()[1].tolist() == random_states[2]


def test_batches_are_not_written() -> None:
    x = data()[0]
    before = x.clone()
    with pytest.raises(Unsupported, match=r"changes tensor support/0 of the batch in place"):
        run(mlp(), lambda m, b: m(b[0].add_(1)).mean(), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_module_backward_hooks_are_refused(register: str) -> None:
    model = mlp()
    handle = getattr(model[1], register)(lambda *_: None)
    with pytest.raises(Unsupported, match="backward hook in 1"):
        run(model, squared, data()[0])
    handle.remove()
    run(model, squared, data()[0])


def test_global_backward_hooks_are_refused() -> None:
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        with pytest.raises(Unsupported, match="global backward hook"):
            run(mlp(), squared, data()[0])
    finally:
        handle.remove()


def test_forward_hooks_are_part_of_the_forward() -> None:
    model = mlp()
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    check(model, squared, data()[0])


def test_autocast_is_refused() -> None:
    with torch.autocast("cpu"), pytest.raises(Unsupported, match="autocast"):
        run(mlp(), squared, data()[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(Unsupported, match=str(dtype)):
        run(mlp().to(dtype), squared, data()[0].to(dtype))


def test_recurrent_nets_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"changes its module: _flat_weight"):
        run(nn.RNN(4, 3).to(F64), lambda m, b: m(b[0])[0].mean(), data()[0])


def test_losses_that_are_no_scalars() -> None:
    x = data()[0]
    with pytest.raises(InputError, match=r"objective.*shape \(6, 3\).*scalar"):
        run(mlp(), lambda m, b: m(b[0]), x)
    with pytest.raises(InputTypeError, match=r"objective.*float.*scalar"):
        run(mlp(), lambda m, b: 1.0, x)
    with pytest.raises(InputTypeError, match=r"objective.*int64.*float32"):
        run(mlp(), lambda m, b: (m(b[0]) > 0).sum(), x)


def test_the_models_own_errors_pass_through() -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(model, squared, torch.randn(6, 7, dtype=F64))
    assert isinstance(model[0].weight, nn.Parameter)


def test_what_is_not_a_hazard() -> None:
    def f(self: Any, h: Tensor) -> Tensor:
        assert h.requires_grad and h.shape[1] == 5 and len(h) == 6 and h.dtype == F64
        scale = torch.tensor([0.5, 2.0])
        if scale.max() > 1 and bool(torch.eye(2).sum() == 2):
            h = h * scale.tolist()[0] * torch.tensor([scale[0], 1.0]).sum() + h[[0, 1, 2, 3, 4, 5]]
        h = F.dropout(h, 0.5, training=False) + F.dropout(h, 0.0, training=True)
        h.retain_grad()
        h.detach().argmax(1)
        return torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False)

    model = Net(f)
    check(model, squared, data()[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of torch.jit
def test_forward_mode_inside_the_loss() -> None:
    def objective(model: nn.Module, batch: Any) -> Tensor:
        out, tangent = torch.func.jvp(model, (batch[0],), (torch.ones_like(batch[0]),))
        return (out + tangent).square().mean()

    check(nn.Linear(4, 3).to(F64), objective, data()[0])


def test_parametrisations_are_ordinary_code() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3).to(F64))
    check(model, squared, data()[0])


def test_capture_under_no_grad_and_inference_mode() -> None:
    model, x = mlp(), data()[0]
    with torch.no_grad():
        assert run(model, squared, x).gradients["param/0.weight"] is not None
    with torch.inference_mode():
        assert run(model, squared, x).gradients["param/0.weight"] is not None


def test_stochastic_layers_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.RReLU(), nn.AlphaDropout(0.2)).to(F64)
    check(model.eval(), squared, data()[0])
    with pytest.raises(Unsupported, match=r"in 1: .*draws random numbers"):
        run(model.train(), squared, data()[0])


# ---- update rules ---------------------------------------------------------------------------------------------


def test_an_update_rule() -> None:
    def adam(t: dict[tuple[str, str], Tensor]) -> dict[str, Tensor]:
        p, g, m, v, k = t["param", "w"], t["grad", "w"], t["state", "0"], t["state", "1"], t["step", "k"]
        m = 0.9 * m + 0.1 * g
        v = 0.99 * v + 0.01 * g * g
        step = (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.99 ** (k + 1))).sqrt() + 1e-8)
        return {"param/w": p - t["hyper", "lr"] * step, "state/0": m, "state/1": v}

    names = [("param", "w"), ("grad", "w"), ("state", "0"), ("state", "1")]
    inputs = {n: torch.rand(3, dtype=F64) + 0.1 for n in names}
    inputs |= {("step", "k"): torch.zeros((), dtype=F64), ("hyper", "lr"): torch.tensor(0.1, dtype=F64)}
    graph = normalise(capture_function(adam, inputs))
    inputs["step", "k"] = torch.tensor(3.0, dtype=F64)
    for name, want in adam(inputs).items():
        torch.testing.assert_close(evaluate(graph, inputs)[name], want)


def test_an_update_rule_with_a_gradient_of_its_own() -> None:
    with pytest.raises(Unsupported, match="Sign"):
        capture_function(lambda t: {"param/w": Sign.apply(t["grad", "w"])}, {("grad", "w"): torch.ones(3)})


def test_an_update_rule_must_return_tensors() -> None:
    with pytest.raises(Unsupported, match="float"):
        capture_function(lambda t: {"param/w": 1.0}, {("grad", "w"): torch.ones(3)})  # type: ignore[dict-item]


# ---- cost -----------------------------------------------------------------------------------------------------

COLD = """
import sys, torch, torch.nn as nn, torch.nn.functional as F
torch.set_num_threads(1)
from metafast.capture import capture
from metafast.normalise import normalise
block = lambda i: [nn.Conv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
model = nn.Sequential(*block(1), *block(8), nn.Flatten(), nn.Linear(8 * 49, 5))
x, y = torch.randn(5, 1, 28, 28), torch.arange(5)
trace = capture(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), dict(model.named_parameters()),
                dict(model.named_buffers()), (x, y), ["support/0", "support/1"])
normalise(trace), trace.gradients
print([m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor", "sympy"))])
"""


def test_a_cold_capture_does_not_import_torchs_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
