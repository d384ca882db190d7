"""For each kernel stem one method that fixes layouts and writes the kernel's integers."""

from __future__ import annotations

from collections.abc import Sequence

from metafast.graph import Graph, Node, Shape, Value
from metafast.lower.arrays import (
    Array,
    added_up,
    broadcast_to,
    collapse,
    is_dense,
    memory_order,
    reshaped,
    sliced,
)
from metafast.lower.writer import Constants, Into, Writer, named
from metafast.ops import numel
from metafast.passes import enabled

NHWC = (0, 2, 3, 1)
PIECES, LEAST_PIECE = 2, 1 << 11  # of a weight gradient; pixels for which another transform of it is next to nothing


class Kernels(Writer):
    """Writes a node's instructions by the method `_<stem>` of its kernel, where the caller says if it does."""

    def __init__(self, graph: Graph, known: dict[Value, Array], constants: Constants) -> None:
        super().__init__(graph, known, constants)
        self.filters: dict[tuple[Array, bool], Array] = {}

    # -- products

    def _matmul(self, node: Node, into: Into, bias: Array | None = None) -> None:
        a, b = (self._batched(self.array(v)) for v in node.inputs)
        out, mode = self.result(node, into, None)
        c = reshaped(out, (a.shape[0], *out.shape[-2:]))
        assert c is not None
        batch, m, k = a.shape
        n = b.shape[2]
        ints = [batch, m, n, k, *a.strides, *b.strides, *c.strides, mode]
        self._emit_biased(node, "gemm", [a, b, c], 1, ints, bias)
        self.code[-1].ints.append(0)

    def _matmul_lanes(self, node: Node, into: Into) -> None:
        lanes = node.outputs[0].shape[2]
        a, b = (broadcast_to(x, (*x.shape[:2], lanes)) for x in map(self.array, node.inputs))
        c, mode = self.result(node, into, None)
        m, n, _ = c.shape
        last_first = [(x.strides[2], *x.strides[:2]) for x in (a, b, c)]
        ints = [lanes, m, n, a.shape[1], *(s for strides in last_first for s in strides), mode, 0, 0]
        self.emit(node, "gemm", [a, b, c], 1, ints)

    def _emit_biased(
        self, node: Node, kernel: str, operands: list[Array], writes: int, ints: list[int], bias: Array | None
    ) -> None:
        """Kernels that end (outputs, [an operand more]) and (flag of that operand)."""
        self.emit(node, kernel, operands, writes, [*ints, int(bias is not None)])
        if bias is not None:
            self.code[-1].operands.append(bias)

    def _batched(self, a: Array) -> Array:
        """As (batch, rows, columns)."""
        batch = numel(a.shape[:-2])
        return reshaped(a, (batch, *a.shape[-2:])) or self.reshape_copy(a, (batch, *a.shape[-2:]))

    # -- convolutions

    def _conv2d(self, node: Node, into: Into, bias: Array | None = None) -> None:
        p, q = (self.array(v) for v in node.inputs)
        y = node.outputs[0].shape
        if node.op == "conv2d":
            x_shape, w_shape, y_shape = p.shape, q.shape, y
            p = self.dense(p, NHWC)
        elif node.op == "conv2d_dx":
            x_shape, w_shape, y_shape = y, q.shape, p.shape
            p = self.dense(p, NHWC)
        else:
            x_shape, w_shape, y_shape = p.shape, y, q.shape
            p, q = self.dense(p, NHWC), self.dense(q, NHWC)
        out, mode = self.result(node, into, None if node.op == "conv2d_dw" else NHWC)
        w = out if node.op == "conv2d_dw" else q
        ints = [x_shape[0], *x_shape[2:], x_shape[1], *w_shape[:1], *w_shape[2:]]
        ints += [*node.attrs["stride"], *node.attrs["padding"], *node.attrs["dilation"], *y_shape[2:], *w.strides]
        kernel = {"conv2d": "conv_fwd", "conv2d_dx": "conv_dx", "conv2d_dw": "conv_dw"}[node.op]
        winograd = int(enabled("winograd"))
        if winograd and self._by_winograd(node, ints):
            if node.op == "conv2d_dw":
                return self._conv2d_dw_in_pieces(node, [p, q], ints, out, mode)
            q, winograd = self._filters(node, q, ints), 2
        self._emit_biased(node, kernel, [p, q, out], 1, [*ints, mode, winograd], bias)

    def _by_winograd(self, node: Node, ints: Sequence[int]) -> bool:
        """Whether the kernel takes Winograd's form, whose filters are transformed once for all that read them."""
        from metafast import _C

        n, h, w, c, o, kh, kw, sh, sw, _, _, dh, dw, oh, ow = ints[:15]
        if self.item != 4 or (kh, kw) != (3, 3) or {sh, sw, dh, dw} != {1}:
            return False
        return _C.winograd_pays(h, w, n, o, c) if node.op == "conv2d_dx" else _C.winograd_pays(oh, ow, n, c, o)

    def _filters(self, node: Node, w: Array, ints: Sequence[int]) -> Array:
        """The weights' filters, transformed: once for all convolutions that read them."""
        from metafast import _C

        adjoint = node.op == "conv2d_dx"
        key = (w, adjoint)
        if key not in self.filters or not enabled("copies"):
            c, o = ints[3:5]
            many = _C.winograd_filter_elements(*((o, c) if adjoint else (c, o)))
            out = self.filters[key] = self.fresh((many,))
            self.emit(node, "winograd_filters", [w, out], 1, [*ints, 0, 0, 0, int(adjoint)])
            self.code[-1].flops, self.code[-1].note = 0.0, f"filters  {node.origin}".rstrip()
        return self.filters[key]

    def _conv2d_dw_in_pieces(
        self, node: Node, operands: list[Array], ints: Sequence[int], out: Array, mode: int
    ) -> None:
        """Of shares of the images, which threads then have for their own; added afterwards."""
        pieces = PIECES if enabled("parts") and ints[0] * ints[13] * ints[14] >= LEAST_PIECE and ints[0] > 1 else 1
        if pieces == 1 or not is_dense(out):
            return self.emit(node, "conv_dw", [*operands, out], 1, [*ints, mode, 1, 0])
        parts = self.fresh((pieces, numel(out.shape)))
        self.emit(node, "conv_dw", [*operands, parts], 1, [*ints, 0, 1, pieces])
        self.code.append(added_up(parts, out, mode, named(node)))

    # -- sums, and kernels that see (outer, reduce, inner)

    def _reduce(self, node: Node, into: Into) -> None:
        x = self.array(node.inputs[0])
        order = memory_order(x.shape, x.strides)
        dims = node.attrs["dims"]
        kept, red = [d for d in order if d not in dims], [d for d in order if d in dims]
        names = [d for d in range(len(x.shape)) if d not in dims]
        out, mode = self.result(node, into, [names.index(d) for d in kept])
        k_dims, (k_in, k_out) = collapse(
            tuple(x.shape[d] for d in kept),
            [[x.strides[d] for d in kept], [out.strides[names.index(d)] for d in kept]],
        )
        r_dims, (r_in,) = collapse(tuple(x.shape[d] for d in red), [[x.strides[d] for d in red]])
        ints = [len(k_dims), len(r_dims), *k_dims, *r_dims, *k_in, *r_in, *k_out, mode, int(node.op == "amax")]
        self.emit(node, "reduce", [x, out], 1, ints, [1.0])

    def _blocked(self, a: Array, dims: Sequence[int]) -> tuple[Array, tuple[int, ...], tuple[int, int, int]]:
        """The array in a layout where `dims` are one block of memory: (array, order, (outer, reduce, inner))."""
        order = memory_order(a.shape, a.strides)
        if not (is_dense(a) and _block(a.shape, order, dims)):
            kept = [d for d in range(len(a.shape)) if d not in dims]
            order = NHWC if len(a.shape) == 4 and kept == [1] else (*kept, *dims)
            a = self.copied(a, order)
        at = [i for i, d in enumerate(order) if d in dims and a.shape[d] > 1]
        lo, hi = (at[0], at[-1] + 1) if at else (len(order), len(order))
        sizes = [a.shape[d] for d in order]
        return a, order, (numel(tuple(sizes[:lo])), numel(tuple(sizes[lo:hi])), numel(tuple(sizes[hi:])))

    @staticmethod
    def _kept_order(order: Sequence[int], dims: Sequence[int]) -> list[int]:
        names = [d for d in range(len(order)) if d not in dims]
        return [names.index(d) for d in order if d not in dims]

    def _stat(self, v: Value, order: Sequence[int], dims: Sequence[int]) -> Array:
        return self.dense(self.array(v), self._kept_order(order, dims))

    def _standardize(self, node: Node, _: Into) -> None:
        dims = node.attrs["dims"]
        x, order, sizes = self._blocked(self.array(node.inputs[0]), dims)
        outs = [self.fresh(x.shape, order)]
        outs += [self.fresh(v.shape, self._kept_order(order, dims)) for v in node.outputs[1:]]
        self.env.update(zip(node.outputs, outs, strict=True))
        self.emit(node, "standardize", [x, *outs], 4, list(sizes), [node.attrs["eps"]])

    def _moments(self, node: Node, _: Into) -> None:
        dims = node.attrs["dims"]
        x, order, (outer, many, inner) = self._blocked(self.array(node.inputs[0]), dims)
        pieces = self._pieces(x, order, many) if outer == 1 else 1
        each = [self.fresh((outer * pieces, inner)) for _ in range(2)]
        outs = [self.fresh(v.shape, self._kept_order(order, dims)) for v in node.outputs]
        self.env.update(zip(node.outputs, outs, strict=True))
        self.emit(node, "moments", [x, *each], 2, [outer * pieces, many // pieces, inner])
        self.emit(node, "join_moments", [*each, *outs], 3, [outer, pieces, inner], [node.attrs["eps"]])

    def _pieces(self, x: Array, order: Sequence[int], many: int) -> int:
        """In how many pieces, along the outermost dim, moments are taken, so that threads can share them."""
        pieces = next((x.shape[d] for d in order if x.shape[d] > 1), 1)
        return pieces if many % pieces == 0 and self.parts_pay(numel(x.shape), pieces) else 1

    def _project(self, node: Node, _: Into) -> None:
        v, xhat, rstd = node.inputs
        dims = node.attrs["dims"]
        x, order, sizes = self._blocked(self.array(xhat), dims)
        ins = [self.dense(self.array(v), order), x, self._stat(rstd, order, dims)]
        outs = [self.fresh(x.shape, order), self.fresh(node.outputs[1].shape, self._kept_order(order, dims))]
        self.env.update(zip(node.outputs, outs, strict=True))
        self.emit(node, "project", [*ins, *outs], 2, [*sizes, 0])

    def _project_tangent(self, node: Node, _: Into) -> None:
        v, xhat, xhat_dot, rstd, corr = node.inputs
        dims = node.attrs["dims"]
        x, order, sizes = self._blocked(self.array(xhat), dims)
        ins = [self.dense(self.array(v), order), x, self.dense(self.array(xhat_dot), order)]
        ins += [self._stat(rstd, order, dims), self._stat(corr, order, dims)]
        out = self.env[node.outputs[0]] = self.fresh(x.shape, order)
        self.emit(node, "project_tangent", [*ins, out], 1, [*sizes, 0])

    def _log_softmax(self, node: Node, _: Into) -> None:
        x, order, sizes = self._blocked(self.array(node.inputs[0]), (node.attrs["dim"],))
        out = self.env[node.outputs[0]] = self.fresh(x.shape, order)
        self.emit(node, "log_softmax", [x, out], 1, list(sizes))

    def _cumsum(self, node: Node, _: Into) -> None:
        x, order, sizes = self._blocked(self.array(node.inputs[0]), (node.attrs["dim"],))
        out = self.env[node.outputs[0]] = self.fresh(x.shape, order)
        self.emit(node, "cumsum", [x, out], 1, [*sizes, int(node.attrs["reverse"])])

    # -- pools

    def _max_pool(self, node: Node, _: Into) -> None:
        x = self.dense(self.array(node.inputs[0]), NHWC)
        y, idx = (self.fresh(v.shape, NHWC, v.dtype) for v in node.outputs)
        self.env.update(zip(node.outputs, (y, idx), strict=True))
        a = node.attrs
        ints = [*_nhwc(x.shape), *a["kernel"], *a["stride"], *a["padding"], *a["dilation"], *y.shape[2:]]
        sign = self.dense(self.array(node.inputs[1])) if len(node.inputs) > 1 else None
        self._emit_biased(node, "max_pool", [x, y, idx], 2, ints, sign)

    def _pool_gather(self, node: Node, _: Into) -> None:
        x = self.dense(self.array(node.inputs[0]), NHWC)
        idx = self.array(node.inputs[1])
        y = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape, NHWC)
        self.emit(node, "pool_gather", [x, idx, y], 1, [*_nhwc(x.shape), *y.shape[2:]])

    def _pool_scatter(self, node: Node, _: Into) -> None:
        dy = self.dense(self.array(node.inputs[0]), NHWC)
        idx = self.array(node.inputs[1])
        dx = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape, NHWC)
        self.emit(node, "pool_scatter", [dy, idx, dx], 1, [*_nhwc(dx.shape), *dy.shape[2:], 0])

    def _average(self, node: Node, x_shape: Shape, y_shape: Shape) -> None:
        a = node.attrs
        src = self.dense(self.array(node.inputs[0]), NHWC)
        out = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape, NHWC)
        ints = [*_nhwc(x_shape), *a["kernel"], *a["stride"], *a["padding"], *y_shape[2:]]
        self.emit(node, node.op, [src, out], 1, [*ints, int(a["count_include_pad"]), a["divisor"], 0])

    def _avg_pool(self, node: Node, _: Into) -> None:
        self._average(node, node.inputs[0].shape, node.outputs[0].shape)

    def _avg_pool_adj(self, node: Node, _: Into) -> None:
        self._average(node, node.outputs[0].shape, node.inputs[0].shape)

    # -- moving elements

    def _interleave(self, node: Node, _: Into) -> None:
        a = self.array(node.inputs[0])
        self.env[node.outputs[0]] = self.fresh(a.shape)
        self.copy(a, self.env[node.outputs[0]])

    def _one_hot(self, node: Node, _: Into) -> None:
        labels = self.array(node.inputs[0])
        out = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape)
        a = node.attrs
        real = int(node.inputs[0].dtype == "real")
        ints = [*out.shape, a["ignore_index"], *labels.strides, real, int(a["wraps"])]
        self.emit(node, "one_hot", [labels, out], 1, ints)

    def _pad(self, node: Node, _: Into) -> None:
        x = self.array(node.inputs[0])
        out = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape, memory_order(x.shape, x.strides))
        self.emit(node, "fill", [out], 1, [numel(out.shape)], [0.0])
        self.copy(x, sliced(out, node.attrs))

    def _concat(self, node: Node, _: Into) -> None:
        parts = [self.array(v) for v in node.inputs]
        order = self.layout([p for p in parts if is_dense(p)], parts[0].shape)
        out = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape, order)
        dim, at = node.attrs["dim"], 0
        for p in parts:
            end = at + p.shape[dim]
            self.copy(p, sliced(out, {"dim": dim, "start": at, "stop": end, "step": 1}))
            at = end


def _nhwc(shape: Shape) -> list[int]:
    n, c, h, w = shape
    return [n, h, w, c]


def _block(shape: Shape, order: Sequence[int], dims: Sequence[int]) -> bool:
    """Whether the reduced dims are neighbours in memory (dims of size 1 aside)."""
    at = [i for i, d in enumerate(d for d in order if shape[d] > 1) if d in dims]
    return not at or at[-1] - at[0] + 1 == len(at)
