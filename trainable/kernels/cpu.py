"""Compile the fused CPU kernels at first use, and keep them.

One compiler run of about 20 seconds, for the widest vectors that torch itself finds on this machine (AVX-512, AVX2 or
plain C++; ATEN_CPU_CAPABILITY chooses a lesser one). The library lies in the cache folder under a name made of all that
it depends on, so another Python, torch, compiler or kind of machine that shares the folder gets its own; a file lock
keeps two processes from compiling it twice. Without a compiler one line says so, and eager torch computes the same,
more slowly.

    module.cpp        the library: the way in for Python
    vectors.h         vectors of the compiler
    tensors.h         new tensors, checks
    blocks.h          what the formats have in common: grids and rounding
    mx.h              blocks of MXFP4 and MXFP8
    nvfp4.h           blocks of NVFP4
    hadamard.h        the rotation of operands, and its backward pass
    fake_quantize.h   fake quantisation of a tensor, with the straight-through estimator
    rms_norm.h        RMSNorm with quantised output, and its backward pass
    swiglu.h          SwiGLU with quantised output, and its backward pass
    rotary.h          rotary position embedding, and its backward pass
    attention.h       one new token's attention over the key/value cache
    philox.h          normal numbers of a counter-based generator
    noised.h          a weight with noise: drawn, added, cast and quantised
"""

import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from filelock import FileLock
from torch import Tensor

from spaces.cache import cache_folder

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
_VECTORS = {
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    "AVX2": ("-march=x86-64-v3", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
}
"""The macros choose among the vector functions in torch's headers, as they did when torch was built."""
# Contraction of a * b + c would skip a rounding on which the kernel rests.
_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden")
_LIBRARIES = ("-ltorch_cpu", "-ltorch_python", "-lc10")

Kernel = Callable[[Tensor, int, int, bool], Tensor]
"""(x, code of the format, addend of the scale rule, one outer scale for all of x) -> x on the grid, without gradient.

Raises ValueError if the block does not divide the last dimension.
"""


class Kernels(Protocol):
    """What the library computes. All tensors are on the CPU; but for those of the first two, they are fp32."""

    fake_quantize: Kernel

    def ste_quantize(self, x: Tensor, code: int, addend: int, per_tensor: bool, /) -> Tensor:
        """`fake_quantize` with the identity as its gradient."""

    def rotate(self, x: Tensor, /) -> Tensor:
        """x [.., n] in the basis of the Hadamard matrix, n a multiple of 32; fp32, with its gradient."""

    def rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        epsilon: float,
        code: int,
        addend: int,
        rotated: bool,
        /,
    ) -> Any:  # a tuple for a residual, else a tensor: overloads of a protocol would say it three times
        """Q(RMSNorm(x)) [.., n], n a multiple of 16; with a residual Q(RMSNorm(x + residual)) and x + residual.
        Code -1: no Q; rotated: Q(RMSNorm(x) H)."""

    def swiglu(self, gate: Tensor, up: Tensor, code: int, addend: int, rotated: bool, /) -> Tensor:
        """Q(silu(gate) * up) [.., n], n a multiple of 16; rotated: Q((silu(gate) * up) H)."""

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, /) -> Tensor:
        """x [tokens, heads, D] by the angles of its tokens, cos and sin [tokens, D]."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        starts: Tensor,
        filled: int,
        scale: float,
        /,
    ) -> Tensor:
        """One new token of every row, without gradient; `keys` and `values` grow by it (see attention.h)."""

    def noised(
        self,
        base: Tensor,
        clean: Tensor | None,
        units: Tensor | None,
        key: int,
        start: int,
        sigma: float,
        code: int,
        addend: int,
        per_tensor: bool,
        /,
    ) -> tuple[Tensor, Tensor]:
        """Q(base + noise), fp32 or bf16, and [squared change against `clean`, elements changed] in fp64, without
        gradient (see trainable/noised.py); code -1: no Q. `start` is a multiple of 4."""


class CannotCompile(Exception):
    """No compiler, or one that fails; the reason in one line."""


@functools.cache
def load() -> Kernels | None:
    """The kernels, compiled where nobody has yet; None where that cannot be done, which is logged once."""
    try:
        library = build()
    except CannotCompile as reason:
        log.warning(
            "4-bit arithmetic without its fused kernel, some 20 times slower: %s; install g++ to have it", reason
        )
        return None
    spec = importlib.util.spec_from_file_location("rin_kernels", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)  # which registers the operator
    torch.library.register_fake("rin::fake_quantize", lambda x, code, addend, per_tensor: torch.empty_like(x))
    return cast(Kernels, module)


def build_meanwhile() -> None:
    """Begin to compile, beside whatever else is to be made before the kernels are needed; who needs them waits."""

    def attempt() -> None:
        with suppress(CannotCompile):  # `load` says so
            build()

    threading.Thread(target=attempt, name="compiler", daemon=True).start()


def build() -> Path:
    """The compiled library. Raises CannotCompile."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which(compiler) is None:
        raise CannotCompile(f"no C++ compiler ({compiler or 'c++, g++, clang++'})")
    flags = (*_FLAGS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ("-DCPU_CAPABILITY=DEFAULT",)))
    version = _run([compiler, "--version"])
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    key = "\n".join((*sources, *flags, version, torch.__version__, sys.version))
    folder = cache_folder() / "kernels"
    library = folder / f"rin-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock")):
            if not library.exists():
                log.warning("compiling the 4-bit kernels for this machine, once: about 20 seconds")
                _compile(compiler, flags, library)
    except OSError as error:
        raise CannotCompile(f"{folder} cannot be written ({error.strerror})") from error
    return library


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths  # half a second, and rarely needed

    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        headers = [*include_paths(), sysconfig.get_path("include")]
        places = [*(f"-I{path}" for path in headers), *(f"-L{path}" for path in library_paths())]
        _run([compiler, *flags, *places, str(SOURCES / "module.cpp"), "-o", str(made), *_LIBRARIES])
        made.replace(library)  # whole or not at all


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
        raise CannotCompile(f"{command[0]}: {said.strip()}")
    return done.stdout
