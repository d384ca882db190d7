"""The recursion of the inner loop and its reverse, written as five sections of graphs.

    prologue   once a task: φ₀, s₀ = init(θ; η), and what depends on neither φ nor k
    inner      step k:      g = ∇L(φₖ);  (φₖ₊₁, sₖ₊₁) = U(φₖ, g, sₖ; η, k, φ₀)
    query      at φ_K:      the query loss, λ = w·∇_φ L_q, shared gradients
    meta       step k back: (λ, γ, σ, dη, dφ₀) ← VJP of U along (λ, σ);  λ += ∂²L/∂φ²·γ, shared += ∂²L/∂ψ∂φ·γ
    epilogue   once a task: θ̄ += λ, VJP of init along σ, VJP of the prologue along its accumulated adjoints

`meta` is forward over reverse: the tangent along γ of the gradient graph of one step, so no graph grows with the number
of steps. The number of steps is known at run time only. Order 1 makes g a constant: the tangent is left out, λ, σ and
the hyper-parameters' adjoints still pass through U.

A section is a Graph and a list of stores. Section inputs, by role:

    state "param/<n>" | "state/<p>"   φₖ, sₖ        adjoint (the same names)   λ, σ
    leaf <key>                        a tensor of the call (parameter, hyper-parameter, data, buffer, extern)
    call "k" | "weight"               scalars of the task and step
    hoisted <name>                    what the prologue stored       spill <name>   an adjoint accumulated for it
    kept <name>                       in meta: what inner stored at the same step (keep.py)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from metafast.differentiate import depends_on, pull, push, vjp_graph, with_gradient
from metafast.graph import Builder, Graph, Input, Node, Shape, Value, closed, copy_into, live_nodes
from metafast.ops import TABLE
from metafast.passes import enabled

SECTIONS = ("prologue", "inner", "query", "meta", "epilogue")


@dataclass(frozen=True)
class Store:
    """Section output `output` goes to `kind`/`name`; `add` accumulates; `step`: which, where a section has several.

    Kinds: state (slot k), state_next (slot k+1), adjoint (current), adjoint_next, gradient (a leaf's gradient: added up
    over the group for a shared leaf, over steps for a task's), loss, step_loss, stat, output, fast (leaves of the
    result), hoisted, spill, kept.
    """

    output: str
    kind: str
    name: str
    add: bool = False
    step: int | None = None


@dataclass(frozen=True)
class Section:
    """One graph and where its outputs go."""

    graph: Graph
    stores: tuple[Store, ...]


@dataclass(frozen=True)
class Loop:
    """What the sweep is made from: captured graphs and what they mean.

    `support`, `query`: inputs by role param, buffer, support | query, extern; outputs "loss", "stat/…", "output/<i>".
    `update`: inputs param, grad, state, hyper, step "k", param0; outputs "param/<n>", "state/<p>". `init`: inputs
    param, hyper; outputs "state/<p>". `adapted` lists parameter names; `wrt` leaf keys whose gradient is wanted;
    `order` 1 | 2.
    """

    support: Graph
    query: Graph | None
    update: Graph
    init: Graph
    adapted: tuple[str, ...]
    shapes: Mapping[str, Shape]
    wrt: tuple[str, ...]
    order: int

    def wants(self, i: Input) -> bool:
        """Whether an input's gradient is added to a leaf's where it comes up, not handed on as an adjoint."""
        mine = i.role == "param" and i.name in self.adapted
        return i.role != "hoisted" and not mine and leaf_key(i) in self.wrt

    @functools.cached_property
    def back(self) -> Graph:
        """The VJP of the update, in all that wants its adjoint."""
        wanted = []
        for i in self.update.inputs:
            adaptive = i.role in ("param", "state") or (i.role == "grad" and self.order == 2)
            key = f"param/{i.name}" if i.role == "param0" else f"{i.role}/{i.name}"
            if adaptive or (i.role in ("hyper", "param0", "extern") and key in self.wrt):
                wanted.append((i.role, i.name))
        return vjp_graph(self.update, wanted)

    @functools.cached_property
    def straight(self) -> frozenset[str]:
        """The parameters whose adjoint every step hands on as it is, and to nobody else: from the query it goes
        to its sum. Gradient descent of first order has no others."""
        if self.order == 2 or not enabled("straight"):
            return frozenset()
        adjoints = {i.name: i.value for i in self.back.inputs if i.role == "cotangent"}
        read = {v for node in live_nodes(self.back.nodes, self.back.outputs.values()) for v in node.inputs}
        return frozenset([n for n in self.adapted if self._hands_on(adjoints.get(f"param/{n}"), f"param/{n}", read)])

    def _hands_on(self, adjoint: Value | None, name: str, read: Set[Value]) -> bool:
        alone = [key for key, v in self.back.outputs.items() if v is adjoint] == [name]
        return adjoint is not None and alone and adjoint not in read


@dataclass
class _Writer:
    """A section under construction."""

    b: Builder = field(default_factory=Builder)
    outputs: dict[str, Value] = field(default_factory=dict)
    stores: list[Store] = field(default_factory=list)

    def store(self, value: Value | None, kind: str, name: str, *, add: bool = False) -> None:
        if value is None:
            return
        key = f"{kind}:{name}"
        if key in self.outputs:
            raise KeyError(key)
        self.outputs[key] = value
        self.stores.append(Store(key, kind, name, add))

    def finish(self) -> Section:
        return Section(self.b.finish(self.outputs), tuple(self.stores))


def leaf_key(i: Input) -> str:
    """The call's key of a captured input."""
    return f"{i.role}/{i.name}"


