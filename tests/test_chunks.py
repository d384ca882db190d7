"""A few images at a time: instructions over large arrays as one, done chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import WAYS_OUT, answer, assert_same, inner_loop, metafast_gradients, named
from torch import nn
from zoo import ENTRIES, LR, Entry, Task
from zoo import named as entry_named

import metafast
from metafast.lower.arrays import ARENA, CHUNK, EXTERNAL, STATE_NEXT, Array, Buffer, Instruction
from metafast.lower.chunk import chunk
from metafast.native import captured, make_plan
from metafast.passes import without

_C = pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)


@pytest.fixture
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array counts as large, every convolution as soon made, and weights as small beside images."""
    monkeypatch.setattr("metafast.lower.fuse.LARGE", 1)
    monkeypatch.setattr("metafast.lower.fuse.SMALL", 1)
    monkeypatch.setattr("metafast.lower.writer.LEAST_PART", 1)
    for name, value in {"LEAST": 64, "AIM": 1, "LIGHT": 0, "SOON": 10**9}.items():
        monkeypatch.setattr(f"metafast.lower.chunk.{name}", value)


def program_of(task: Task, order: int = 2, steps: int = 2) -> Any:
    inner = inner_loop(task, "native", metafast.SGD(lr=LR), steps=steps, order=order)
    problem = inner._problem(task.support, task.query, gradient=True)[0]
    return make_plan(problem, captured(problem)).program("fused", steps)


def runs(task: Task, order: int = 2) -> Iterator[Instruction]:
    for code in program_of(task, order).code.values():
        yield from (ins for ins in code if ins.members)


BatchNorm = partial(nn.BatchNorm2d, track_running_stats=False)


class Net(nn.Module):
    """A first layer as conv4 has it, whose images are large, and a second."""

    def __init__(self, channels: int, *, padding: int = 1, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 24, 3, padding=padding)
        self.norm = nn.BatchNorm2d(24, affine=affine, track_running_stats=False)
        self.next = nn.Conv2d(24, 8, 3, padding=1)
        self.last = nn.BatchNorm2d(8, track_running_stats=False)
        self.head = nn.LazyLinear(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.norm(self.conv(x)).relu(), 2)
        return self.head(F.max_pool2d(self.last(self.next(x)).relu(), 2).flatten(1))


def net_task(channels: int, dtype: torch.dtype = torch.float64, images: int = 30, **options: Any) -> Task:
    torch.manual_seed(0)
    model = Net(channels, **options)

    def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(rows).remainder(5).expand(2, rows).contiguous()
        return torch.randn(2, rows, channels, 28, 28, dtype=dtype), labels

    support, query = batch(10), batch(images)
    model(support[0][0].float())
    with torch.no_grad():  # some of either sign: where it is negative, the least value of a window wins
        if options.get("affine", True):
            model.norm.weight[::2] *= -1
    return Task(model.to(dtype), support, query, loss=F.cross_entropy)


# ---- what is computed -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("of_any_size")
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_every_model(entry: Entry, order: int) -> None:
    task = entry.make()
    got = metafast_gradients(inner_loop(task, "native", steps=2, order=order), task, "fused")[1]
    assert_same(got, named(answer(task, order, 2)))


@pytest.mark.usefixtures("of_any_size")
@pytest.mark.parametrize("without_it", ["code", "winners", "spell", "lazy", "parts", "clusters", "reuse"])
@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("name", ["large_images", "wide_conv"])
def test_without_other_passes(name: str, way: str, without_it: str) -> None:
    task = entry_named(name).make()
    with without(without_it):
        got = metafast_gradients(inner_loop(task, "native", steps=2), task, way)[1]
    assert_same(got, named(answer(task, 2, 2)))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("channels", "options"), [(1, {}), (3, {}), (1, {"padding": 0}), (2, {"affine": False})], ids=str
)
def test_images_of_that_size(channels: int, options: dict[str, Any], order: int) -> None:
    """By the sizes that the planner goes by."""
    task = net_task(channels, **options)
    assert any("conv_dw" in [m.kernel for m in run.members] for run in runs(task, order))
    got = metafast_gradients(inner_loop(task, "native", steps=2, order=order), task, "fused")[1]
    assert_same(got, named(answer(task, order, 2)))


