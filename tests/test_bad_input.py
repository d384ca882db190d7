"""Every message: place, got, expected, way out; and the model, its gradients and the process are as before."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from loops import TASKS, WAYS, backends, close, data, expected, loop, minimised, mlp
from torch import Tensor, nn

import metafast
from metafast.errors import (
    BackendError,
    InputError,
    InputTypeError,
    LabelError,
    NonFiniteError,
    NonFiniteWarning,
    TaskError,
)
from metafast.outline import require_labels

pytestmark = pytest.mark.filterwarnings("ignore::metafast.FallbackWarning")


def refused(inner: metafast.InnerLoop, support: Any, query: Any, error: type[Exception], text: str) -> None:
    """The fused call and meta_gradient raise the same, and nothing changed; a right call still works."""
    before = copy.deepcopy(inner.state_dict())
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for call in (inner, inner.meta_gradient):
        with pytest.raises(error, match=text) as caught:
            call(support, query)
        words = str(caught.value)
        assert "got" in words and "expected" in words and ";" in words
    after = inner.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in inner.parameters())
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def still_right(inner: metafast.InnerLoop) -> None:
    close(inner(data(0), data(1)), expected(inner.model, data(0), data(1)).losses.mean())


# ---- batches -------------------------------------------------------------------------------------------------


@backends
def test_wrong_shapes_name_the_task_the_step_and_the_shapes(backend: str) -> None:
    inner = loop(mlp(), backend)
    (x, y), query = data(0), data(1)
    refused(inner, (x[..., :5], y), query, InputError, r"task 0, inner step 0: .*\(5, 5\) float64, \(5,\) int64")
    refused(inner, (x, y), (query[0][..., :5], query[1]), InputError, r"task 0, query loss: .*\(5, 5\)")
    refused(inner, (x, y[:, :4]), query, InputError, r"task 0, inner step 0: ")
    still_right(inner)


@backends
def test_missing_task_dimension(backend: str) -> None:
    inner = loop(mlp(), backend)
    (x, y), query = data(0), data(1)
    refused(inner, (x[0], y[0]), query, InputError, r"support: got a tensor of shape \(5,\).*\(T, N, ...\)")
    refused(inner, (x, y), (query[0], query[1][0]), InputError, r"query: .*unsqueeze\(0\)")
    refused(inner, (x, torch.tensor(0)), query, InputError, r"support")
    still_right(inner)


@backends
def test_differing_numbers_of_tasks(backend: str) -> None:
    inner = loop(mlp(), backend)
    support, (x, y) = data(0), data(1)
    refused(inner, support, (x[:2], y[:2]), InputError, r"query\[0\]: got shape \(2, 5, 6\): 2 tasks, expected 3 tasks")
    refused(inner, (support[0], support[1][:2]), (x, y), InputError, r"support\[1\]: got shape \(2, 5\)")


@backends
def test_no_task(backend: str) -> None:
    inner = loop(mlp(), backend)
    support, query = (tuple(t[:0] for t in batch) for batch in (data(0), data(1)))
    refused(inner, support, query, InputError, "empty|no task")
    by_objective = loop(mlp(), backend, None, objective=lambda m, b: m(b[0]).sum())
    refused(by_objective, support, query, InputError, "no task.*T >= 1")


@backends
def test_empty_support_and_query(backend: str) -> None:
    inner = loop(mlp(), backend)
    support, query = data(0), data(1)
    empty = query[0][:, :0], query[1][:, :0]
    refused(inner, support, empty, InputError, r"query: got an empty tensor of shape \(3, 0, 6\)")
    refused(inner, empty, query, InputError, "support: got an empty tensor")


class Pair(NamedTuple):
    x: Any
    y: Any


class Triple(NamedTuple):
    x: Any
    y: Any
    weight: Any


@backends
def test_a_named_tuple_of_two_is_a_pair(backend: str) -> None:
    inner, (support, query) = loop(mlp(), backend), (data(0), data(1))
    close(inner(Pair(*support), Pair(*query)), expected(inner.model, support, query).losses.mean())
    refused(inner, Pair(support, support[1]), query, TaskError, "task 0, inner step 0")


@backends
def test_a_batch_of_another_nesting(backend: str) -> None:
    inner = loop(mlp(), backend)
    (x, y), query = data(0), data(1)
    text = r"support: got a batch of nesting \{'input': \*, 'target': \*\}, expected a pair \(x, y\); pass objective="
    refused(inner, {"input": x, "target": y}, query, InputError, text)
    refused(inner, (x, y, y), query, InputError, r"nesting \(\*, \*, \*\), expected a pair")
    refused(inner, Triple(x, y, y), query, InputError, r"nesting Triple\(x=\*, y=\*, weight=\*\), expected a pair")
    refused(inner, (x, y), x, InputError, "query: .*expected a pair")
    refused(inner, (x.numpy(), y), query, InputTypeError, r"support\[0\]: got ndarray, expected a tensor")
    refused(inner, (), query, InputError, "support: got no tensor")
    by_objective = loop(mlp(), backend, None, objective=lambda m, b: m(b["x"][0]).sum())
    refused(by_objective, {"x": [x, 3.0]}, {"x": [x, y]}, InputTypeError, r"support\['x'\]\[1\]: got float")
    refused(by_objective, {"x": [x, y]}, {"x": [x, y[:2]]}, InputError, r"query\['x'\]\[1\]: .*2 tasks, expected 3")


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    inner = loop(mlp(), backend)
    (x, y), query = data(0), data(1)
    refused(inner, (x.to(dtype), y), query, InputTypeError, rf"support\[0\]: got {dtype}, expected float32, float64")
    with pytest.raises(InputTypeError, match=f"parameter 0.weight: got {dtype}, expected float32 or float64"):
        loop(mlp().to(dtype), backend)
    model = mlp()
    inner = loop(model, backend)
    model.to(dtype)
    with pytest.raises(InputTypeError, match=f"parameter 0.weight: got {dtype}"):
        inner((x, y), query)


@backends
def test_a_mix_of_devices(backend: str) -> None:
    inner = loop(mlp(), backend)
    (x, y), query = data(0), data(1)
    text = r'support\[0\]: got device meta, expected the model\'s, cpu; use .to\("cpu"\)'
    refused(inner, (x.to("meta"), y), query, InputTypeError, text)


@backends
def test_a_mix_of_dtypes(backend: str) -> None:
    (x, y), query = data(0), data(1)
    refused(loop(mlp(), backend), (x.float(), y), query, InputError, "task 0, inner step 0: .*float32")


@backends
@pytest.mark.parametrize("bad", [-1, WAYS, 1000])
def test_labels_out_of_range(backend: str, bad: int) -> None:
    inner = loop(mlp(), backend)
    support, (x, y) = data(0), data(1)
    y = y.clone()
    y[2, 3] = bad
    refused(inner, support, (x, y), LabelError, rf"task 2.*label.*out of range.*[\[ ]{bad}\b")
    refused(inner, (x, y), support, LabelError, rf"task 2.*label.*out of range.*[\[ ]{bad}\b")
    with pytest.raises(LabelError, match="task 2"):
        inner.adapt((x, y))
    still_right(inner)


@backends
@pytest.mark.parametrize("bad", [-100, -1, WAYS, 1000])
@pytest.mark.parametrize(
    "loss",
    [
        lambda output, target: F.cross_entropy(output, target - target[0] + target[0], ignore_index=7),
        lambda output, target: F.mse_loss(output, F.one_hot(target, WAYS).to(output.dtype)),
        lambda output, target: -output.log_softmax(1).gather(1, (2 * target - target)[:, None]).mean(),
    ],
    ids=["computed", "one_hot", "gathered"],
)
def test_labels_that_a_later_batch_computes_out_of_range(backend: str, loss: Any, bad: int) -> None:
    """Made once the plan is: not what the first-use check sees."""
    inner = loop(mlp(), backend, loss)
    support, (x, y) = data(0), data(1)
    inner(support, (x, y))
    y = y.clone()
    y[2, 3] = bad
    refused(inner, support, (x, y), InputError, "task 2, query")


@backends
def test_an_index_below_zero_counts_from_the_end(backend: str) -> None:
    """As PyTorch has it: of an index, not of a label."""
    support, (x, y) = data(0), data(1)
    pick = lambda output, target: -output.log_softmax(1)[torch.arange(len(target)), target].mean()  # noqa: E731
    inner = loop(mlp(), backend, pick)
    with warnings.catch_warnings():
        warnings.simplefilter("error", metafast.FallbackWarning)
        close(inner(support, (x, y - WAYS)), inner(support, (x, y)))
    for bad in (WAYS, -WAYS - 1):
        wrong = y.clone()
        wrong[2, 3] = bad
        refused(inner, support, (x, wrong), InputError, rf"task 2, query.*{bad}\b")


def test_the_check_of_labels_that_stands_before_a_gpu() -> None:
    output, target = torch.zeros(3, WAYS), torch.tensor([0, WAYS, -100])
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(), F.nll_loss, nn.NLLLoss()):
        with pytest.raises(LabelError, match=r"got label 4, expected 0 .. 3"):
            require_labels(loss, output, target)
        require_labels(loss, output, target[[0, 2]])
    require_labels(nn.CrossEntropyLoss(ignore_index=WAYS), output, target[:2])
    require_labels(F.mse_loss, output, target)
    require_labels(F.cross_entropy, output, torch.full((3, WAYS), 9.0))


@backends
def test_ignored_labels_are_not_out_of_range(backend: str) -> None:
    support, (x, y) = data(0), data(1)
    y = y.clone()
    y[1, 2] = -100
    close(loop(mlp(), backend)(support, (x, y)), expected(mlp(), support, (x, y)).losses.mean())


def test_inputs_of_fast_weights() -> None:
    x, y = data(0)
    fast = loop(mlp()).adapt((x, y))
    with pytest.raises(InputError, match="inputs of FastWeights: got 2 tasks, expected 3 tasks"):
        fast(x[:2])
    with pytest.raises(InputTypeError, match="got device meta"):
        fast(x.to("meta"))
    for wrong in (x[..., :5], x.float()):
        with pytest.raises(TaskError, match=r"task 0, FastWeights: RuntimeError: .*got a task's tensors \(5, [56]\)"):
            fast(wrong)


# ---- losses --------------------------------------------------------------------------------------------------


@backends
def test_a_loss_that_is_not_a_scalar(backend: str) -> None:
    def per_example(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none")

    support, query = data(0), data(1)
    inner = loop(mlp(), backend, per_example)
    refused(inner, support, query, InputError, r"task 0, inner step 0: loss: got shape \(5,\), expected a scalar")
    inner = loop(mlp(), backend, query_loss=per_example)
    refused(inner, support, query, InputError, r"task 0, query loss: loss: got shape \(5,\)")
    inner = loop(mlp(), backend, lambda output, target: output.argmax())
    refused(inner, support, query, InputTypeError, "loss: got torch.int64, expected a floating-point")
    inner = loop(mlp(), backend, lambda output, target: 1.0)
    refused(inner, support, query, InputTypeError, "loss: got float, expected a 0-dim tensor")


@backends
def test_outputs_that_are_not_there(backend: str) -> None:
    inner = loop(mlp(), backend, None, objective=lambda m, b: F.cross_entropy(m(b[0]), b[1]), return_outputs=True)
    refused(inner, data(0), data(1), InputTypeError, r"got a loss alone, expected \(loss, outputs\)")
    with torch.no_grad(), pytest.raises(InputTypeError, match=r"got a loss alone, expected \(loss, outputs\)"):
        inner(data(0), data(1))


@backends
@pytest.mark.parametrize("outputs", [(), 3, {"a": None}, {"a": (), "b": 1.0}], ids=str)
def test_outputs_that_are_no_tensors(backend: str, outputs: Any) -> None:
    def objective(m: nn.Module, b: Any) -> Any:
        return F.cross_entropy(m(b[0]), b[1]), outputs

    for context in (torch.enable_grad, torch.no_grad):
        inner = loop(mlp(), backend, None, objective=objective, return_outputs=True)
        with context():
            text = "outputs of the query objective: got .*expected tensors"
            with pytest.raises(InputTypeError, match=text):
                inner(data(0), data(1))


@backends
@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda p, g: p.float(), r"update rule: got \(7, 6\) torch.float32 for 0.weight, expected \(7, 6\) torch.f"),
        (lambda p, g: p.sum(), r"update rule: got \(\) torch.float64 for 0.weight"),
        (lambda p, g: None, "update rule: got a NoneType for 0.weight"),
        (lambda p, g: {}["rate"], "KeyError: 'rate'"),
        (lambda p, g: p.rate, "AttributeError: .*'rate'"),
    ],
)
def test_an_update_rule_that_is_wrong(backend: str, made: Any, text: str) -> None:
    def update(params: Any, grads: Any, state: Any, *_: Any) -> Any:
        return {n: made(p, grads[n]) for n, p in params.items()}, state

    inner = loop(mlp(), backend, update=metafast.UpdateRule(lambda params, hyper: {}, update))
    refused(inner, data(0), data(1), InputError, f"task 0, inner step 0: {text}")


@backends
@pytest.mark.parametrize("model", [mlp, lambda: nn.Linear(6, 4).double()], ids=["four tensors", "two tensors"])
@pytest.mark.parametrize("result", [lambda params, state: params, lambda *_: None, lambda *given: (*given, 0)])
def test_an_update_rule_that_returns_no_pair(backend: str, model: Any, result: Any) -> None:
    """A dict of two tensors is not taken for one."""

    def update(params: Any, grads: Any, state: Any, *_: Any) -> Any:
        return result({n: p - 0.1 * grads[n] for n, p in params.items()}, state)

    inner = loop(model(), backend, update=metafast.UpdateRule(update=update))
    got = r"task 0, inner step 0: update rule: got a (dict|NoneType|tuple), expected a pair \(params, state\)"
    refused(inner, data(0), data(1), InputError, got)


@backends
def test_a_model_that_raises_for_one_task(backend: str) -> None:
    class Picky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not x.isfinite().all():
                raise ValueError("the input is not finite")
            return super().forward(x)

    inner = loop(Picky(6, WAYS).double(), backend)
    (x, y), query = data(0), data(1)
    x[1, 2, 3] = math.inf
    refused(inner, (x, y), query, InputError, "task 1, inner step 0: ValueError: the input is not finite")


@backends
def test_a_loss_that_raises_stop_iteration(backend: str) -> None:
    """Left as it is, it ends the loop over the batches in silence."""
    ended = loop(mlp(), backend, lambda output, target: F.cross_entropy(output + next(iter([])), target))
    refused(ended, data(0), data(1), TaskError, "task 0, inner step 0: StopIteration; batch: got")
    with pytest.raises(TaskError, match="task 0, inner step 0: StopIteration"):
        list(map(ended.adapt, [data(0)]))


@backends
def test_a_loss_whose_error_cannot_be_printed(backend: str) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError("nothing to say")

    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise Mute

    refused(loop(mlp(), backend, loss), data(0), data(1), TaskError, "task 0, inner step 0: Mute; batch: got")


@backends
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_loss_that_branches_on_data(backend: str) -> None:
    """The interpreter makes an error of its own of what capture raises."""
    scripted = torch.jit.script(_branching_loss)
    model, support, query = mlp(), data(0), data(1)
    answer = expected(model, support, query, minimised(_branching_loss))
    loop(model, backend, scripted)(support, query).backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, answer.params[name])


def _branching_loss(output: Tensor, target: Tensor) -> Tensor:
    if bool(output.sum() > 1e9):
        output = output * 2.0
    return F.cross_entropy(output, target)


@backends
def test_a_model_that_branches_on_data(backend: str) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, WAYS), nn.Linear(6, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + 0.1 * self.b(x) if x.sum() > 0 else self.b(x) * self.a(x)

    torch.manual_seed(0)
    model = Branching().double()
    inner = loop(model, backend)
    support, query = data(0), data(1)
    answer = expected(model, support, query)
    inner(support, query).backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, answer.params[name])


# ---- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"steps": -1}, InputError, "steps=...: got -1, expected 0 or more"),
        ({"steps": 1.5}, InputTypeError, "steps=...: got 1.5, expected an int"),
        ({"steps": True}, InputTypeError, "steps=...: got True"),
        ({"order": 3}, InputError, "order=...: got 3, expected 1 or 2"),
        ({"order": True}, InputError, "order=...: got True"),
        ({"reduction": "avg"}, InputError, "reduction=...: got 'avg', expected 'mean' or 'sum' or 'none'"),
        ({"backend": "jax"}, InputError, "backend=...: got 'jax', expected 'auto' or 'native' or 'cuda' or 'torch'"),
        ({"nonfinite": "ignore"}, InputError, "nonfinite=...: got 'ignore'"),
        ({"return_outputs": "yes"}, InputError, "return_outputs=...: got 'yes'"),
        ({"params": "nothing.*"}, InputError, "params=...: got 'nothing.*', expected a name or pattern"),
        ({"params": ["0.weight", "2"]}, InputError, "got '2'.*matched by 'name.*'"),
        ({"params": nn.Linear(2, 2)}, InputError, "shares no parameter with the model"),
        ({"params": lambda name, p: False}, InputError, "expected at least one parameter that adapts"),
        ({"params": []}, InputError, "at least one parameter"),
        ({"params": 3}, InputTypeError, "params=...: got int"),
        ({"update": 0.4}, InputTypeError, "update=...: got float, expected an UpdateRule"),
        ({"objective": lambda m, b: 0}, InputError, "got both, expected one of them"),
        ({"query_loss": F.cross_entropy, "query_objective": lambda m, b: 0}, InputError, "got both"),
        ({"query_loss": 3}, InputTypeError, "got int, expected a callable"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        loop(mlp(), options.pop("backend", "torch"), **options)
    got = str(caught.value).replace("(", "").replace(")", "")
    want = text.replace("(", "").replace(")", "")
    assert all(part in got for part in want.split(".*", 1) if not part.endswith("nothing")), got


def test_model_and_loss() -> None:
    with pytest.raises(InputTypeError, match=r"InnerLoop\(model\): got function, expected an nn.Module"):
        loop(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a model without parameters"):
        loop(nn.ReLU())
    with pytest.raises(InputError, match="got neither, expected one of them"):
        loop(mlp(), "torch", None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module() -> None:
    """Its parameters lie where `functional_call` cannot put others."""
    way_out = "expected modules of Python; pass the module that it was scripted from"
    for model, place in ((torch.jit.script(mlp()), "the model"), (nn.Sequential(torch.jit.script(mlp())), "0")):
        with pytest.raises(InputTypeError, match=rf"InnerLoop\(model\), {place}: got a .*ScriptModule, {way_out}"):
            loop(model)


@pytest.mark.parametrize("name", ["steps", "order", "reduction", "backend", "nonfinite", "memory_budget"])
def test_options_set_later_are_checked_too(name: str) -> None:
    inner = loop(mlp())
    before = getattr(inner, name)
    with pytest.raises((InputError, InputTypeError), match=rf"{name}=...\): got"):
        setattr(inner, name, "nonsense")
    assert getattr(inner, name) == before


def test_cuda_is_not_there() -> None:
    with pytest.raises(BackendError, match=r"got 'cuda', expected .*; use backend="):
        loop(mlp(), "cuda")(data(0), data(1))


# ---- not finite ----------------------------------------------------------------------------------------------


@backends
def test_a_loss_that_is_not_finite_warns_with_task_and_step(backend: str) -> None:
    model, (x, y), query = mlp(), data(0), data(1)
    x[1] = math.nan
    inner = loop(model, backend)
    with pytest.warns(NonFiniteWarning, match=r"task 1, inner step 0: loss became nan \(inner lr 0.3\)") as caught:
        loss = inner((x, y), query)
    assert caught[0].filename == __file__
    assert loss.isnan()
    with pytest.warns(NonFiniteWarning, match="task 1, inner step 0"):
        loss, grads = inner.meta_gradient((x, y), query)
    assert loss.isnan() and all(grad.isnan().any() for grad in grads.values())
    with pytest.warns(NonFiniteWarning, match="task 1, inner step 0"):
        fast = inner.adapt((x, y))
    assert fast["2.bias"].isnan().any(1).tolist() == [False, True, False]


@backends
def test_a_query_loss_that_overflows(backend: str) -> None:
    support, (x, y) = data(0), data(1)
    x[2] = math.inf
    with pytest.warns(NonFiniteWarning, match="task 2, query loss: loss became"):
        losses = loop(nn.Linear(6, WAYS).double(), backend, reduction="none")(support, (x, y))
    assert losses.isfinite().tolist() == [True, True, False]


@backends
def test_nonfinite_raise(backend: str) -> None:
    model, (x, y), query = mlp(), data(0), data(1)
    x[1] = math.nan
    inner = loop(model, backend, nonfinite="raise")
    for call in (inner, inner.meta_gradient, lambda s, q: inner.adapt(s)):
        with pytest.raises(NonFiniteError, match=r"task 1, inner step 0: loss became nan .*; lower the inner"):
            call((x, y), query)
    assert all(p.grad is None for p in model.parameters())
    still_right(inner)


@backends
def test_a_large_but_finite_loss_does_not_warn(backend: str) -> None:
    support, query = data(0), data(1)
    scale = 1e308

    def large(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target).detach() * 0 + output.mean() * 0 + scale

    loss = loop(mlp(), backend, query_loss=large)(support, query)
    assert TASKS > 1 and not loss.isnan()  # the sum of the losses overflows, none of them does


# ---- what PyTorch says without a place ------------------------------------------------------------------------


@backends
def test_a_query_that_is_missing(backend: str) -> None:
    refused(loop(mlp(), backend), data(0), None, InputTypeError, "query: got NoneType")


@backends
def test_another_dtype_on_a_second_call_still_names_its_place(backend: str) -> None:
    inner, (x, y) = loop(mlp(), backend), data(0)
    inner(data(0), data(1))
    for call in (inner, inner.meta_gradient, torch.no_grad()(inner)):
        with pytest.raises(InputError, match=r"task 0, inner step 0: .*got a task's tensors .* float32"):
            call((x.float(), y), data(1))
    still_right(inner)


@backends
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_sparse_and_nested_tensors(backend: str) -> None:
    inner, (x, y) = loop(mlp(), backend), data(0)
    refused(inner, (x.to_sparse(), y), data(1), InputTypeError, r"support\[0\]: .*layout torch.sparse_coo")
    nested = torch.nested.nested_tensor(list(x))
    refused(inner, (nested, y), data(1), InputTypeError, r"support\[0\]: got a nested tensor")
    still_right(inner)


@backends
def test_parameters_without_values(backend: str) -> None:
    (x, y) = data(0)
    inner = loop(mlp().to("meta"), backend)
    with pytest.raises(InputTypeError, match=r"parameter 0\.weight: got a tensor on the meta device"):
        inner((x.to("meta"), y.to("meta")), (x.to("meta"), y.to("meta")))
    with pytest.raises(InputError, match=r"parameter 0\.weight: got a lazy one without a shape"):
        loop(nn.Sequential(nn.LazyLinear(WAYS)), backend)


class Drifting(nn.Module):
    """Writes to a parameter and to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.bias.add_(0.1)
            x.mul_(0.5)
        return self.layer(x) * 1.0


@backends
def test_a_model_that_writes_to_parameters_and_inputs_leaves_them(backend: str) -> None:
    torch.manual_seed(0)
    model, support, query = Drifting().double(), data(0), data(1)
    before = [t.detach().clone() for t in (*model.parameters(), *support, *query)]
    inner = loop(model, backend, order=1)
    first = inner(support, query)
    first.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *support, *query), strict=True))
    close(inner(support, query), first)
