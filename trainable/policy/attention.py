"""By which implementation a policy's attention is computed, in transformers' words: the one room that touches where
they keep it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spaces.config import ConfigError
from trainable.policy.policy import Policy


def attention_of(policy: Policy) -> str:
    """sdpa, eager, ..."""
    implementation: str = policy.network.config._attn_implementation
    return implementation


@contextmanager
def attention(network: Any, implementation: str) -> Iterator[None]:
    """Another attention implementation of a transformers model, by transformers' names. Raises ConfigError where the
    architecture has no choice."""
    before = network.config._attn_implementation
    try:
        try:
            network.set_attn_implementation(implementation)
        except (ValueError, ImportError) as error:  # transformers' words for what an architecture does not support
            raise ConfigError(f"model.attention={implementation}: {error}; take another model") from error
        if network.config._attn_implementation != implementation:  # it only warns about those that it cannot switch
            raise ConfigError(
                f"model.attention={implementation}: {type(network).__name__} cannot switch to it; take another model"
            )
        yield
    finally:
        network.set_attn_implementation(before)  # a model's parts have configurations of their own
