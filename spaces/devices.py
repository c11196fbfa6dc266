"""Accelerators that a plan knows by name: their memory, and the peaks that nothing can be faster than.

Peaks are those of NVIDIA's data sheets: dense (the sheets' headline numbers of Hopper count zeros that are skipped,
twice these), for bf16 with sums in fp32. Memory is what CUDA says there is, in GiB (2^30 bytes), which is a little less
than the sheet's; a machine whose GPU is at hand is asked for its own.
"""

from dataclasses import dataclass

from spaces.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of any device."""

    name: str
    memory_gib: float
    """All of it, as CUDA says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device(Memory):
    """Example: DEVICES["a100"].bf16_tflops == 312.0"""

    gb_per_second: float
    """To and from its memory, in 10^9 bytes."""
    bf16_tflops: float
    fp32_tflops: float
    """Without tensor cores, as torch multiplies fp32 by default."""
    source: str


DEVICES: dict[str, Device] = {
    "h200": Device(
        name="NVIDIA H200",
        memory_gib=139.7,
        gb_per_second=4800.0,
        bf16_tflops=989.5,
        fp32_tflops=67.0,
        source="H200 data sheet, SXM: 141 GB HBM3e, 4.8 TB/s, 1,979 TFLOPS in bf16 with sparsity",
    ),
    "h100": Device(
        name="NVIDIA H100",
        memory_gib=79.1,
        gb_per_second=3350.0,
        bf16_tflops=989.5,
        fp32_tflops=67.0,
        source="H100 data sheet, SXM: 80 GB HBM3, 3.35 TB/s, 1,979 TFLOPS in bf16 with sparsity",
    ),
    "a100": Device(
        name="NVIDIA A100",
        memory_gib=79.1,
        gb_per_second=2039.0,
        bf16_tflops=312.0,
        fp32_tflops=19.5,
        source="A100 data sheet, SXM 80 GB: HBM2e, 2,039 GB/s, 312 TFLOPS in bf16",
    ),
    "4090": Device(
        name="NVIDIA GeForce RTX 4090",
        memory_gib=23.6,
        gb_per_second=1008.0,
        bf16_tflops=165.2,
        fp32_tflops=82.6,
        source="Ada architecture white paper: 24 GB GDDR6X, 1,008 GB/s, 165.2 TFLOPS in bf16 with sums in fp32",
    ),
}
"""By the word of `rin plan --device`."""


def device_named(word: str) -> Device:
    """Raises ConfigError for one that is not in the table."""
    if word not in DEVICES:
        raise ConfigError(f"--device {word}: is not known; choose one of {', '.join(DEVICES)}")
    return DEVICES[word]
