"""Generation, a token at a time: prompts are read once per group, then all completions grow together.

The key/value cache is laid out once for the longest completion, instead of being copied at every token; rows that have
ended can leave the batch. Architectures that `trainable/forward/transformer.py` does not know go through transformers'
forward and its growing cache.

Shapes: P = prompts, G = completions per prompt, B = rows in work, at first P * G, L = prompt tokens (left-padded), S =
L + longest completion, N = key/value heads, D = their size, V = vocabulary.
"""

from inspect import signature
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from trainable.forward.transformer import Angles, Forward, Mixer, forward_of, positions
from trainable.kernels import cpu
from trainable.policy.policy import Policy


class Decoder(Protocol):
    """Prompts that were read, and completions that grow."""

    def prefill(self, ids: Tensor, mask: Tensor, group_size: int) -> Tensor:
        """Read the prompts [P, L] with their mask; logits [B, V] of each completion's first token, those of a group
        side by side."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [B]; logits [B, V] of the next ones."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (indices) alone."""


def decoder(policy: Policy, max_new_tokens: int) -> Decoder:
    """For one call of `generate`, inside `deployed`."""
    forward = forward_of(policy)
    if forward is None:
        return _Transformers(policy)
    whole = forward.dtype == torch.float32 and forward.size % 8 == 0  # vectors of the kernel
    fused = policy.device.type == "cpu" and whole and cpu.load() is not None
    return (_Fused if fused else _Ours)(forward, max_new_tokens)


class _Transformers:
    """Any causal language model, by its own forward. One without attention takes its cache by another name, and a mask
    of the tokens that are new to it."""

    def __init__(self, policy: Policy) -> None:
        self.model = policy.model
        self.cache = DynamicCache(config=policy.model.config)
        self.attends = "past_key_values" in signature(policy.network.forward).parameters

    def prefill(self, ids: Tensor, mask: Tensor, group_size: int) -> Tensor:
        logits = self._forward(ids, mask, positions(mask))
        if group_size > 1:
            self.cache.reorder_cache(torch.arange(len(ids), device=ids.device).repeat_interleave(group_size))
        self.mask = mask.repeat_interleave(group_size, 0)  # [B, L + tokens so far]
        self.position = self.mask.sum(-1, keepdim=True)  # [B, 1], of the next token
        return logits.repeat_interleave(group_size, 0)

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(self.position)], dim=1)
        logits = self._forward(tokens[:, None], self.mask, self.position)
        self.position = self.position + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)  # the one way that all of transformers' caches have
        self.mask, self.position = self.mask[rows], self.position[rows]

    def _forward(self, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=mask if self.attends else mask[:, -ids.shape[1] :],
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{"past_key_values" if self.attends else "cache_params": self.cache},
        )
        logits: Tensor = out.logits[:, -1]
        return logits


class _Ours:
    """Our own forward, with one cache for all layers that is laid out once: keys and values [layers, B, N, S, D]."""

    def __init__(self, forward: Forward, max_new_tokens: int) -> None:
        self.forward, self.max_new_tokens = forward, max_new_tokens

    def prefill(self, ids: Tensor, mask: Tensor, group_size: int) -> Tensor:
        length = ids.shape[1]
        seen: list[tuple[Tensor, Tensor]] = []  # keys and values [P, N, L, D] of each layer

        def remember(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            seen.append((keys, values))
            return keys, values

        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        visible = mask.bool()[:, None, None, :] & causal  # [P, 1, L, L]
        visible |= torch.eye(
            length, dtype=torch.bool, device=ids.device
        )  # padding sees itself: a row that sees nothing would become NaN
        self.table = self.forward.angles(
            torch.arange(length + self.max_new_tokens, device=ids.device)[None]
        )  # of every position
        hidden = self.forward.hidden(ids, self._angles(positions(mask)), self.forward.masked(visible, remember))
        keys, values = (torch.stack(tensors) for tensors in zip(*seen, strict=True))
        self.keys, self.values = self._laid_out(keys, values, group_size)
        self.filled = length  # tokens in the cache
        self.position = mask.sum(-1, keepdim=True).repeat_interleave(group_size, 0)  # [B, 1], of the next token
        return self.forward.logits(hidden[:, -1]).repeat_interleave(group_size, 0)

    def step(self, tokens: Tensor) -> Tensor:
        hidden = self.forward.hidden(tokens[:, None], self._angles(self.position), self._mixer())
        self.position = self.position + 1
        self.filled += 1
        return self.forward.logits(hidden[:, 0])

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.position = self.position[rows]

    def _angles(self, position_ids: Tensor) -> Angles:
        cos, sin = self.table
        return cos[position_ids.flatten()], sin[position_ids.flatten()]

    def _laid_out(self, keys: Tensor, values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Those of the prompts [layers, P, N, L, D] once for each completion, with room for its tokens."""
        room = (0, 0, 0, self.max_new_tokens)
        return _spread(F.pad(keys, room), group_size), _spread(F.pad(values, room), group_size)

    def _mixer(self) -> Mixer:
        place = torch.arange(self.filled + 1, device=self.position.device)
        visible = (place >= self.filled - self.position)[:, None, None]  # [B, 1, 1, S so far]: all but the padding

        def append(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            self.keys[layer, :, :, self.filled] = keys[:, :, 0]
            self.values[layer, :, :, self.filled] = values[:, :, 0]
            return self.keys[layer, :, :, : self.filled + 1], self.values[layer, :, :, : self.filled + 1]

        return self.forward.masked(visible, append)


class _Fused(_Ours):
    """With one kernel for all between a layer's projections (`kernels/attention.h`); its keys lie transposed, [layers,
    B, N, D, S], and S is a multiple of 16."""

    def _laid_out(self, keys: Tensor, values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        more = self.max_new_tokens + -(keys.shape[3] + self.max_new_tokens) % 16
        return _spread(F.pad(keys.transpose(-1, -2), (0, more)), group_size), _spread(
            F.pad(values, (0, 0, 0, more)), group_size
        )

    def _mixer(self) -> Mixer:
        starts = (self.filled - self.position)[:, 0].contiguous()  # [B], the first token behind the padding
        kernels = cpu.load()
        assert kernels is not None

        def mix(layer: int, queries: Tensor, keys: Tensor, values: Tensor, angles: Angles) -> Tensor:
            cache = (self.keys[layer], self.values[layer])
            return kernels.attend(queries, keys, values, *angles, *cache, starts, self.filled, self.forward.scale)

        return mix


def _spread(cache: Tensor, group_size: int) -> Tensor:
    """[layers, P, ..] -> [layers, P * G, ..], those of a group side by side."""
    return cache.repeat_interleave(group_size, 1) if group_size > 1 else cache
