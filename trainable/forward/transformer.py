"""The forward pass of Qwen2, Llama and Mistral with little around the arithmetic; training, generation and evaluation
share it.

A small model spends more time between operations than in them: transformers' own forward checks options, builds masks
for every call and keeps records that nobody asks for. Projections and norms here are the policy's own modules, so that
quantisation, noise and adapters act alike everywhere; only what lies between them is written out, once, for the block
that these architectures have in common. Another architecture, or another attention than torch's scaled dot product,
goes through transformers' forward. Both give equal results.

Shapes: B = rows, T = tokens of this call, S = tokens seen, H = attention heads, N = key/value heads, D = their size.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainable.again import block_again
from trainable.kernels import cpu
from trainable.layers.norm import RMSNorm
from trainable.policy.attention import attention_of
from trainable.policy.policy import KNOWN_BLOCKS, Policy
from trainable.sharding import is_sharded, through

_STEADY = ("default", "linear", "yarn", "llama3")
"""Kinds of rotation whose angles depend on a token's position alone, and not on how many there are."""

Angles = tuple[Tensor, Tensor]
"""Cosine and sine of each token's rotation, [B * T, D]."""

Mixer = Callable[[int, Tensor, Tensor, Tensor, Angles], Tensor]
"""Attention of one layer: (layer, queries [B * T, H * D], keys [B * T, N * D], values [B * T, N * D], angles) -> [B *
T, H * D]."""

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(row, head, token, other token) -> whether the one sees the other, in any shapes that broadcast."""

Memory = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, rotated keys, values [B, N, T, D] of new tokens) -> those of all tokens seen [B, N, S, D]."""


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, L]."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in rows], device=device)  # [rows, L]
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)  # [rows, L]
    return ids, mask


def head_size(config: Any) -> int:
    """Numbers of an attention head, by a transformers configuration."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def positions(mask: Tensor) -> Tensor:
    """Position ids [B, L] that ignore left padding; the same rule in generation and training."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def forward_of(policy: Policy) -> "Forward | None":
    """None for an architecture that it does not know, or whose norms are not ours."""
    config = policy.network.config
    known = config.model_type in KNOWN_BLOCKS and attention_of(policy) == "sdpa"
    if not known or getattr(config, "sliding_window", None) or config.rope_parameters["rope_type"] not in _STEADY:
        return None
    forward = Forward(policy)
    return forward if isinstance(forward.body.norm, RMSNorm) else None


@cache
def _by_blocks() -> Callable[..., Tensor]:
    """Compiled: as it is it would hold a number for each pair of tokens. Who does not need it does not import it."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled


class _Block:
    """The modules of a block: an attribute of a module takes most of a microsecond to look up."""

    def __init__(self, block: Any) -> None:
        self.whole = block
        self.norm, self.mlp_norm, self.mlp = block.input_layernorm, block.post_attention_layernorm, block.mlp
        attention = block.self_attn
        self.queries, self.keys, self.values, self.output = (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
        )

    def __call__(self, layer: int, angles: Angles, mix: Mixer, x: Tensor, term: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream [B * T, hidden] and the latest term of it, which the next norm adds."""
        x, y = (x, self.norm(x)) if term is None else self.norm.of_sum(x, term)
        term = self.output(mix(layer, self.queries(y), self.keys(y), self.values(y), angles))
        x, y = self.mlp_norm.of_sum(x, term)
        return x, self.mlp(y)


