"""A CUDA GPU that is not there: Inductor emits Triton for it, Triton compiles cubins.

Test-only patches of PyTorch and Triton, most of them of private names, so they hold for the pinned
versions alone. Nothing is ever launched: tensors are fake, no driver is loaded, no stream exists.
For a process of its own, since PyTorch caches what it learns about devices.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.cpp_extension import include_paths, library_paths

__all__ = ["ARCHES", "PINNED", "Cubin", "fake_gpu", "gpu_attention", "padded", "unfit"]

PINNED = {"torch": "2.13", "triton": "3.7"}
"""Versions that the patches were written for."""

ARCHES = {80: ("NVIDIA A100", 108, 166_912), 90: ("NVIDIA H100", 132, 232_448)}
"""Compute capability -> name, multiprocessors, bytes of shared memory that a block may take."""

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""


@dataclass(frozen=True)
class Cubin:
    """One Triton kernel, compiled.

    Attributes:
        name: of the kernel; arch: compute capability; size: of its cubin in bytes.
        arguments: its signature, name -> Triton's type, constants excepted.
    """

    name: str
    arch: int
    size: int
    arguments: dict[str, str]


def unfit() -> str | None:
    """Why this process cannot lower for a GPU, or None: it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "Triton's wheels with ptxas are for Linux on x86-64"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install -e '.[triton]'"
    if torch.cuda.is_available():
        return "there is a GPU: its own driver would answer, not the fake one"
    for name, pinned in PINNED.items():
        found = metadata.version(name)
        if not found.startswith(f"{pinned}."):
            return f"patches of private names are for {name} {pinned}, this is {found}"
    return None


def _register_guard() -> None:
    """Register a device guard that does nothing: a CPU build has none for CUDA.

    Without it, indexing a fake CUDA tensor fails before fake tensors are asked.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        command = [os.environ.get("CXX", "g++"), "-std=c++20", "-shared", "-fPIC", str(source)]
        command += [f"-I{path}" for path in include_paths()]
        command += [f"-L{path}" for path in library_paths()]
        subprocess.run([*command, "-lc10", "-o", str(library)], check=True)
        ctypes.CDLL(str(library))


@contextmanager
def fake_gpu(arch: int, compiled: Callable[[Cubin], None]) -> Iterator[None]:
    """Inside, PyTorch sees one GPU of compute capability ``arch``.

    ``compiled`` is told of every kernel.
    """
    reason = unfit()
    if reason is not None:
        raise RuntimeError(reason)
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    name, processors, shared = ARCHES[arch]
    properties = SimpleNamespace(
        name=name,
        major=arch // 10,
        minor=arch % 10,
        multi_processor_count=processors,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65_536,
        warp_size=32,
    )

    class Driver(CudaDriver):  # type: ignore[misc]
        """Tells the target; the real one would load libcuda."""

        def __init__(self) -> None:
            limits = {"max_shared_mem": shared, "multiprocessor_count": processors}
            self.utils = SimpleNamespace(get_device_properties=lambda _: limits)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, properties.warp_size)

        def get_current_device(self) -> int:
            return 0

    def precompile(kernel: Any, *_: Any, **__: Any) -> None:
        # a GPU would choose among the configurations by running them
        kernel.configs = kernel.configs and kernel.configs[:1]
        kernel._precompile_worker()
        (result,) = kernel.compile_results
        arguments = {
            name: kind
            for name, kind in kernel.triton_meta["signature"].items()
            if kind != "constexpr"
        }
        binary = result.kernel.asm["cubin"]
        assert binary.startswith(b"\x7fELF")
        target = result.kernel.metadata.target
        compiled(Cubin(kernel.fn.__name__, target.arch, len(binary), arguments))

    state = torch.zeros(16, dtype=torch.uint8)
    patches: list[tuple[Any, str, Any]] = [
        # what PyTorch, Inductor and transformers ask before they do anything for CUDA
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        # the same function, which Inductor's device interface took at its import
        (CudaInterface, "get_device_properties", lambda device=None: properties),
        # Inductor's cache key takes the device's name on CUDA, another field without
        (torch.version, "cuda", "12.8"),
        # Dynamo and AOTAutograd save and restore the state of the generator
        (torch.cuda, "get_rng_state", lambda device="cuda": state),
        (torch.cuda, "set_rng_state", lambda new_state, device="cuda": None),
        # Inductor's passes run with the graph's device as the current one
        (torch.cuda, "_exchange_device", lambda device: 0),
        (torch.cuda, "_maybe_exchange_device", lambda device: 0),
        # fake tensors take the way of a build without CUDA, where constants stay on the CPU
        (FakeTensorMode, "avoid_device_init", True),
        # output code imports it
        (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
        # Inductor makes CUDA graphs only where freed memory is kept
        (torch._C, "_cuda_cudaCachingAllocator_is_enabled", lambda: True),
        # compiles cubins, makes no launchers: these load them with libcuda
        (CachingAutotuner, "precompile", precompile),
        # Triton and Inductor ask for the target and its limits
        (driver, "_active", Driver()),
    ]
    _register_guard()
    with ExitStack() as stack:
        for owner, attribute, value in patches:
            create = not hasattr(owner, attribute)
            stack.enter_context(mock.patch.object(owner, attribute, value, create=create))
        yield


ALIGNED = 8
"""Elements that the strides of a mask are to be multiples of, for ATen's fused attention."""


@contextmanager
def gpu_attention() -> Iterator[None]:
    """Inside, what is traced calls the fused attention that a GPU takes where there is a mask.

    A CPU build knows none of them, and takes ``scaled_dot_product_attention`` apart. What ATen does
    to a mask beforehand is done here as in its ``attention.cpp``: a bool one becomes additive, one
    whose strides are no multiples of 8 is copied into one that has such.
    """
    operator: Any = torch.ops.aten.scaled_dot_product_attention.default
    operator._dispatch_cache.clear()
    key = DispatchKey.CompositeImplicitAutograd
    with mock.patch.dict(operator.py_kernels, {key: _fused_attention}):
        yield
    operator._dispatch_cache.clear()


def padded(mask: Tensor) -> bool:
    """Whether ATen copies an additive mask, in every call."""
    *outer, last = mask.stride()
    return last != 1 or not all(statically_known_true(step % ALIGNED == 0) for step in outer)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        share = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(share, 1) for x in (key, value))
    mask = attn_mask
    if mask is not None:
        if mask.dtype == torch.bool:
            nothing = torch.zeros((), dtype=query.dtype, device=query.device)
            mask = torch.where(mask, nothing, -torch.inf)
        if padded(mask):
            length = mask.shape[-1]
            mask = torch.nn.functional.pad(mask, (0, ALIGNED - length % ALIGNED))[..., :length]
        mask = mask.expand(*query.shape[:3], key.shape[2])
    fused: Any = torch.ops.aten._scaled_dot_product_efficient_attention.default
    out: Tensor = fused(query, key, value, mask, False, dropout_p, is_causal, scale=scale)[0]
    return out
