"""The formats of an operand, once: their grids, blocks, and the numbers by which the fused kernels know them.

OCP Microscaling Formats (MX) v1.0: MXFP4 and MXFP8 in blocks of 32 under a power of two. NVFP4 (arXiv 2509.25149):
blocks of 16 under an E4M3 scale. What they mean for a tensor is said in trainable/quantization.py; the C++ and Triton
sources have constants of their own, and a test compares them with these.
"""

import math
from dataclasses import dataclass

_FRACTION_BITS = 23  # of fp32
_SCALE_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """The grid of a tiny float without Inf: all +- k * step, with the step of each binade."""

    bits: int
    """Sign, exponent and mantissa together."""
    mantissa_bits: int
    smallest_normal: float
    largest: float

    @property
    def smallest_step(self) -> float:
        """Distance of neighbours among the subnormals and in the first binade."""
        return self.smallest_normal * 2.0**-self.mantissa_bits

    @property
    def largest_exponent(self) -> int:
        """emax: the exponent of the largest value."""
        return math.frexp(self.largest)[1] - 1

    @property
    def largest_fraction(self) -> int:
        """Fraction bits that the largest value has in fp32."""
        mantissa, _ = math.frexp(self.largest)
        return round((2 * mantissa - 1) * (1 << _FRACTION_BITS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a block is stored."""

    name: str
    code: int
    """By which the fused kernels know it."""
    element: Element | None
    """None: the tensor passes untouched."""
    block: int
    """Elements that share a scale."""
    scale: Element | None = None
    """None: a power of two (E8M0). Otherwise the grid of the block scale, under an fp32 outer scale."""

    @property
    def bits(self) -> int:
        """Of an element; what is not quantised counts as 16."""
        return 16 if self.element is None else self.element.bits

    @property
    def stored_bits(self) -> float:
        """Of an element with its part of the block's scale, which has 8 bits in either family (E8M0, E4M3). NVFP4's
        outer scale, one number per tensor or row, is left out."""
        return self.bits + (0.0 if self.element is None else _SCALE_BITS / self.block)


E2M1 = Element(bits=4, mantissa_bits=1, smallest_normal=1.0, largest=6.0)  # OCP MX v1.0, 5.3.3
E4M3 = Element(bits=8, mantissa_bits=3, smallest_normal=2.0**-6, largest=448.0)  # OCP MX v1.0, 5.3.1

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format(name="none", code=-1, element=None, block=1),
        Format(name="mxfp4", code=0, element=E2M1, block=32),
        Format(name="mxfp8", code=1, element=E4M3, block=32),
        Format(name="nvfp4", code=2, element=E2M1, block=16, scale=E4M3),
    )
}
