"""What a capture sees, and that it leaves everything as it was."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captures import F64, check, data, mlp, ordinary, run, squared, values
from torch import Tensor, nn

from metafast.capture import Unsupported, capture, capture_function, find_externs
from metafast.graph import evaluate
from metafast.normalise import normalise

# ---- what is written down -------------------------------------------------------------------------------------


def test_origins_name_the_module_and_the_users_line() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(x)

    model = nn.Sequential(mlp(), nn.Sequential(Block()))
    origins = {c.op: str(c.origin) for c in run(model, squared, data()[0]).calls}
    assert origins["aten.exp.default"].startswith("1.0: test_capture.py:")
    assert origins["aten.exp.default"].endswith("`return torch.exp(x)`")
    assert origins["aten.addmm.default"].startswith("0.2: captures.py:")


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
