"""The fused kernel against its reference, eager torch, in each of its three builds; and what happens without a
compiler.

The values themselves are checked against exact oracles in test_quantization.py, for both implementations.
"""

import logging
import os
import shutil
import stat
import subprocess
import sys
from itertools import product
from pathlib import Path
from threading import Event, Timer

import pytest
import torch

from spaces.formats import FORMATS
from tests.test_quantization import ALL, CLASSES, DTYPES, assert_same, sample
from trainable import quantization
from trainable.kernels import cpu
from trainable.quantization import fake_quantize, fake_quantize_eager

COMPARE = """
import torch
from spaces.formats import FORMATS
from tests.test_quantization import ALL, CLASSES, DTYPES, assert_same, sample
from trainable.hadamard import rotate_eager
from trainable.kernels import cpu
from trainable.noised import Drawn, noised, noised_eager
from trainable.philox import normals
from trainable.quantization import AS_IT_IS, Arithmetic, fake_quantize, fake_quantize_eager

kernels = cpu.load()
assert kernels is not None
for fmt, rule in ALL:
    for kind in CLASSES:
        for dtype in DTYPES:
            x = sample(kind, fmt, dtype)
            assert_same(fake_quantize(x, fmt, rule), fake_quantize_eager(x, fmt, rule))
gate, up = (4 * torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
assert torch.equal(kernels.swiglu(gate, up, -1, 0, False), torch.nn.functional.silu(gate) * up)
assert torch.equal(kernels.rotate(gate), rotate_eager(gate))
for dtype in (torch.float32, torch.bfloat16):
    base, drawn = gate.to(dtype), Drawn(key=2**63 + 5, sigma=0.3, unit=torch.rand(512) + 0.1)
    assert_same(noised(base, drawn, Arithmetic().input)[0], noised_eager(base, drawn, Arithmetic().input)[0])
assert torch.equal(noised(torch.zeros(10**6), Drawn(key=7, sigma=1.0), AS_IT_IS)[0], normals(7, 0, 10**6))
print(torch.backends.cpu.get_cpu_capability())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["default", "avx2", "avx512"])
def test_each_build_equals_eager_torch(vectors: str) -> None:
    if vectors == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this machine has no AVX-512")
    done = run(COMPARE, ATEN_CPU_CAPABILITY=vectors)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == vectors.upper()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("fmt", "rule"), ALL)
@pytest.mark.parametrize("shape", [(0, 64), (1, 32), (32,), (3, 5, 7, 96), (1000, 1056)], ids=str)
def test_odd_shapes_with_any_number_of_threads(fmt: str, rule: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    before = torch.get_num_threads()
    try:
        for per_tensor in (False, True) if x.numel() and fmt == "nvfp4" else (False,):
            expected = fake_quantize_eager(x, fmt, rule, per_tensor=per_tensor)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert_same(fake_quantize(x, fmt, rule, per_tensor=per_tensor), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_bf16_is_exact_for_every_value_beside_every_largest_one() -> None:
    """All 2^16 values, each in a block with each binade's largest elements: the integer arithmetic has no corner
    left."""
    for top in range(0x0000, 0x7F80, 0x20):  # bits of a largest element: each binade at 4 mantissas
        below = (
            torch.arange(top + 1, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        )  # all that can lie beside it
        values = torch.cat([below, -below, below[:1].expand(-2 * len(below) % 31)]).reshape(-1, 31)
        x = torch.cat([below[-1].expand(len(values), 1), values], 1).contiguous()
        for fmt, rule in product(("mxfp4", "mxfp8"), ("floor", "even", "rceil", "ceil")):
            assert_same(fake_quantize(x, fmt, rule), fake_quantize_eager(x, fmt, rule))


@pytest.mark.parametrize("largest", [147.0, 189.0, 231.0, 3.21875], ids=str)
def test_nvfp4_in_bf16_where_results_lie_halfway_and_scales_are_subnormal(largest: float) -> None:
    """With an amax of 21 n the outer scale has so few bits that products with it lie halfway between two numbers of
    bf16."""
    source = torch.Generator().manual_seed(0)
    tops = torch.exp2(
        20 * torch.rand(200, 40, 1, generator=source) - 20
    )  # of blocks, down to E4M3's subnormals and below
    x = largest * tops * (2 * torch.rand(200, 40, 16, generator=source) - 1)
    x[:, 7, 3] = largest
    x = x.flatten(1).bfloat16()
    exact = fake_quantize_eager(x.float(), "nvfp4")
    halfway = int(((exact.view(torch.int32) & 0xFFFF) == 0x8000).sum())
    assert halfway > 1000 or largest % 21 > 0
    for per_tensor in (False, True):
        assert_same(
            fake_quantize(x, "nvfp4", per_tensor=per_tensor), fake_quantize_eager(x, "nvfp4", per_tensor=per_tensor)
        )


def test_a_code_that_no_format_has_is_refused() -> None:
    kernels, x = cpu.load(), torch.zeros(2, 32)
    assert kernels is not None
    for code in (-2, -1, 3):
        with pytest.raises(ValueError, match=f"no format has the code {code}"):
            kernels.fake_quantize(x, code, 0, False)
    for code in (-2, 3):  # -1: its output stays as it is
        with pytest.raises(ValueError, match=f"no format has the code {code}"):
            kernels.swiglu(x, x, code, 0, False)


def test_views_are_quantised_as_their_copies() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for view in (x.t(), x[::2], x[:, 32:], x.expand(2, 64, 64)):
        assert torch.equal(fake_quantize(view), fake_quantize(view.clone()))


def test_the_operator_has_no_gradient_and_a_fake_for_the_compiler() -> None:
    assert cpu.load() is not None
    x = torch.randn(4, 64, requires_grad=True)
    assert not torch.ops.rin.fake_quantize(x, FORMATS["mxfp4"].code, 0, False).requires_grad
    assert not fake_quantize(x).requires_grad
    torch.library.opcheck(torch.ops.rin.fake_quantize.default, (x.detach(), 0, 0, False))


@pytest.mark.slow
def test_it_can_be_compiled_around() -> None:
    """In a process of its own: the compiler does not see through what counts coverage in this one."""
    code = (
        "import torch\n"
        "from trainable.quantization import fake_quantize\n"
        "layer = lambda x, weight: fake_quantize(x) @ fake_quantize(weight).t()\n"
        "x, weight = torch.randn(8, 64), torch.randn(32, 64)\n"
        "eager = layer(x, weight)\n"  # the kernels are loaded at their first use, which is not to be compiled
        "compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)\n"
        "assert torch.equal(compiled(x, weight), eager)\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


# --- building it ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so_and_the_values_stay(tmp_path: Path) -> None:
    code = (
        "import logging; logging.basicConfig(format='%(message)s')\n"
        "import torch\n"
        "from trainable.quantization import fake_quantize, fake_quantize_eager\n"
        "x = torch.randn(4, 64)\n"
        "assert torch.equal(fake_quantize(x), fake_quantize_eager(x))\n"
        "fake_quantize(x)\n"
    )
    done = run(code, RIN_CACHE=str(tmp_path), PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "no C++ compiler" in done.stderr
    assert "install g++" in done.stderr


def test_a_compiler_that_fails_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo broken 1.0;; *) echo "x.cpp:1: error: no luck" >&2; exit 1;; esac\n'
    )
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("RIN_CACHE", str(tmp_path))
    with pytest.raises(cpu.CannotCompile, match=r"broken-c\+\+: x.cpp:1: error: no luck"):
        cpu.build()
    assert not list(tmp_path.glob("kernels/*.so"))


def test_a_cache_that_cannot_be_written_is_a_reason_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(cpu.CannotCompile, match="cannot be written"):
        cpu.build()


@pytest.mark.slow
def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    """The compiler is played by a script that counts its runs, and makes each last long enough for the others to
    come."""
    log, wrapper = tmp_path / "log", tmp_path / "c++"
    asked = 'while [ "$1" != -o ]; do shift; done; cp'
    wrapper.write_text(
        f'#!/bin/sh\n[ "$1" != --version ] || exec c++ --version\necho run >> {log}\n'
        f'sleep 3\n{asked} {cpu.build()} "$2"\n'
    )
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"CXX": str(wrapper), "RIN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", "from trainable.kernels import cpu; assert cpu.load() is not None"]
    started = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    assert log.read_text() == "run\n"


def test_other_sources_and_flags_are_other_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = cpu.build()
    assert cpu.build() == first
    changed = tmp_path / "kernels"
    shutil.copytree(cpu.SOURCES, changed)
    (changed / "blocks.h").write_text((changed / "blocks.h").read_text() + "// changed\n")
    monkeypatch.setattr(cpu, "SOURCES", changed)
    monkeypatch.setattr(cpu, "_compile", lambda compiler, flags, library: None)
    assert cpu.build() != first


def test_the_kernel_is_what_runs_here(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise the comparisons above compare eager torch with itself."""
    with caplog.at_level(logging.WARNING):
        assert cpu.load() is not None
    assert not [record for record in caplog.records if "without" in record.message]
    monkeypatch.setattr(quantization, "fake_quantize_eager", None)
    fake_quantize(torch.zeros(1, 32))


@pytest.mark.parametrize("kind", CLASSES)
def test_eager_and_fused_agree_with_one_scale_per_tensor(kind: str) -> None:
    x = sample(kind, "nvfp4")
    assert_same(fake_quantize(x, "nvfp4", per_tensor=True), fake_quantize_eager(x, "nvfp4", per_tensor=True))


def test_a_compiler_that_was_started_early_is_waited_for_and_compiles_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    begun, go_on = Event(), Event()

    def compiled(compiler: str, flags: tuple[str, ...], library: Path) -> None:
        begun.set()
        assert go_on.wait(30)
        library.write_text("")
        made.append(library)

    monkeypatch.setenv("RIN_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_compile", compiled)
    cpu.build_meanwhile()
    assert begun.wait(30)
    Timer(0.05, go_on.set).start()
    assert [cpu.build()] == made
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    cpu.build_meanwhile()  # whoever needs them says what is wrong
