"""Where the tests of the kernels run them: in this process or, with METAFAST_TEST_MACHINE, in an emulated one."""

from __future__ import annotations

import atexit
import os
import shlex
import struct
import subprocess
from collections.abc import Sequence
from typing import Protocol

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)


class Machine(Protocol):
    def isas(self) -> list[str]: ...

    def run_kernel(
        self, name: str, dtype: str, isa: str, operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float],
        parts: int = 1,
    ) -> int:  # fmt: skip
        """Run one kernel on the tensors' memory; its status."""
        ...


class Here:
    """This process."""

    def isas(self) -> list[str]:
        return _C.isas()

    def run_kernel(self, name, dtype, isa, operands, ints, floats, parts=1):
        return _C.run_kernel(name, dtype, isa, [t.data_ptr() for t in operands], ints, floats, parts=parts)


class Piped:
    """A process with csrc/bindings/run_kernels.cpp: whole storages, guards included, go there and come back."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(self.process.communicate)

    def isas(self) -> list[str]:
        return ["best"]

    def run_kernel(self, name, dtype, isa, operands, ints, floats, parts=1):
        storages = {t.untyped_storage().data_ptr(): bytes_of(t) for t in operands}
        order = list(storages)
        counts = [dtype == "f64", parts, len(name), len(storages), len(operands), len(ints), len(floats)]
        sizes = [s.numel() for s in storages.values()]
        places = [
            p for t in operands for p in (order.index(t.untyped_storage().data_ptr()), t.storage_offset() * t.itemsize)
        ]
        request = struct.pack("7q", *counts) + name.encode()
        request += struct.pack(f"{len(sizes) + len(places) + len(ints)}q", *sizes, *places, *ints)
        request += struct.pack(f"{len(floats)}d", *floats)
        self.process.stdin.write(request + b"".join(s.numpy().tobytes() for s in storages.values()))
        self.process.stdin.flush()
        (status,) = struct.unpack("q", self._read(8))
        if status < 0:
            raise ValueError(f"{name}: refused; the emulated process says why")
        for storage in storages.values():
            storage.copy_(
                torch.frombuffer(bytearray(self._read(storage.numel()) or b" "), dtype=torch.uint8)[: storage.numel()]
            )
        return status

    def _read(self, count: int) -> bytes:
        got = self.process.stdout.read(count)
        if len(got) < count:
            raise RuntimeError(f"the emulated process ended with {self.process.wait()}")
        return got


def bytes_of(t: Tensor) -> Tensor:
    """The whole storage of a tensor, as bytes that share its memory."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


COMMAND = os.environ.get("METAFAST_TEST_MACHINE")
MACHINE: Machine = Piped(COMMAND) if COMMAND else Here()