def test_float32() -> None:
    task, exact = net_task(1, torch.float32), net_task(1)
    exact.support, exact.query = ((x.double(), y) for x, y in (task.support, task.query))
    exact.model.load_state_dict(task.model.state_dict())
    got = metafast_gradients(inner_loop(task, "native", steps=1), task, "fused")[1]
    # The bias before a BatchNorm, 0 but for rounding, is off by 3e-4 of what it is measured on; the rest by 3e-6.
    assert_same(got, named(answer(exact, 2, 1)), 1e-3)


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    """One task: its chunks are shared."""
    task = net_task(1, torch.float32)
    task.support, task.query = ((x[:1], y[:1]) for x, y in (task.support, task.query))
    found = []
    for n in (1, threads):
        torch.set_num_threads(n)
        try:
            found.append(metafast_gradients(inner_loop(task, "native", steps=2), task, "fused")[1])
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.usefixtures("of_any_size")
def test_what_two_convolutions_make_together() -> None:
    """The second adds to what the first has made: made again by the first alone, it is another array."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1), BatchNorm(4), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3), BatchNorm(4), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).double()
    labels = torch.arange(4).remainder(3).expand(2, 4).contiguous()
    support, query = ((torch.randn(2, 4, 3, 8, 8, dtype=torch.float64), labels) for _ in range(2))
    task = Task(model, support, query, loss=F.cross_entropy)
    got = metafast_gradients(inner_loop(task, "native", steps=2), task, "fused")[1]
    assert_same(got, named(answer(task, 2, 2)))


# ---- what is joined ---------------------------------------------------------------------------------------------


def test_a_first_layer_is_never_in_memory() -> None:
    """Neither what its convolution makes, nor the gradient there: one channel is convolved again on the way back."""
    task = net_task(1, torch.float32)
    images = 30 * 24 * 28 * 28 * 4
    for run in runs(task, order=1):
        for a in run.operands:
            assert a.buffer.space == CHUNK or a.buffer.nbytes < images
    found = program_of(task, order=1).arena_bytes
    with without("chunks"):
        assert program_of(task, order=1).arena_bytes > 2 * found


def test_more_channels_are_not_convolved_again() -> None:
    task = net_task(5, torch.float32)
    assert all(sum(m.kernel == "conv_fwd" for m in run.members) < 2 for run in runs(task, order=1))
    assert any(m.kernel == "conv_fwd" for run in runs(task, order=1) for m in run.members)
    back = [run for run in runs(task, order=1) if any(m.kernel == "conv_dw" for m in run.members)]
    assert back and not any(m.kernel == "conv_fwd" for run in back for m in run.members)


def test_small_images_are_left_alone() -> None:
    assert not list(runs(net_task(1, torch.float32, images=5), order=1))


def copied(source: Array, out: Array, mode: int = 0) -> Instruction:
    """out = source, or with mode 1 out += source, row by row."""
    (rows, columns), walk = source.shape, [source.shape[1], 1]
    return Instruction("pointwise", [source, out], [1], [2, 1, 1, 0, 1, rows, columns, *walk, *walk, 0, mode, 1])


@pytest.mark.usefixtures("of_any_size")
def test_what_is_added_to_is_in_memory() -> None:
    """Of two runs the second adds to what the first has made: in the memory of its own chunks it would find nothing."""
    x, y, z, w, u = (Array(Buffer(256), (4, 16), (16, 1), 4) for _ in range(5))
    between = Instruction("gemm", [z, z, w], [2], [])
    code = [copied(x, y), copied(y, z), between, copied(w, y, mode=1), copied(y, u)]
    first, _, second = chunk(code, {x.buffer, u.buffer})
    assert [len(run.members) for run in (first, second)] == [2, 2]
    assert all(run.members[0].operands[1].buffer is y.buffer for run in (first, second))


@pytest.mark.usefixtures("of_any_size")
def test_a_pass_over_many_parameters_stays_behind_what_makes_one_of_them() -> None:
    """`bundle` makes it begin where the first of them lies."""
    x, y, z = (Array(Buffer(256), (4, 16), (16, 1), 4) for _ in range(3))
    second = Array(Buffer(64, STATE_NEXT, 64), (16,), (1,), 4)
    both, out = Array(Buffer(128, STATE_NEXT, 0), (32,), (1,), 4), Array(Buffer(128), (32,), (1,), 4)
    added = Instruction("reduce", [y, second], [1], [])
    over = Instruction("pointwise", [both, out], [1], [1, 1, 1, 0, 1, 32, 1, 1, 0, 0, 1])
    run, *others = chunk([copied(x, y), added, over, copied(y, z)], {x.buffer, z.buffer, out.buffer})
    assert len(run.members) == 2 and others == [added, over]


# ---- the native half --------------------------------------------------------------------------------------------

N, COUNT = 6, 3  # elements of an array, chunks


def negated(*places: tuple[int, int, int]) -> tuple[Any, ...]:
    """(instruction) out = -in, N / COUNT elements."""
    opcode = _C.pointwise_opcodes().index("neg")
    return ("pointwise", list(places), [1, 1, 1, 1, 2, N // COUNT, 1, 1, 1, 0, opcode, 1, 0, 0, 0, 0], [])


def chunked(*members: tuple[Any, ...], count: int = COUNT, memory: int = 64) -> tuple[Any, ...]:
    return ("chunks", [], [count, memory], [], list(members))


def run_program(instruction: tuple[Any, ...], threads: int = 1) -> np.ndarray:
    x, out = np.arange(1, N + 1, dtype=np.float32), np.zeros(N, np.float32)
    program = _C.Program("f32", {"query": [instruction]}, arena_bytes=64, n_external=2)
    externals = np.array([[x.ctypes.data, 0, 0], [out.ctypes.data, 0, 0]], np.int64)
    assert _C.run(program, externals, T=1, steps=0, threads=threads)[0] == 0
    return out


STRIDE = 4 * N // COUNT


def test_members_follow_each_other_chunk_by_chunk() -> None:
    """What lies in a chunk's memory is its own."""
    there = negated((EXTERNAL, 0, STRIDE), (CHUNK, 16, 0))
    back = negated((CHUNK, 16, 0), (EXTERNAL + 1, 0, STRIDE))
    assert run_program(chunked(there, back)).tolist() == [1, 2, 3, 4, 5, 6]
    assert run_program(chunked(there, back, back, there), threads=2).tolist() == [1, 2, 3, 4, 5, 6]


