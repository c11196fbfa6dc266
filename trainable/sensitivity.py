"""The functional part of a scan: what each layer's rounding does to the model and to learning, and what it would buy to
do without.

    kl_alone      KL at the logits when this layer alone is quantised           `divergence.py`
    kl_all_but    when all but this one are
    fisher        what one backward pass foresees of kl_alone                   `fisher.py`
    cosine        between the layer's gradients, quantised and unquantised      `update_side.py`
    norm_ratio    of those two
    survival      share of its weights whose code one GRPO step changes
    bought        KL saved by each layer at 16 bits, other rules, a rotation    `purchases.py`

KL and Fisher score are means over the scan's own prompts, with intervals over them; what is about learning is of a
batch of the policy's completions, as a trial of this configuration would learn from. Layers are measured alone and
within the whole because errors do not add up: a layer may be harmless alone and cost much where all others err as well,
and the other way round.

Time: of KL a forward pass from the layer on, twice for each layer; a backward pass over the prompts; two over the
batch; a GRPO step. The model is as it was afterwards, bit for bit, also after an error.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from spaces.config import TrialConfig
from trainable.divergence import divergences
from trainable.fisher import fisher
from trainable.policy.embedded import Progress
from trainable.policy.policy import Policy, block_of
from trainable.purchases import free_changes, lifted, purchases
from trainable.quantization import UNQUANTIZED
from trainable.scan import Estimate, LayerSensitivity, Scan
from trainable.srdd import estimate
from trainable.tasks.task import Task
from trainable.update_side import gradient_agreement, grpo_batch, survival


def with_sensitivities(
    scan: Scan,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    task: Task,
    config: TrialConfig,
    progress: Progress = lambda done, total, what: None,
) -> Scan:
    """The scan with its functional part, on the tokens that it was made of; the batch has as many prompts, at most
    those of a step. Raises ConfigError for a prompt of the task that is longer than the configuration allows."""
    seed, mean = scan.seed, partial(estimate, seed=scan.seed)
    own = {name: policy.linears[name].arithmetic for name in policy.quantized}
    layers, free = range(policy.depth), free_changes(policy)
    alone = [{name: how if block_of(name) == i else UNQUANTIZED for name, how in own.items()} for i in layers]
    all_but = [lifted(own, [i]) for i in layers]
    kl = divergences(policy, prompts, [*alone, *all_but, *free.values(), own], progress)
    kl_alone, kl_all_but = kl[: policy.depth], kl[policy.depth : 2 * policy.depth]
    bought = purchases(
        policy,
        prompts,
        now=kl[-1],
        without_layer=kl_all_but,
        free=dict(zip(free, kl[2 * policy.depth : -1], strict=True)),
        mean=mean,
        progress=progress,
    )
    foreseen = fisher(policy, prompts, seed, progress)
    batch = grpo_batch(policy, task, config, min(len(prompts), config.grpo.prompts), seed)
    agreements = gradient_agreement(policy, batch, config, seed, progress)
    survived = survival(policy, batch, config, seed)
    return replace(
        scan,
        layers=tuple(
            replace(
                layer,
                functional=LayerSensitivity(
                    kl_alone=mean(kl_alone[i].tolist()),
                    kl_all_but=mean(kl_all_but[i].tolist()),
                    fisher=mean(foreseen[i].tolist()),
                    cosine=agreements[i].cosine,
                    norm_ratio=agreements[i].norm_ratio,
                    survival=Estimate(value=survived[i], low=float("nan"), high=float("nan")),
                ),
            )
            for i, layer in enumerate(scan.layers)
        ),
        bought=bought,
    )
