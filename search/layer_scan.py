"""What training did to the quantisation errors of layers: the model scanned as it began and as a trial left it.

Both scans read the same prompts, the first of the selection questions, through an unquantised forward pass
(`trainable/srdd.py`); a scan of the embedded model takes a second. The start is scanned once per model, precision and
prompts; trials
whose final weights are missing or damaged are left out.
"""

from collections.abc import Mapping, Sequence

import torch

from search.arms import Arm, trial_config, trial_folder
from search.improvement import MEASURES, LayerChange
from search.store import StudyConfig
from spaces.config import ConfigError, TrialConfig
from trainable.disk.checkpoint import load_final
from trainable.noise import zone_layers
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy
from trainable.rollout import encode_prompts
from trainable.scan import Scan, score
from trainable.srdd import scan_policy
from trainable.tasks.table import build_task

PROMPTS = 16

Errors = Mapping[str, tuple[float, ...]]


def layer_changes(study: StudyConfig, arms: Sequence[Arm], most: int = 1) -> dict[str, list[LayerChange]]:
    """By arm, of its first `most` replicates whose weights are there; arms that do not quantise inputs have none."""
    found: dict[str, list[LayerChange]] = {}
    starts: dict[str, Errors] = {}
    for arm in arms:
        if arm.config.quant.activations == "none":
            continue
        for replicate in sorted(arm.results)[:most]:
            weights = _final_weights(study, arm, replicate)
            if weights is not None:
                change = _change(trial_config(study, arm, replicate), replicate, weights, starts)
                found.setdefault(arm.name, []).append(change)
    return found


def _final_weights(study: StudyConfig, arm: Arm, replicate: int) -> Mapping[str, torch.Tensor] | None:
    try:
        return load_final(trial_folder(study, arm.name, replicate))
    except ConfigError:  # of another version; a ValueError, too
        raise
    except ValueError:
        return None


def _change(
    config: TrialConfig, replicate: int, weights: Mapping[str, torch.Tensor], starts: dict[str, Errors]
) -> LayerChange:
    policy = load_policy(config.model, config.quant, config.seed)
    key = f"{config.model} {config.quant} {config.task} {config.eval.draw} {config.rollout.max_prompt_tokens}"
    if key not in starts:
        starts[key] = _errors(policy, config)
    parameters = policy.trainable()
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    after = _errors(policy, config)
    return LayerChange(replicate=replicate, before=starts[key], after=after, middle=zone_layers("middle", policy.depth))


def _errors(policy: Policy, config: TrialConfig) -> Errors:
    questions = build_task(config.task).held_out("selection", PROMPTS, config.eval.draw)
    prompts = encode_prompts(policy, questions, config.task, config.rollout.max_prompt_tokens)
    scan: Scan = scan_policy(policy, prompts, model=config.model, quant=config.quant)
    return {measure: score(scan, measure) for measure in MEASURES}
