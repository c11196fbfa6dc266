"""What every trial of a sweep will need, asked before any of them starts.

A model that is not there, a data set without enough questions or a block that does not exist fails every trial alike,
each after it has loaded, and leaves the name of the sweep taken. So it is asked once, here, before Ray starts: what can
be seen from files and configurations of every arm, and the whole model where that is quick to build.
"""

from collections.abc import Sequence
from pathlib import Path

from search.arms import Arm
from search.lineup import base_tree
from search.store import StudyConfig
from spaces.config import HUB, ModelConfig, QuantConfig, TrialConfig
from spaces.narrowing import tried
from trainable.following import follow
from trainable.kernels.cpu import build_meanwhile
from trainable.negative_controls import check_reward
from trainable.noise import chosen_layers, noise_targets
from trainable.policy.embedded import Progress, ensure_base
from trainable.policy.loading import check_names, load_policy, skipped_layers
from trainable.policy.policy import Policy
from trainable.policy.sources import depth_of, skeleton_of
from trainable.tasks.table import build_task


def check_sources(config: StudyConfig, arms: Sequence[Arm]) -> None:
    """Raises ConfigError for a model, data, questions or blocks that are not there: every trial would fail by it.

    What a cluster's nodes share need not be on this machine.
    """
    depths: dict[ModelConfig, int] = {}
    asked, looked = set(), set()
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


def build_once(config: StudyConfig, arms: Sequence[Arm], progress: Progress | None) -> None:
    """Build what every trial will build, where that is quick, so that a setting that touches nothing is an error here
    and not in each trial; and make the scans that trials follow, of what the searcher may draw, too."""
    if config.address is None and any(arm.config.model.recipe is not None for arm in arms):
        build_meanwhile()
    drawn = tried(config.space, base_tree(config)).configs if config.kind == "sweep" else ()
    built: dict[tuple[ModelConfig, QuantConfig], Policy] = {}
    for trial in (*(arm.config for arm in arms), *(trial for trial in drawn if trial.rules)):
        here = trial.model.recipe is not None or config.address is None
        if trial.model.recipe is not None:
            ensure_base(trial.model.recipe, progress)
        if trial.rules and here:
            trial = _followed(trial, progress)
        if trial.model.recipe is not None:
            what = trial.model, trial.quant
            if what not in built:
                built[what] = load_policy(*what, trial.seed)
            noise_targets(built[what], trial.noise)


def _followed(trial: TrialConfig, progress: Progress | None) -> TrialConfig:
    task = build_task(trial.task)
    if task.foreign is not None:
        task.foreign.open()
    try:
        return follow(trial, task, progress=progress)[0]
    finally:
        if task.foreign is not None:
            task.foreign.close()
