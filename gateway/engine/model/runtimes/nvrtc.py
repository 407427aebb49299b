"""Compile CUDA sources with NVRTC, the compiler that comes with torch's build for CUDA, and launch the kernels."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeAlias

import torch

Launch: TypeAlias = Callable[[tuple[int, int, int], Sequence[torch.Tensor | int | float]], None]
"""Launches a kernel on the current stream: the blocks of its grid, and its arguments."""


def compile_kernel(source: str, name: str, threads: int, device: torch.device) -> Launch:
    """Compile a kernel for a card, and return its launcher.

    Args:
        threads: number of threads in a block.

    Raises:
        OSError: the compiler's library is not installed.
        RuntimeError: the compiler rejects the source, or the driver rejects the result.
    """
    driver, kernel = _load(source, name, device)

    def launch(grid: tuple[int, int, int], args: Sequence[torch.Tensor | int | float]) -> None:
        arguments = [_argument(value) for value in args]
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        with torch.cuda.device(device):  # the context in which the kernel was loaded
            _require_driver(driver, driver.cuLaunchKernel(kernel, *grid, threads, 1, 1, 0, stream, pointers, None))

    return launch


@cache
def _load(source: str, name: str, device: torch.device) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """Return the driver, and a kernel in a card's memory, where it stays: models of one shape share it, also later ones.

    Raises:
        OSError, RuntimeError: as :func:`compile_kernel`.
    """
    binary = machine_code(source, torch.cuda.get_device_capability(device))
    driver = ctypes.CDLL("libcuda.so.1")
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.empty(1, device=device)  # creates torch's context, if it does not exist yet
        _require_driver(driver, driver.cuModuleLoadData(ctypes.byref(module), binary))
        _require_driver(driver, driver.cuModuleGetFunction(ctypes.byref(kernel), module, name.encode()))
    return driver, kernel


def _argument(value: torch.Tensor | int | float) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_double:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_double(value)


def _require_driver(driver: ctypes.CDLL, code: int) -> None:
    if code:
        message = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(message))
        raise RuntimeError(f"CUDA driver error: {(message.value or str(code).encode()).decode()}")


@lru_cache(maxsize=128)
def machine_code(source: str, capability: tuple[int, int]) -> bytes:
    """Return a source as machine code. It is compiled once: a model that is loaded again on demand does not wait for that.

    Raises:
        OSError: the compiler's library is not installed.
        RuntimeError: the compiler rejects the source.
    """
    return compile_source(load_compiler(), source, capability)


def load_compiler() -> ctypes.CDLL:
    """Return NVRTC's library, which comes with torch.

    Raises:
        OSError: the library is not installed.
    """
    major = (torch.version.cuda or "").partition(".")[0]
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or ())
    paths = [path for root in roots for path in sorted(Path(root).glob(f"*/lib/libnvrtc.so.{major}"))]
    return open_compiler(paths[0] if paths else Path(f"libnvrtc.so.{major}"))


def open_compiler(path: Path) -> ctypes.CDLL:
    """Return NVRTC's library from a file.

    Raises:
        OSError: the library cannot be loaded.
    """
    # NVRTC looks up its builtins by name only, and does not find them in a package's folder unless they are loaded.
    if path.is_absolute():
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(path))


def compile_source(compiler: ctypes.CDLL, source: str, capability: tuple[int, int]) -> bytes:
    """Compile a source to machine code, which, unlike PTX, runs with every driver of the same major version of CUDA.

    Raises:
        RuntimeError: the compiler rejects the source; the message has the start of its log.
    """
    program = ctypes.c_void_p()
    _check(compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"gateway.cu", 0, None, None))
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode())
        if compiler.nvrtcCompileProgram(program, 1, options):
            raise RuntimeError(f"NVRTC: {_read(compiler, program, 'ProgramLog').decode(errors='replace')[:300]}")
        return _read(compiler, program, "CUBIN")
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def _read(compiler: ctypes.CDLL, program: ctypes.c_void_p, output: str) -> bytes:
    size = ctypes.c_size_t()
    _check(compiler[f"nvrtcGet{output}Size"](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(compiler[f"nvrtcGet{output}"](program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC: error {code}")
