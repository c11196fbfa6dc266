"""A sensitivity of all layers from one backward pass: squared gradient times squared error.

Rounding moves the output y of a linear layer by d, which is computed beside it in the unquantised model: y with both
operands rounded, minus y. To second order in d, the predictions then move by KL = 1/2 d' F d, where F is the Fisher
information of y. Its diagonal is the mean square of the gradient g of log p at y over tokens that the model itself
would say next; one draw of them is one backward pass for all layers at once. The score of a layer, in nats per token,
is

    1/2 sum over its projections, tokens and outputs of (g d)^2, over the number of tokens

which is the score of ModelOpt's AutoQuantize (`_get_auto_quantize_score` in
modelopt/torch/quantization/algorithms.py: the sum of squares of grad_output * output_diff), with two differences. The
gradient there is that of the given text's loss, which is the Fisher information's only where the model has learned that
text; here tokens are drawn from the model. And there nothing is halved or divided, so that scores are no KL.

It leaves out what the KL of a layer alone (`divergence.py`) has: the products of different outputs' errors, which add
up where errors are correlated, and terms beyond the second order. So it ranks layers rather than measures them.

Shapes: R = rows, T = tokens of each, O = outputs of a layer, V = vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainable.divergence import logits, rows_of
from trainable.policy.embedded import Progress
from trainable.policy.policy import Policy, block_of, unquantized
from trainable.quantization import Arithmetic, QuantLinear
from trainable.seeds import generator


def fisher(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seed: int,
    progress: Progress = lambda done, total, what: None,
) -> Tensor:
    """Score of each layer on each prompt [depth, prompts], fp64 on the CPU; 0 of a layer that is not quantised."""
    own = {name: policy.linears[name].arithmetic for name in policy.quantized if block_of(name) is not None}
    source = generator("fisher", seed, device=policy.device)
    scores = torch.zeros(policy.depth, len(prompts), dtype=torch.float64)
    rows = rows_of(policy, prompts)
    with unquantized(policy), frozen(policy), torch.enable_grad():
        rounded = {name: how.weight.of(policy.linears[name].weight) for name, how in own.items()}
        for done, (numbers, ids) in enumerate(rows):
            progress(done, len(rows), "gradients of the predictions")
            with ExitStack() as stack:
                for name, how in own.items():
                    watch = _watch(scores, block_of(name), numbers, how, rounded[name])
                    stack.callback(policy.linears[name].register_forward_hook(watch).remove)
                distribution = torch.log_softmax(logits(policy, ids).float(), -1)  # [R * T, V]
            said = own_tokens(distribution, source)  # [R * T]
            distribution.gather(1, said[:, None]).sum().backward()  # type: ignore[no-untyped-call]
            scores[:, list(numbers)] /= 2 * ids.shape[1]
    return scores


def own_tokens(distribution: Tensor, source: torch.Generator) -> Tensor:
    """What the model says next, one token [R] for each row of log-probs [R, V]."""
    return torch.multinomial(distribution.detach().exp().nan_to_num(nan=1.0), 1, generator=source)[:, 0]


def _watch(scores: Tensor, block: int | None, numbers: Sequence[int], how: Arithmetic, rounded: Tensor) -> Any:
    """A hook on a layer that adds its (g d)^2 to the scores when the gradient comes."""

    def hook(linear: QuantLinear, args: tuple[Tensor], y: Tensor) -> None:
        with torch.no_grad():
            moved = F.linear(how.input.of(args[0]), rounded, linear.bias) - y  # d [.., O]

        def add(gradient: Tensor) -> None:
            each = (gradient.double() * moved.double()).square().reshape(len(numbers), -1).sum(1)  # of each prompt
            scores[block, list(numbers)] += each.cpu()

        y.register_hook(add)  # type: ignore[no-untyped-call]

    return hook


@contextmanager
def frozen(policy: Policy) -> Iterator[None]:
    """No parameter has a gradient, and what the embeddings give has one: it flows through all layers."""
    before = {name: parameter.requires_grad for name, parameter in policy.model.named_parameters()}
    embeddings = policy.network.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        policy.model.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_(before[name])
