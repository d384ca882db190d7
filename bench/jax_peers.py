"""JAX contenders: one jitted function a workload, over `vmap` of the tasks or a `scan` over them.

Nothing here imports JAX before a workload is prepared. XLA flushes subnormals by itself and takes its
threads from the cores the process may use (`bench.machine` binds the process).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bench.architectures import EPS, Layer
from bench.peers import Call, Peer, Raw
from bench.workloads import Case, Workload

Params = Mapping[str, Any]


def _norm(x: Any, weight: Any, bias: Any) -> Any:
    """Batch normalisation with the batch's statistics; channels are axis 1."""
    import jax.numpy as jnp

    axes = (0, *range(2, x.ndim))
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    variance = jnp.mean(centred * centred, axes, keepdims=True)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return centred / jnp.sqrt(variance + EPS) * weight.reshape(shape) + bias.reshape(shape)


def _conv(x: Any, weight: Any, bias: Any) -> Any:
    from jax import lax

    y = lax.conv_general_dilated(
        x, weight, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return y + bias[:, None, None]


def _pool(x: Any) -> Any:
    """2×2 maximum by `reduce_window`.

    Not by reshaping and `max`, whose derivative compares each value with the maximum: XLA computes the
    value again in another fusion, gets other last bits, and under jit of vmap gradients are lost (seen with
    jaxlib 0.10).
    """
    from jax import lax

    return lax.reduce_window(x, -float("inf"), lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def forward(layers: tuple[Layer, ...], params: Params, x: Any) -> Any:
    """The net of `bench.architectures` in JAX."""
    import jax

    for layer in layers:
        weight, bias = params.get(f"{layer.name}.weight"), params.get(f"{layer.name}.bias")
        match layer.kind:
            case "linear":
                x = x @ weight.T + bias
            case "conv":
                x = _conv(x, weight, bias)
            case "norm":
                x = _norm(x, weight, bias)
            case "relu":
                x = jax.nn.relu(x)
            case "pool":
                x = _pool(x)
            case "flatten":
                x = x.reshape(x.shape[0], -1)
    return x


def _loss(w: Workload) -> Callable[[Params, Sequence[Any]], Any]:
    import jax
    import jax.numpy as jnp

    def cross_entropy(params: Params, batch: Sequence[Any]) -> Any:
        logits = jax.nn.log_softmax(forward(w.layers, params, batch[0]))
        return -jnp.take_along_axis(logits, batch[1][:, None], 1).mean()

    def squared_error(params: Params, batch: Sequence[Any]) -> Any:
        return jnp.mean((forward(w.layers, params, batch[0]) - batch[1]) ** 2)

    return cross_entropy if w.classes else squared_error


def task(w: Workload) -> Callable[[dict, Sequence[Any], Sequence[Any]], Any]:
    """`f(params, support, query) -> loss` of one task; the steps are unrolled, as few as they are."""
    import jax

    loss = _loss(w)

    def run(params: dict, support: Sequence[Any], query: Sequence[Any]) -> Any:
        fast = {name: p for name, p in params.items() if w.adapts(name)}
        fixed = {name: p for name, p in params.items() if name not in fast}
        for _ in range(w.steps):
            grads = jax.grad(lambda f: loss({**fixed, **f}, support))(fast)
            if w.order == 1:
                grads = jax.lax.stop_gradient(grads)
            fast = {name: p - w.lr * grads[name] for name, p in fast.items()}
        return loss({**fixed, **fast}, query)

    return run


def over_vmap(w: Workload) -> Callable[..., Any]:
    """Value and gradient of the mean of `vmap(task)`."""
    import jax

    mapped = jax.vmap(task(w), in_axes=(None, 0, 0))
    return jax.value_and_grad(lambda params, support, query: mapped(params, support, query).mean())


def over_scan(w: Workload) -> Callable[..., Any]:
    """A `scan` over tasks that adds up value and gradient of each."""
    import jax
    import jax.numpy as jnp

    single = jax.value_and_grad(task(w))

    def run(params: dict, support: Sequence[Any], query: Sequence[Any]) -> Any:
        def add(total: Any, batch: Any) -> Any:
            return jax.tree.map(jnp.add, total, single(params, *batch)), None

        zero = (jnp.zeros((), next(iter(params.values())).dtype), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, (support, query))
        return jax.tree.map(lambda value: value / w.tasks, total)

    return run


def _as_jax(tensor: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(tensor.detach().numpy())


class JaxVmap(Peer):
    """`jax.jit` of the gradient of a mean over `vmap`."""

    name, family, compiles = "jax-vmap", "jax", True
    packages, install = ("jax",), "pip install jax"

    def build(self, w: Workload) -> Callable[..., Any]:
        """The function to jit."""
        return over_vmap(w)

    def prepare(self, case: Case) -> Call:
        import jax

        jax.config.update("jax_enable_x64", True)  # labels stay int64; float32 stays float32
        params = {name: _as_jax(p) for name, p in case.params.items()}
        support, query = tuple(map(_as_jax, case.support)), tuple(map(_as_jax, case.query))
        compiled = jax.jit(self.build(case.workload))

        def call() -> Raw:
            loss, grads = jax.block_until_ready(compiled(params, support, query))
            return loss, [grads[name] for name in params]

        return call


class JaxScan(JaxVmap):
    """`jax.jit` of a `scan` over tasks."""

    name = "jax-scan"

    def build(self, w: Workload) -> Callable[..., Any]:
        return over_scan(w)