def _bind_loss(b: Builder, loop: Loop) -> object:
    adapted = set(loop.adapted)

    def bind(i: Input) -> Value:
        if i.role == "param" and i.name in adapted:
            return b.same("state", f"param/{i.name}", i.value)
        if i.role == "hoisted":
            return b.same("hoisted", i.name, i.value)
        return b.same("leaf", leaf_key(i), i.value)

    return bind


def _bind_update(b: Builder, loop: Loop, grads: Mapping[str, Value | None]) -> object:
    def bind(i: Input) -> Value:
        if i.role == "grad":
            g = grads.get(i.name)
            return g if g is not None else b.op("expand", b.const(0.0), shape=i.value.shape)
        if i.role == "cotangent":
            return b.same("adjoint", i.name, i.value)
        if i.role == "step":
            return b.same("call", "k", i.value)
        if i.role in ("param", "state"):
            return b.same("state", f"{i.role}/{i.name}", i.value)
        role = "param" if i.role == "param0" else i.role
        return b.same("leaf", f"{role}/{i.name}", i.value)

    return bind


# ---- the prologue: what does not depend on the adapted parameters ----------------------------------------------


def _free(op: str) -> bool:
    return TABLE[op].kernel in ("view", "constant")


def split(graph: Graph, moving: Sequence[Value]) -> tuple[list[Value], list[Node]]:
    """Cut a graph behind what no `moving` input reaches: (the values that cross, the nodes that come after).

    Views and constants are never cut: what comes after makes them again for nothing.
    """
    if not enabled("hoist"):
        return [], live_nodes(graph.nodes, graph.outputs.values())
    reached = depends_on(graph.nodes, moving)
    wanted = set(graph.outputs.values())
    cut: list[Value] = []
    after: list[Node] = []
    for node in reversed(graph.nodes):
        if wanted.isdisjoint(node.outputs):
            continue
        if node.outputs[0] in reached or _free(node.op):
            wanted.update(node.inputs)
            after.append(node)
        else:
            cut += [v for v in reversed(node.outputs) if v in wanted]
    return cut[::-1], after[::-1]


def _joined(graph: Graph, nodes: Sequence[Node], cut: Mapping[Value, str]) -> Graph:
    """What comes after a cut, which reads the values that cross as ("hoisted", name) inputs."""
    crossing = [Input("hoisted", name, v) for v, name in cut.items()]
    return closed([*graph.inputs, *crossing], nodes, graph.outputs)