def test_an_operand_without_a_stride_is_the_same_for_all() -> None:
    assert run_program(chunked(negated((EXTERNAL, 8, 0), (EXTERNAL + 1, 0, STRIDE)))).tolist() == [-3, -4] * 3


def test_the_listing_names_members() -> None:
    member = negated((EXTERNAL, 0, STRIDE), (EXTERNAL + 1, 0, STRIDE))
    text = _C.Program("f32", {"query": [chunked(member)]}, n_external=2).dump()
    assert "chunks" in text and "pointwise [1 1 1 1 2 2" in text


def test_a_failure_in_a_chunk_is_one_of_the_instruction() -> None:
    labels, out = np.array([0, 1, 7], np.int64), np.zeros((3, 2), np.float32)
    one_hot = ("one_hot", [(EXTERNAL, 0, 8), (EXTERNAL + 1, 0, 8)], [1, 2, -100, 1, 0, 0], [])
    program = _C.Program("f32", {"query": [chunked(one_hot)]}, n_external=2)
    externals = np.array([[labels.ctypes.data, 0, 0], [out.ctypes.data, 0, 0]], np.int64)
    status, *_, section, instruction = _C.run(program, externals, T=1, steps=0)
    assert (status, section, instruction) == (1, "query", 0)


X, Y = (EXTERNAL, 0, STRIDE), (EXTERNAL + 1, 0, STRIDE)
ILL_FORMED = {
    "no members": (("chunks", [], [3, 0], [], []), "members, and nothing else"),
    "no chunks": (chunked(negated(X, Y), count=0), "1 to .* chunks"),
    "negative memory": (chunked(negated(X, Y), memory=-1), "got 3 of -1"),
    "operands of its own": (("chunks", [X], [3, 0], [], [negated(X, Y)]), "nothing else"),
    "members of members": (chunked(chunked(negated(X, Y))), "no members of its own"),
    "members of a kernel": ((*negated(X, Y), [negated(X, Y)]), "only `chunks` has members"),
    "beyond a chunk": (chunked(negated(X, (CHUNK, 60, 0))), r"member 0 \(pointwise\).*the space has 64"),
    "a chunk's memory moves": (chunked(negated(X, (CHUNK, 0, 64))), "the space has 64"),
    "outside of chunks": (negated(X[:2], (CHUNK, 0)), "may not be used in this section"),
    "a stride of one instruction": (negated(X, (EXTERNAL + 1, 0)), "only members of `chunks` have one"),
    "beyond the arena": (chunked(negated(X, (ARENA, 0, 32))), "bytes 0 to 72 are written"),
    "one over the other": (chunked(negated(X, (EXTERNAL + 1, 0, 4))), "chunks of 8 bytes are written 4 apart"),
    "backwards": (chunked(negated((EXTERNAL, 16, -8), Y)), "a stride of at least 0"),
    "misaligned": (chunked(negated((EXTERNAL, 0, 6), Y)), "a multiple of the element's bytes"),
    "unknown member": (chunked(("frobnicate", [], [], [])), r"member 0 \(frobnicate\): no kernel of this name"),
}  # fmt: skip


@pytest.mark.parametrize("case", ILL_FORMED)
def test_ill_formed_chunks_are_refused(case: str) -> None:
    instruction, message = ILL_FORMED[case]
    with pytest.raises(ValueError, match=message):
        _C.Program("f32", {"query": [instruction]}, arena_bytes=64, n_external=2)
