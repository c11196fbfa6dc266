"""What every trial of a sweep will need, asked before any of them starts, as far as files and configurations tell.

A model that is not there, a data set without enough questions or a block that does not exist fails every trial alike,
each after it has loaded, and leaves the name of the sweep taken. So it is asked once, here, of every arm. What only the
model itself tells, `first_build.py` asks.

Without torch, unless an arm has a model that is not made here.
"""

from collections.abc import Sequence
from pathlib import Path

from search.arms import Arm
from search.store import StudyConfig
from spaces.config import HUB, ModelConfig, QuantConfig, TrialConfig
from trainable.negative_controls import check_reward
from trainable.tasks.table import build_task


def check_sources(config: StudyConfig, arms: Sequence[Arm]) -> None:
    """Raises ConfigError for a model, data, questions or blocks that are not there: every trial would fail by it.

    What a cluster's nodes share need not be on this machine.
    """
    depths: dict[ModelConfig, int] = {}
    asked = set()
    looked: set[tuple[object, ...]] = set()
    for trial in (arm.config for arm in arms):
        data = [path for path in (*trial.task.path, *trial.task.eval_path) if not path.startswith(HUB)]
        if config.address is None or ((trial.task.endless or data) and all(Path(path).exists() for path in data)):
            judged = (trial.eval.split, trial.eval.questions, trial.eval.draw)
            questions = (trial.task, trial.grpo.batch_prompts, trial.grpo.reward, judged)
            if questions not in asked:
                asked.add(questions)
                task = build_task(trial.task)
                check_reward(trial.grpo.reward, task)
                task.held_out(*judged)
                task.sample(trial.grpo.batch_prompts, seed=0, step=0, batch=0)
                if task.foreign is not None:
                    task.foreign.open()
                    task.foreign.close()
        if trial.model.recipe is None and (config.address is None or Path(trial.model.name).exists()):
            _check_model(trial, depths, looked)


def _check_model(trial: TrialConfig, depths: dict[ModelConfig, int], looked: set[tuple[object, ...]]) -> None:
    """`depths`, `looked`: what of models is known already. Raises ConfigError."""
    from trainable.noise import chosen_layers
    from trainable.policy.loading import check_names, skipped_layers
    from trainable.policy.sources import depth_of, skeleton_of

    if trial.model not in depths:
        depths[trial.model] = depth_of(trial.model)
    depth = depths[trial.model]
    for key, rule in trial.rules.items():
        rule.check_depth(key, depth)
    if not trial.rules:  # else a scan tells which blocks those are
        skipped_layers(trial.quant, depth)
    named = trial.model, trial.quant.exclude
    if named not in looked and named[1] != QuantConfig().exclude and Path(trial.model.name).is_dir():
        looked.add(named)
        check_names(skeleton_of(trial.model), trial.quant)
    if trial.noise.sigma_start > 0 and not trial.rules:
        chosen_layers(trial.noise, depth)
