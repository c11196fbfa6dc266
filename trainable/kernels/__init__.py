"""Fused versions of `trainable.quantization.fake_quantize`, equal to it in every value."""