class Forward:
    """A policy's modules, and the way through them."""

    def __init__(self, policy: Policy) -> None:
        causal = policy.network
        self.body, self.head = causal.model, causal.lm_head
        self.blocks = [_Block(block) for block in self.body.layers]
        config = causal.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = head_size(config)
        self.scale: float = self.size**-0.5
        self.dtype = next(causal.parameters()).dtype
        self.network, self.checkpoints = causal, policy.checkpoints

    def hidden(self, ids: Tensor, angles: Angles, mix: Mixer) -> Tensor:
        """Hidden states [B, T, hidden] behind the last block and before the final norm; ids [B, T]."""
        x = self.body.embed_tokens(ids.flatten())  # [B * T, hidden]
        term = None
        again = self.checkpoints and torch.is_grad_enabled() and not is_sharded(self.network)
        for layer, block in enumerate(self.blocks):
            work = partial(block, layer, angles, mix)
            x, term = block_again(block.whole, work, x, term) if again else through(block.whole, work, x, term)
        hidden: Tensor = (x if term is None else x + term).view(*ids.shape, -1)
        return hidden

    def angles(self, position_ids: Tensor) -> Angles:
        """Of tokens at position ids [B, T]."""
        cos, sin = self.body.rotary_emb(self.body.embed_tokens.weight, position_ids)  # which tells it the dtype
        return cos.flatten(0, 1), sin.flatten(0, 1)

    def masked(self, mask: Tensor, memory: Memory = lambda layer, keys, values: (keys, values)) -> Mixer:
        """Attention under a mask [B, 1, T, S]: True or 0 for what a token sees, False or a large negative number for
        what not."""
        shared = self.heads // self.kv_heads

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if shared > 1 and not mask.is_cpu:  # a GPU's fused kernels take a mask or shared heads, not both
                keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
            grouped = keys.shape[1] < self.heads
            return F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=grouped
            )

        return self._attention(mask.shape[0], attend, memory)

    def causal(self, rows: int) -> Mixer:
        """Attention of each of B = `rows` rows to itself, a token to those before it."""
        grouped = self.kv_heads < self.heads

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=self.scale, enable_gqa=grouped
            )

        return self._attention(rows, attend)

    def ruled(self, sees: Rule, rows: Tensor) -> Mixer:
        """Attention of each row of `rows` [B, T] to itself by a rule, without a mask of pairs: blocks of them in which
        nothing is seen are left out (FlexAttention, arXiv 2412.05496)."""
        from torch.nn.attention.flex_attention import create_block_mask

        count, tokens = rows.shape
        blocks = create_block_mask(sees, count, None, tokens, tokens, device=rows.device)
        grouped, by_blocks = self.kv_heads < self.heads, _by_blocks()

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return by_blocks(queries, keys, values, block_mask=blocks, scale=self.scale, enable_gqa=grouped)

        return self._attention(count, attend)

    def _attention(
        self,
        rows: int,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        memory: Memory = lambda layer, keys, values: (keys, values),
    ) -> Mixer:
        """`attend`: queries [B, H, T, D], keys and values [B, N, S, D] -> [B, H, T, D]."""

        def mix(layer: int, queries: Tensor, keys: Tensor, values: Tensor, angles: Angles) -> Tensor:
            queries, keys = self._rotated(queries, angles), self._rotated(keys, angles)
            queries, keys, values = (
                x.view(rows, len(x) // rows, -1, self.size).transpose(1, 2) for x in (queries, keys, values)
            )
            mixed = attend(queries, *memory(layer, keys, values))
            return mixed.transpose(1, 2).reshape(len(angles[0]), -1)

        return mix

    def _rotated(self, x: Tensor, angles: Angles) -> Tensor:
        """Rotary position embedding (arXiv 2104.09864) of heads side by side: [B * T, heads * D] ->
        [B * T, heads, D]."""
        cos, sin = angles
        x = x.view(len(x), -1, self.size)
        if x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling():
            kernels = cpu.load()
            if kernels is not None:
                return kernels.rotary(x, cos, sin)
        half = self.size // 2
        signed = torch.cat(
            [-sin[:, :half], sin[:, half:]], -1
        )  # half of a rotation's terms are subtracted: their sign goes into the sine
        return x * cos[:, None] + x.roll(half, -1) * signed[:, None]

    def normed(self, hidden: Tensor) -> Tensor:
        """As the head reads them, [..., hidden]."""
        normed: Tensor = self.body.norm(hidden)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Of each token's successor, [..., V]."""
        logits: Tensor = self.head(self.normed(hidden))
        return logits
