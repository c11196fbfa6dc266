"""The names under which a trial's numbers are tracked, next to what they mean. They are spelled here and nowhere else.

Shares are 0 to 1, entropies and KLs nats per token, lengths tokens. Signals (`signals.py`) are of the policy that
sampled, noise included; `eval/` is of the clean model. Reward functions of a task add `grpo/reward/NAME`, `eval/NAME`
and `eval/NAME_start`, their means; `eval.samples` adds `eval/pass_at_K` for K from 1 to that number.
"""

SIGMA = "rin/sigma"
STEPS_DONE = "rin/steps_done"
RULE, EVIDENCE, ROLLOUT = "rin/rule", "rin/evidence", "rin/rollout"
"""In the log of a trainer of somebody else (`library.py`), where a rule fired: which, why, in which rollout."""
COLLAPSED = "rin/collapsed"
"""There too: 1 where a rule fired."""
DOSE = "rin/dose"
"""There too: applied noise over the size of the weights, mean over those with noise; 0 in a quiet stage. Of a run in
MLflow that of the loudest stage, as its receipt has it."""
HOURS = "rin/hours"
REWARD = "grpo/reward"
LOSS = "grpo/loss"
GRAD_NORM = "grpo/grad_norm"
ROLLOUT_ACCURACY = "grpo/accuracy"
ENTROPY = "gen/entropy"
LENGTH = "gen/length"
GIBBERISH = "gen/gibberish"
ALL_WRONG = "filter/all_wrong"
KEPT_GROUPS = "filter/kept_groups"
WASTED = "filter/wasted"
ROLLOUT_KL = "rollout_corr/kl"
FLOOR_KL = "rollout_corr/floor_kl"
GATE_KL = "rollout_corr/gate_kl"
EVAL = "eval/"
ACCURACY = "eval/accuracy"
UNQUANTIZED = "eval/accuracy_bf16"
START = "_start"
"""Behind the name of a score: before step 0."""
DIFFERENCE = "eval/vs_control"
PASS_AT = "eval/pass_at_"
ROLLOUT_SECONDS = "perf/rollout_seconds"
UPDATE_SECONDS = "perf/update_seconds"
STEP_SECONDS = "perf/step_seconds"
TRIAL_SECONDS = "perf/trial_seconds"
TOKENS_PER_SECOND = "perf/tokens_per_second"
TOO_LONG = "task/too_long"
LOG10 = "log10/"
"""Of a setting or a metric, for axes that MLflow cannot make logarithmic."""
SCAN = "srdd/"
"""A scan's scores (`scan.SCORES`) in its own run, with the layer where a trial has its step."""

