"""What a capture refuses, with its line; and that it leaves everything as it was."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captures import F64, check, data, mlp, run, squared
from torch import Tensor, nn

from metafast.capture import Unsupported, capture_function
from metafast.errors import InputError, InputTypeError
from metafast.normalise import normalise


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
    "straight-through": (lambda self, h: Sign.apply(h), r"Sign in Net: test_hazards.py.*own gradient"),
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
    "hook of the graph": (_graph_hook, r"Tensor\.grad_fn in Net: test_hazards\.py:\d+ `h\.grad_fn\..*hooks"),
    "prehook of the graph": (_graph_prehook, r"Tensor\.grad_fn in Net: .*hooks"),
    "gradient edge": (_edge, r"Tensor\.grad_fn in Net: test_hazards\.py:\d+ .*hooks"),
    "hooks for saved tensors": (_packed, r"aten\.mul\.Tensor in Net: test_hazards\.py:\d+ .*hooks for saved tensors"),
    "dropout": (lambda self, h: F.dropout(h, 0.5, training=True), "draws random numbers"),
    "rand": (lambda self, h: h + torch.rand_like(h), "draws random numbers"),
    "randn": (lambda self, h: h + torch.randn(5, generator=GENERATOR, dtype=F64), "draws random numbers"),
    "random": (lambda self, h: h * random.random(), r"random in Net: test_hazards\.py:\d+ .*draws random numbers"),
    "numpy.random": (
        lambda self, h: h * float(np.random.rand()),
        r"numpy\.random in Net: test_hazards\.py:\d+ .*draws random numbers",
    ),
    "from_numpy": (lambda self, h: h + torch.from_numpy(np.ones(5)), "NumPy array"),
    "as_tensor": (lambda self, h: h + torch.as_tensor(np.ones(5)), "NumPy array"),
    "tensor(numpy)": (lambda self, h: h + torch.tensor(np.ones(5)), "NumPy array"),
    "frombuffer": (lambda self, h: h + torch.frombuffer(bytearray(40), dtype=F64), "out of sight"),
    "self.last": (_attribute, r"Net: test_hazards\.py:\d+ `self\.last = h`: .*changes its module: last"),
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
    assert re.fullmatch(r"Net: test_hazards.py:\d+ `net = Net\(.*the line to show`", caught.value.origin)


def test_an_update_rule_with_a_gradient_of_its_own() -> None:
    with pytest.raises(Unsupported, match="Sign"):
        capture_function(lambda t: {"param/w": Sign.apply(t["grad", "w"])}, {("grad", "w"): torch.ones(3)})


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


def test_hazards_under_no_grad_and_inference_mode() -> None:
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
