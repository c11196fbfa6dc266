"""How far a model's predictions move when some of its layers compute otherwise: KL at the logits.

    KL(p || q) = sum over the vocabulary of p (log p - log q), in nats, of each token; of a prompt the mean over tokens

p is the unquantised model and q the same with other arithmetic in some layers (a *variant*), both on the same given
tokens, at every place of the row. Nothing is sampled or estimated: the sum runs over the whole vocabulary.

Variants that differ from the model in a late block alone have the model's own activations up to there. So each is a
change to a *base*, the unquantised model or the trial's own arithmetic, whichever it leaves later; the base's blocks
have run once, what each gave is kept, and the variant begins with the first block that computes otherwise. Blocks
before it give what they gave to the base without being computed. Whether that comes to the same is asked beforehand: on
a few tokens, the base itself, begun in each block, must give its own logits bit for bit. Where a block hands on more
than its output (keys for later blocks), it does not, and every variant runs from the start.

Rows of one length run together, so that none is padded, and no more tokens at once than make logits of a few tens of
MiB. A model with experts is given a row at a time.

NaN rule: logits that are not finite make a KL of NaN.

Shapes: R = rows, T = tokens of each, V = vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from trainable.layers.experts import Experts
from trainable.policy.embedded import Progress
from trainable.policy.policy import Policy, block_of, computing, decoder_blocks, deployed, redeployed
from trainable.quantization import UNQUANTIZED, Arithmetic

Variant = Mapping[str, Arithmetic]
"""How each layer computes that the trial quantises, by name; it names all of them."""

_LOGITS = 1 << 24
"""Numbers at once: 64 MiB."""
_PIECE = 1 << 21
"""Numbers that are compared at once, in fp64."""
_PROBE_TOKENS = 4

Rows = tuple[tuple[int, ...], Tensor]
"""Prompts of one length: their numbers, and their tokens [R, T]."""


def rows_of(policy: Policy, prompts: Sequence[Sequence[int]]) -> list[Rows]:
    """The prompts, those of one length together, as many at once as the logits allow; at least one."""
    mixture = any(isinstance(module, Experts) for module in policy.network.modules())
    width = policy.network.get_input_embeddings().num_embeddings
    found = []
    numbers = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for length, alike in groupby(numbers, key=lambda number: len(prompts[number])):
        group = list(alike)
        most = 1 if mixture else max(1, _LOGITS // (width * length))
        for start in range(0, len(group), most):
            some = tuple(group[start : start + most])
            found.append((some, torch.tensor([list(prompts[n]) for n in some], device=policy.device)))
    return found


def divergences(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    variants: Sequence[Variant],
    progress: Progress = lambda done, total, what: None,
) -> Tensor:
    """KL of each prompt under each variant [variants, prompts], fp64 on the CPU.

    Costs a forward pass from the first block on in which a variant differs from its base; memory is that of `deployed`,
    of some logits, and of one vector per block and token.
    """
    own: Variant = {name: policy.linears[name].arithmetic for name in policy.quantized}
    plain = dict.fromkeys(own, UNQUANTIZED)
    resumes, rows = _resumes(policy), rows_of(policy, prompts)
    kl = torch.zeros(len(variants), len(prompts), dtype=torch.float64)
    done, total = 0, len(variants) * len(rows)
    for base, members in _by_base(variants, (plain, own), policy.depth):
        with computing(policy, base), deployed(policy):
            for numbers, ids in rows:
                with redeployed(policy, plain):
                    reference = logits(policy, ids)  # [R * T, V]
                outputs = block_outputs(policy, ids) if resumes else ()
                for member in members:
                    change = _change(base, variants[member])
                    first = _first(change, policy.depth) if resumes else 0
                    with redeployed(policy, change), begun_in(policy, outputs, first):
                        moved = divergence(reference, logits(policy, ids))  # [R * T]
                    kl[member, list(numbers)] = moved.view(len(numbers), -1).mean(1).cpu()
                    done += 1
                    progress(done, total, "KL at the logits")
    return kl


def _by_base(variants: Sequence[Variant], bases: Sequence[Variant], depth: int) -> Iterator[tuple[Variant, list[int]]]:
    """Each variant under the base that it leaves last; one that leaves all of them in the first block is its own."""
    groups: list[tuple[Variant, list[int]]] = [(base, []) for base in bases]
    for number, variant in enumerate(variants):
        first, _, members = max(
            ((_first(_change(base, variant), depth), -place, members) for place, (base, members) in enumerate(groups)),
            key=lambda found: found[:2],
        )
        if first > 0:
            members.append(number)
        else:
            groups.append((variant, [number]))
    yield from ((base, members) for base, members in groups if members)


def _change(base: Variant, variant: Variant) -> Variant:
    assert base.keys() == variant.keys(), "a variant names every quantised layer"
    return {name: how for name, how in variant.items() if base[name] != how}


def _first(change: Variant, depth: int) -> int:
    """The first block that computes otherwise; of what is in no block nobody knows whether it is behind or in front of
    them."""
    blocks = [block_of(name) for name in change]
    return min((0 if block is None else block for block in blocks), default=depth)


# --- a forward pass that begins within the model ----------------------------------------------------------------------


def logits(policy: Policy, ids: Tensor) -> Tensor:
    """Of each token's successor [R * T, V]."""
    found: Tensor = policy.network(input_ids=ids, use_cache=False).logits
    return found.flatten(0, 1)


def block_outputs(policy: Policy, ids: Tensor) -> list[Any]:
    """What each block gives."""
    outputs: list[Any] = []
    blocks = decoder_blocks(policy)
    hooks = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in blocks]
    try:
        policy.network.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


@contextmanager
def begun_in(policy: Policy, outputs: Sequence[Any], first: int) -> Iterator[None]:
    """Blocks before the `first` give these outputs and compute nothing."""
    blocks = decoder_blocks(policy)[:first]
    try:
        for block, output in zip(blocks, outputs, strict=False):
            block.forward = _given(output)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _given(output: Any) -> Any:
    return lambda *args, **kwargs: output


def _resumes(policy: Policy) -> bool:
    """Whether the model can begin within."""
    blocks = decoder_blocks(policy)
    if len({id(block) for block in blocks}) != len(blocks) or any("forward" in block.__dict__ for block in blocks):
        return False  # one that is computed twice, or that somebody has changed
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device=policy.device)[None]
    with deployed(policy):
        outputs, whole = block_outputs(policy, ids), logits(policy, ids)
        if len(outputs) != policy.depth:
            return False
        try:
            for first in range(1, policy.depth + 1):
                with begun_in(policy, outputs, first):
                    if not torch.equal(logits(policy, ids), whole):
                        return False
        except Exception:  # whatever an architecture's code raises when blocks before have not run
            return False
    return True


# --- two distributions ------------------------------------------------------------------------------------------------


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row [R] in fp64, from the logits of both [R, V]; of equal ones exactly 0."""
    pieces = zip(_pieces(p), _pieces(q), strict=True)
    return torch.cat([_divergence(some.double(), others.double()) for some, others in pieces])


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    possible = log_p != -torch.inf  # a token that p never says adds nothing
    return (log_p.exp() * (log_p - log_q)).where(possible, 0.0).sum(-1)


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, max(1, _PIECE // rows.shape[-1]))