METRICS: dict[str, str] = {
    SIGMA: "nominal sigma of the step's rollout, of the global pair",
    STEPS_DONE: "steps made, this one included",
    REWARD: "mean reward of all sampled completions, penalties included",
    "grpo/reward_std": "std of rewards within a group, mean over groups",
    ROLLOUT_ACCURACY: (
        "share of sampled completions that are correct: noisy, at the sampling temperature, no evaluation"
    ),
    LOSS: "mean over the step's updates",
    GRAD_NORM: "largest global norm of a gradient before clipping",
    "grpo/clip_fraction": "share of tokens whose ratio was clipped against the advantage",
    "grpo/reference_kl": "KL to the reference policy, k3, where grpo.kl_beta > 0",
    ALL_WRONG: "share of generated groups without variance in which nothing is right",
    "filter/all_right": "share of generated groups without variance in which everything is right",
    KEPT_GROUPS: "groups that were trained on",
    "filter/gen_batches": "batches that were generated in this step",
    WASTED: "share of generated completions that were not trained on",
    ENTROPY: "mean entropy of the distribution that was sampled from",
    LENGTH: "mean length of a completion",
    "gen/truncated": "share of completions cut off by the limit",
    "gen/distinct_2": "different pairs of neighbouring tokens over all pairs, within a completion",
    "gen/repetition": "share of 4-grams that occurred before in the same completion",
    GIBBERISH: "share of tokens that the clean policy finds clearly less likely than a blind guess",
    ROLLOUT_KL: "KL(rollout || clean policy), k3",
    "rollout_corr/logp_gap": "mean absolute difference of a token's log-prob between the rollout and the clean policy",
    "rollout_corr/weight": "mean importance weight of rollout.correction, after its cap",
    "rollout_corr/effective_share": "effective sample size over sample size, of the weights before the cap",
    FLOOR_KL: "how far training's own forward pass is from itself, measured at the gate",
    GATE_KL: "how far the engine is from training on a noise-free rollout, measured at the gate",
    ACCURACY: "greedy, in the deployed precision, on the fixed questions",
    UNQUANTIZED: "the same by the unquantised forward pass of the master weights",
    "eval/accuracy_start": "eval/accuracy before step 0",
    "eval/accuracy_bf16_start": "eval/accuracy_bf16 before step 0",
    f"{PASS_AT}K": "pass@K: at least one of K samples right, at rollout.temperature; unbiased, mean over questions",
    f"{PASS_AT}K_low": "lower end of its 95 % interval over questions (Wilson, effective number of questions)",
    f"{PASS_AT}K_high": "upper end of that interval",
    f"{PASS_AT}K_start": "pass@K before step 0; so are its _low_start and _high_start",
    "eval/n": "questions",
    DIFFERENCE: "of a run in MLflow: what the sweep compares by, minus that of its control of the same seed, in points",
    ROLLOUT_SECONDS: "sampling of the step, filter and batches included",
    UPDATE_SECONDS: "log-probs and updates of the step",
    STEP_SECONDS: "the whole step, evaluation included",
    TRIAL_SECONDS: "all steps and evaluations of the trial",
    HOURS: "of a run in MLflow: in which some process worked on the trial, times its GPUs where it has any",
    f"{LOG10}NAME": "of a run in MLflow: log10 of a setting or of the last value of a metric",
    TOKENS_PER_SECOND: "sampled completion tokens over the rollout's seconds",
    TOO_LONG: (
        "questions that task.too_long=leave_out left out: rows of a data set, at its first step; draws of an endless "
        "one, in the step"
    ),
}

GROUPS: dict[str, str] = {
    "rin": "every step; dose and hours of a run in MLflow at its end",
    "grpo": "every step, of the rollout and its updates",
    "filter": "every step, of all groups that were generated",
    "gen": "every step, of the noisy rollout",
    "rollout_corr": "every step; the floor and the gate where an engine was checked",
    "eval": "of the clean model: steps that eval.every names, and the end; `_start` before step 0, in MLflow at step 0",
    "perf": "every step; the trial's seconds at its end",
    "log10": "a run in MLflow, at its end",
    "task": "every step, with task.too_long=leave_out",
}
"""First word of a name -> when it is logged, and of what."""
_SHARE, _NATS, _SECONDS = "share", "nats per token", "seconds"
UNITS: dict[str, str] = {
    SIGMA: "of noise.scale",
    STEPS_DONE: "steps",
    HOURS: "hours",
    DIFFERENCE: "points",
    f"{LOG10}NAME": "log10 of its unit",
    REWARD: "reward",
    "grpo/reward_std": "reward",
    LOSS: "",
    GRAD_NORM: "",
    "grpo/reference_kl": _NATS,
    KEPT_GROUPS: "groups",
    "filter/gen_batches": "batches",
    ENTROPY: _NATS,
    LENGTH: "tokens",
    ROLLOUT_KL: _NATS,
    "rollout_corr/logp_gap": _NATS,
    "rollout_corr/weight": "",
    FLOOR_KL: _NATS,
    GATE_KL: _NATS,
    "eval/n": "questions",
    ROLLOUT_SECONDS: _SECONDS,
    UPDATE_SECONDS: _SECONDS,
    STEP_SECONDS: _SECONDS,
    TRIAL_SECONDS: _SECONDS,
    TOKENS_PER_SECOND: "tokens/s",
    TOO_LONG: "questions",
}
"""Every other one is a share, 0 to 1."""


def unit_of(name: str) -> str:
    """Empty for a number without one."""
    return UNITS.get(name, _SHARE)