# ---- the sections ---------------------------------------------------------------------------------------------

MODES = ("fused", "outputs", "forward", "adapt", "adapt_vjp")  # the ways to run a loop
BACK = ("fused", "outputs", "adapt_vjp")  # those with a way back


class Sweep:
    """Writes the sections of one loop. The query plays no part in any but the one of its name."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        moving = [v for n in loop.adapted if (v := loop.support.input("param", n)) is not None]
        cut, after = split(loop.support, moving)
        names = {v: f"support/{k}" for k, v in enumerate(cut)}
        self.before = closed(loop.support.inputs, loop.support.nodes, {name: v for v, name in names.items()})
        self.step = _joined(loop.support, after, names)
        self.wanted = set(loop.wrt)
        self.state = {f"param/{n}": loop.shapes[n] for n in loop.adapted}
        self.state |= {name: v.shape for name, v in loop.init.outputs.items()}
        self._live_cuts = self._cuts_with_gradient()
        self._step_gradient = with_gradient(self.step, "loss", self._step_wrt())

    def _cuts_with_gradient(self) -> list[str]:
        sources = [i.value for i in self.before.inputs if leaf_key(i) in self.wanted]
        reached = depends_on(self.before.nodes, sources)
        return [name for name, v in self.before.outputs.items() if v in reached]

    def _step_wrt(self) -> list[tuple[str, str]]:
        params = [("param", n) for n in self.loop.adapted]
        shared = [(i.role, i.name) for i in self.step.inputs if self.loop.wants(i)]
        return params + shared + [("hoisted", n) for n in self._live_cuts]

    def sections(self, mode: str) -> dict[str, Section]:
        """All sections of one of `MODES`."""
        made = {**self.around(mode in BACK), "query": query_section(self.loop, mode)}
        return {name: made[name] for name in SECTIONS if name in made}

    def around(self, back: bool) -> dict[str, Section]:
        """All but `query`: there and, with `back`, back."""
        writers = {"inner": self._inner()}
        if back:
            writers |= {"meta": self._meta(), "epilogue": self._epilogue()}
        return _hoist(self._prologue(), writers)

    # -- sections

    def _prologue(self) -> _Writer:
        w = _Writer()
        for n in self.loop.adapted:
            w.store(w.b.input("leaf", f"param/{n}", self.loop.shapes[n]), "state", f"param/{n}")
        env = copy_into(w.b, self.loop.init, lambda i: self._init_input(w.b, i))
        for name, v in self.loop.init.outputs.items():
            w.store(env[v], "state", name)
        env = copy_into(w.b, self.before, _bind_loss(w.b, self.loop))  # type: ignore[arg-type]
        for name, v in self.before.outputs.items():
            w.store(env[v], "hoisted", name)
        for name in self._live_cuts:
            zero = w.b.op("expand", w.b.const(0.0), shape=self.before.outputs[name].shape)
            w.store(zero, "spill", name)
        return w

    @staticmethod
    def _init_input(b: Builder, i: Input) -> Value:
        if i.role == "cotangent":
            return b.same("adjoint", i.name, i.value)
        return b.same("leaf", f"{i.role}/{i.name}", i.value)

    def _inner(self) -> _Writer:
        w = _Writer()
        env = copy_into(w.b, self._step_gradient, _bind_loss(w.b, self.loop))  # type: ignore[arg-type]
        grads = self._gradients(env)
        made = copy_into(w.b, self.loop.update, _bind_update(w.b, self.loop, grads))  # type: ignore[arg-type]
        for name, v in self.loop.update.outputs.items():
            w.store(made[v], "state_next", name)
        _losses(w, self._step_gradient, env, "step_loss", "support")
        return w

    def _gradients(self, env: Mapping[Value, Value]) -> dict[str, Value | None]:
        out = self._step_gradient.outputs
        return {n: env[v] for n in self.loop.adapted if (v := out.get(f"grad/param/{n}")) is not None}

    def _meta(self) -> _Writer:
        w, loop = _Writer(), self.loop
        env = copy_into(w.b, self._step_gradient, _bind_loss(w.b, loop))  # type: ignore[arg-type]
        grads = self._gradients(env)
        made = copy_into(w.b, loop.back, _bind_update(w.b, loop, grads))  # type: ignore[arg-type]
        got = {name: made[v] for name, v in loop.back.outputs.items()}
        moved = self._tangents(w, env, got) if loop.order == 2 else {}
        for n in loop.adapted:
            if n in loop.straight:
                continue
            self._store_adjoint(w, f"param/{n}", got.get(f"param/{n}"), moved.get(f"grad/param/{n}"))
        for name in loop.init.outputs:
            self._store_adjoint(w, name, got.get(name), None)
        self._store_leaf_parts(w, got, moved)
        return w

    def _tangents(self, w: _Writer, env: Mapping[Value, Value], got: Mapping[str, Value]) -> dict[str, Value]:
        """The Hessian-vector product and the mixed terms: how every gradient of the step moves along γ."""
        gammas = {
            w.b.input("state", f"param/{n}", self.loop.shapes[n]): g
            for n in self.loop.adapted
            if (g := got.get(f"grad/{n}")) is not None
        }
        keys = [k for k in self._step_gradient.outputs if k.startswith("grad/")]
        # A gradient of what all tasks share is added up where it is made: a factor would be a pass of its own.
        alone = all(k.removeprefix("grad/") in self.state for k in keys)
        scale, gammas = common_factor(w.b, gammas) if alone and enabled("factor") else (None, gammas)
        moved = push(w.b, gammas, [env[self._step_gradient.outputs[k]] for k in keys])
        found = {k: t for k, t in zip(keys, moved, strict=True) if t is not None}
        return found if scale is None else {k: w.b.op("mul", scale, t) for k, t in found.items()}

    def _store_adjoint(self, w: _Writer, name: str, direct: Value | None, second: Value | None) -> None:
        parts = [p for p in (direct, second) if p is not None]
        value = w.b.op("expand", w.b.const(0.0), shape=self.state[name]) if not parts else parts[0]
        for p in parts[1:]:
            value = w.b.op("add", value, p)
        w.store(value, "adjoint_next", name)

    def _store_leaf_parts(self, w: _Writer, got: Mapping[str, Value], moved: Mapping[str, Value]) -> None:
        total: dict[tuple[str, str], Value] = {}

        def add(kind: str, name: str, v: Value) -> None:
            old = total.get((kind, name))
            total[kind, name] = v if old is None else w.b.op("add", old, v)

        for name, v in got.items():
            role, _, rest = name.partition("/")
            if role in ("hyper", "extern"):
                add("gradient", name, v)
            elif role == "param0":
                add("gradient", f"param/{rest}", v)
        for name, v in moved.items():
            role, _, rest = name.removeprefix("grad/").partition("/")
            if role == "hoisted":
                add("spill", rest, v)
            elif role != "param" or rest not in self.loop.adapted:
                add("gradient", f"{role}/{rest}", v)
        for (kind, name), v in total.items():
            w.store(v, kind, name, add=True)

    def _epilogue(self) -> _Writer:
        w, loop = _Writer(), self.loop
        total: dict[str, Value] = {}

        def add(key: str, v: Value) -> None:
            total[key] = v if key not in total else w.b.op("add", total[key], v)

        for n in loop.adapted:
            if f"param/{n}" in self.wanted and n not in loop.straight:
                add(f"param/{n}", w.b.input("adjoint", f"param/{n}", loop.shapes[n]))
        keys = [(i.role, i.name) for i in loop.init.inputs if f"{i.role}/{i.name}" in self.wanted]
        back = vjp_graph(loop.init, keys)
        env = copy_into(w.b, back, lambda i: self._init_input(w.b, i))
        for name, v in back.outputs.items():
            add(name, env[v])
        for key, v in self._pull_prologue(w).items():
            add(key, v)
        for key, v in total.items():
            w.store(v, "gradient", key, add=True)
        return w

    def _pull_prologue(self, w: _Writer) -> dict[str, Value]:
        if not self._live_cuts:
            return {}
        env = copy_into(w.b, self.before, _bind_loss(w.b, self.loop))  # type: ignore[arg-type]
        out = self.before.outputs
        cts = {env[out[n]]: w.b.input("spill", n, out[n].shape) for n in self._live_cuts}
        leaves = [(leaf_key(i), env[i.value]) for i in self.before.inputs if leaf_key(i) in self.wanted]
        pulled = pull(w.b, cts, [v for _, v in leaves])
        return {key: ct for (key, _), ct in zip(leaves, pulled, strict=True) if ct is not None}


def _losses(w: _Writer, graph: Graph, env: Mapping[Value, Value], kind: str, part: str) -> None:
    w.store(env[graph.outputs["loss"]], kind, "loss")
    for name, v in graph.outputs.items():
        if name.startswith("stat/"):
            w.store(env[v], f"{part}_stat", name)


# ---- the query section: where the way there ends, and the way back begins ----------------------------------------


def query_section(loop: Loop, mode: str) -> Section:
    """What one of `MODES` does at φ_K.

    The query loss, its gradient where there is a way back, and in "outputs" that of the outputs, whose cotangents are
    leaves "outputs/<i>"; in "adapt" the fast weights, in "adapt_vjp" their cotangents, leaves "fast/<name>".
    """
    w = _Writer()
    if mode in ("adapt", "adapt_vjp"):
        _fast_weights(w, loop, cotangents=mode == "adapt_vjp")
    else:
        _query_loss(w, loop, mode)
    return w.finish()


def _fast_weights(w: _Writer, loop: Loop, *, cotangents: bool) -> None:
    for n in loop.adapted:
        if cotangents:
            _store_adjoint(w, loop, n, w.b.input("leaf", f"fast/{n}", loop.shapes[n]))
        else:
            w.store(w.b.input("state", f"param/{n}", loop.shapes[n]), "fast", n)
    if cotangents:
        _zero_state_adjoints(w, loop)


def _query_loss(w: _Writer, loop: Loop, mode: str) -> None:
    graph = loop.query
    assert graph is not None
    env = copy_into(w.b, graph, _bind_loss(w.b, loop))  # type: ignore[arg-type]
    _losses(w, graph, env, "loss", "query")
    made = {name.removeprefix("output/"): env[v] for name, v in graph.outputs.items() if name.startswith("output/")}
    for name, v in made.items():
        w.store(v, "output", name)
    if mode not in BACK:
        return
    cts = {env[graph.outputs["loss"]]: w.b.input("call", "weight", ())}
    for name, v in made.items() if mode == "outputs" else ():
        given = w.b.input("leaf", f"outputs/{name}", v.shape)
        cts[v] = given if v not in cts else w.b.op("add", cts[v], given)
    leaves = [(leaf_key(i), env[i.value]) for i in graph.inputs if loop.wants(i)]
    phis = [w.b.input("state", f"param/{n}", loop.shapes[n]) for n in loop.adapted]
    pulled = pull(w.b, cts, phis + [v for _, v in leaves])
    for n, ct in zip(loop.adapted, pulled, strict=False):
        _store_adjoint(w, loop, n, ct)
    for (key, _), ct in zip(leaves, pulled[len(phis) :], strict=True):
        w.store(ct, "gradient", key, add=True)
    _zero_state_adjoints(w, loop)


def _store_adjoint(w: _Writer, loop: Loop, n: str, ct: Value | None) -> None:
    """The adjoint of φ_K, or where it goes from there."""
    if n not in loop.straight:
        zero = w.b.op("expand", w.b.const(0.0), shape=loop.shapes[n])
        w.store(zero if ct is None else ct, "adjoint", f"param/{n}")
    elif f"param/{n}" in loop.wrt:
        w.store(ct, "gradient", f"param/{n}", add=True)


def _zero_state_adjoints(w: _Writer, loop: Loop) -> None:
    for name, v in loop.init.outputs.items():
        w.store(w.b.op("expand", w.b.const(0.0), shape=v.shape), "adjoint", name)


def common_factor(b: Builder, values: Mapping[Value, Value]) -> tuple[Value | None, dict[Value, Value]]:
    """A 0-dim factor of all the values, and these without it: a tangent along s·λ is s times that along λ, and the
    product with s is one of many in the pass that follows. (None, values) where there is none."""
    split = {key: _factors(b, v) for key, v in values.items()}
    factors = {tuple(found) for found, _ in split.values()}
    if len(factors) != 1 or not (first := factors.pop()):
        return None, dict(values)
    scale = first[0]
    for s in first[1:]:
        scale = b.op("mul", scale, s)
    return scale, {key: rest for key, (_, rest) in split.items()}


def _factors(b: Builder, value: Value) -> tuple[list[Value], Value]:
    """The 0-dim factors of a value, -1 among them, and what they multiply."""
    found: list[Value] = []
    while (node := b.producer(value)) is not None and value.shape:
        scalars = [v for v in node.inputs if not v.shape]
        if node.op == "neg":
            found.append(b.const(-1.0))
            value = node.inputs[0]
        elif node.op == "mul" and len(scalars) == 1:
            found += scalars
            (value,) = (v for v in node.inputs if v.shape)
        else:
            break
    return found, value


def gradient_section(graph: Graph, keys: Sequence[str]) -> Section:
    """A captured loss and its gradient in the leaves `keys`, as one section that adapts nothing."""
    w = _Writer()
    leaves: dict[str, Value] = {}

    def bind(i: Input) -> Value:
        key = leaf_key(i)
        leaves[key] = w.b.same("leaf", key, i.value)
        return leaves[key]

    env = copy_into(w.b, graph, bind)
    loss = env[graph.outputs["loss"]]
    w.store(loss, "loss", "loss")
    wanted = [k for k in keys if k in leaves]
    pulled = pull(w.b, {loss: w.b.const(1.0)}, [leaves[k] for k in wanted])
    for key, ct in zip(wanted, pulled, strict=True):
        w.store(ct, "gradient", key, add=True)
    return w.finish()


# ---- loop-invariant code ----------------------------------------------------------------------------------------


def _hoist(prologue: _Writer, writers: Mapping[str, _Writer]) -> dict[str, Section]:
    """Move what inner and meta compute from leaves alone into the prologue; the epilogue reads what is there."""
    rest = {name: _hoist_section(writer.finish(), prologue, name) for name, writer in writers.items()}
    return {"prologue": prologue.finish(), **rest}


def _hoist_section(section: Section, prologue: _Writer, prefix: str) -> Section:
    graph = section.graph
    moving = [i.value for i in graph.inputs if i.role not in ("leaf", "hoisted")]
    cut, after = split(graph, moving)
    if not cut:
        return section
    stored = {v: k.removeprefix("hoisted:") for k, v in prologue.outputs.items() if k.startswith("hoisted:")}
    by_name = {name: v for v, name in stored.items()}

    def bind(i: Input) -> Value:
        if i.role == "hoisted":
            return by_name[i.name]
        return prologue.b.same(i.role, i.name, i.value)

    names: dict[Value, str] = {}
    env = copy_into(prologue.b, closed(graph.inputs, graph.nodes, {str(k): v for k, v in enumerate(cut)}), bind)
    for k, v in enumerate(cut):
        if env[v] not in stored:
            stored[env[v]] = f"{prefix}/{k}"
            prologue.store(env[v], "hoisted", stored[env[v]])
        names[v] = stored[env[v]]
    return Section(_joined(graph, after, names), section.stores)
