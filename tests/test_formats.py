"""The table of formats is that of the kernels' sources, which have constants of their own."""

import re
import struct
from pathlib import Path

import pytest

from spaces.config import MODES, QuantConfig
from spaces.formats import E2M1, E4M3, FORMATS, Element
from trainable.kernels import cpu

QUANTISED = [form for form in FORMATS.values() if form.element is not None]


def source(name: str) -> str:
    return (Path(cpu.__file__).parent / name).read_text(encoding="utf-8")


def fp32(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


@pytest.mark.parametrize(("name", "element"), [("E2M1", E2M1), ("E4M3", E4M3)])
def test_the_grids_of_the_cpu_kernels_are_those_of_the_table(name: str, element: Element) -> None:
    found = re.search(
        rf"(?s)struct {name} {{.*?mantissa = (\d+), emax = (\d+);.*?smallest_normal = (\w+), largest = (\w+);",
        source("blocks.h"),
    )
    assert found is not None
    mantissa, emax, smallest_normal, largest = (int(text, 0) for text in found.groups())
    assert (mantissa, emax) == (element.mantissa_bits, element.largest_exponent)
    assert (smallest_normal, largest) == (fp32(element.smallest_normal), fp32(element.largest))


def test_the_codes_names_and_blocks_of_the_cpu_kernels_are_those_of_the_table() -> None:
    header = source("fake_quantize.h")
    codes = re.search(r"enum Format : int64_t {([^}]*)}", header)
    names = re.search(r"kNames\[\] = {([^}]*)}", header)
    blocks = re.search(r"kBlocks\[\] = {([^}]*)}", header)
    assert codes is not None
    assert names is not None
    assert blocks is not None
    assert [form.code for form in FORMATS.values()] == list(range(-1, len(QUANTISED)))
    assert codes[1].replace(" ", "") == ",".join(["kNone=-1", *(f"k{form.name.capitalize()}" for form in QUANTISED)])
    assert names[1].replace('"', "").split(", ") == [form.name for form in QUANTISED]
    assert [int(block) for block in blocks[1].split(",")] == [form.block for form in QUANTISED]


def test_the_grids_of_the_cuda_kernels_are_those_of_the_table() -> None:
    kernels = source("cuda_blocks.py")
    meant = {
        "SMALLEST_NORMAL": lambda element: fp32(element.smallest_normal),
        "LARGEST": lambda element: fp32(element.largest),
        "EMAX": lambda element: element.largest_exponent,
    }
    for name, of in meant.items():
        found = re.search(rf"{name}: tl\.constexpr = (\w+) if MANTISSA == (\d) else (\w+)", kernels)
        assert found is not None, name
        narrow, mantissa, wide = (int(text, 0) for text in found.groups())
        assert mantissa == E2M1.mantissa_bits
        assert (narrow, wide) == (of(E2M1), of(E4M3))
    codes = {(int(code), call) for code, call in re.findall(r"FORMAT == (\d):\n\s+y = .*?\b(mx|nv)\(", kernels)}
    assert codes == {(form.code, "mx" if form.scale is None else "nv") for form in QUANTISED}


def test_modes_are_named_by_their_bits() -> None:
    assert {mode: QuantConfig(**settings).mode for mode, settings in MODES.items()} == {mode: mode for mode in MODES}
    assert [FORMATS[name].bits for name in ("none", "mxfp4", "mxfp8", "nvfp4")] == [16, 4, 8, 4]
