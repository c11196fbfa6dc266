"""What MLflow is told of a trial: how its run is named, tagged and measured, how it reads, and which files it has.

Pure functions of a trial's folder, so that a run reads the same whether its trial was followed live (`tracking.py`) or
is told afterwards (`mirror.py`).

Written for whoever looks at a table of runs. Params are those in which a trial differs from its workload and those that
its sweep searches, rounded to three digits; settings that change nothing in this trial (the modules of a control) are
left out, and the file `config.yaml` has everything, exactly. MLflow's table shows metrics with all their digits, so
they have four; the trial's folder has them as they were measured. The tag `ended` says in words how a trial ended,
since MLflow knows no collapse. MLflow cannot make every axis logarithmic, so what is searched on a logarithmic scale is
a metric `log10/...`, too. What was measured before training is the point of its metric at step 0, and accuracy comes
first of all: MLflow opens its pages on the first metric that it was told.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any
from urllib.parse import quote

from search.arms import Arm, Origin, measured
from search.receipt_page import receipt_page
from search.store import PAGE_FILE, StudyConfig, slots_of
from spaces.config import TrialConfig
from spaces.library import Float
from spaces.naming import describe_noise
from spaces.reading import as_tree, dump_yaml, flatten, read_config
from spaces.uses import idle
from spaces.workloads import WORKLOADS
from trainable import pass_at_k
from trainable.disk.trial_folder import TrialState
from trainable.metrics import (
    ACCURACY,
    DIFFERENCE,
    DOSE,
    EVAL,
    HOURS,
    LOG10,
    ROLLOUT_KL,
    START,
    STEP_SECONDS,
    STEPS_DONE,
    TRIAL_SECONDS,
)
from trainable.outcome import Outcome, Status, StepReport

RUN_STATUS: dict[Status, str] = {
    "completed": "FINISHED",
    "collapsed": "KILLED",
    "stopped": "KILLED",
    "failed": "FAILED",
}
LONGEST_PARAM = 6000  # characters, MLflow's limit
LONGEST_TAG = 8000  # MLflow's limit, too
LONGEST_ENDING, LONGEST_LIST = 120, 1500


def trial_key(sweep: str, arm: str, replicate: int) -> str:
    """By which a run is found again; safe in MLflow's filter language."""
    return quote(f"{sweep}/{arm}/{replicate}", safe="/")


def run_name(arm: str, replicate: int) -> str:
    return f"{arm}/{replicate}"


def standing(state: TrialState) -> str:
    """Where a trial stands that nobody works on, in a word that no later standing of it has again."""
    status = "stopped" if state.status == "waiting" else state.status
    return f"{status} after {state.step} steps, attempt {len(state.attempts)}"


def step_metrics(report: StepReport) -> dict[str, float]:
    return with_four_digits({STEP_SECONDS: report.seconds, **report.signals, STEPS_DONE: float(report.step + 1)})


def with_four_digits(metrics: Mapping[str, float]) -> dict[str, float]:
    """Whole numbers are counts and keep all of theirs."""
    return {name: value if float(value).is_integer() else float(f"{value:.4g}") for name, value in metrics.items()}


def start_metrics(report: StepReport) -> dict[str, float]:
    """What was measured before the first step, by the name that it has afterwards; accuracy first."""
    start = {name.removesuffix(START): value for name, value in report.signals.items() if name.endswith(START)}
    return with_four_digits({name: start[name] for name in sorted(start, key=lambda name: name != ACCURACY)})


def last_metrics(
    study: StudyConfig, config: TrialConfig, state: TrialState, last: StepReport | None, against: "Beside | None"
) -> dict[str, float]:
    """What a trial came to, and where it stands on the axes of charts."""
    found = scores_of(state.outcome) if state.outcome is not None else {}
    if state.outcome is not None and state.outcome.receipt.dose is not None:
        found[DOSE] = state.outcome.receipt.dose
    kl = last.signals.get(ROLLOUT_KL, 0.0) if last is not None else 0.0
    flat = flatten(as_tree(config))
    axes = {**{key: flat.get(key, 0.0) for key in log_keys(study)}, ROLLOUT_KL: kl}
    useless = idle(config)
    for name, value in axes.items():
        if name not in useless and 0 < value < math.inf:
            found[f"{LOG10}{name}"] = math.log10(value)
    found[HOURS] = state.slot_hours(slots_of(study))
    if against is not None and against.difference is not None:
        found[DIFFERENCE] = against.difference  # last, since it may come later
    return with_four_digits(found)


def log_keys(study: StudyConfig) -> list[str]:
    """Settings that are searched on a logarithmic scale; the sigma in any case."""
    found = [one.key for one in study.space.dimensions if isinstance(one.domain, Float) and one.domain.log]
    return list(dict.fromkeys(["noise.sigma_start", *found]))


def scores_of(outcome: Outcome) -> dict[str, float]:
    numbers = {f"{EVAL}{name}": value for name, value in asdict(outcome.eval).items() if isinstance(value, int | float)}
    sampled = pass_at_k.metrics(outcome.eval.right, outcome.config.eval.samples)
    return {**numbers, **sampled, TRIAL_SECONDS: outcome.seconds}


def reason_of(state: TrialState) -> dict[str, str]:
    """Empty once a trial that failed has ended well."""
    failed = state.status == "failed"
    return {"error": state.reason if failed else "", "failure/rule": state.rule if failed else ""}


def outcome_files(outcome: Outcome) -> dict[str, str]:
    """What ran, what it did to its weights, which questions it answered, and in how many of its samples."""
    sampled = {"right.json": as_json(outcome.eval.right)} if outcome.eval.right else {}
    return {
        "config.yaml": dump_yaml(as_tree(outcome.config)),  # as it ran: with the thread count that was in force
        "receipt.json": as_json(outcome.receipt.as_tree()),
        "receipt.html": receipt_page(outcome.receipt),
        "correct.json": as_json(outcome.eval.correct),
        **sampled,
    }


def params_of(study: StudyConfig, config: TrialConfig) -> dict[str, str]:
    """What is searched and what differs from the workload, as far as it changes anything here; a seed always."""
    usual, useless = _usual(study.workload), idle(config)
    wanted = {"seed", "noise.sigma_start", *(dimension.key for dimension in study.space.dimensions)}
    return {
        key: param_of(value)
        for key, value in flatten(as_tree(config)).items()
        if (value != usual.get(key) or key in wanted) and not any(f"{key}.".startswith(f"{one}.") for one in useless)
    }


@cache
def _usual(workload: str) -> Mapping[str, Any]:
    return flatten(as_tree(read_config(WORKLOADS[workload].settings)))


def param_of(value: Any) -> str:
    """For reading: three digits, and `rmsnorm+linear` for a list of names."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        text = "+".join(value)
    elif isinstance(value, float):
        text = f"{value:.3g}"
    else:
        text = value if isinstance(value, str) else as_json(_rounded(value))
    mark = f"... ({len(text)} characters)"
    return text if len(text) <= LONGEST_PARAM else text[: LONGEST_PARAM - len(mark)] + mark


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


# --- in words ---------------------------------------------------------------------------------------------------------


def ending_words(state: TrialState, steps: int) -> str:
    """`collapsed at step 3 of 29, entropy_high`; steps count from 0, as on the axes of charts."""
    outcome = state.outcome
    match state.status:
        case "completed":
            alarms = outcome.alarms if outcome is not None else ()
            heard = f"; {alarms[0].rule} at step {alarms[0].step}, monitored" if alarms else ""
            return f"completed, {steps} steps{heard}"
        case "collapsed":
            return f"collapsed at step {max(state.step - 1, 0)} of {steps}, {state.rule}"
        case "failed":
            return f"failed after {state.step} of {steps} steps: {state.rule or state.reason}"[:LONGEST_ENDING]
        case "running":
            return "running"
        case _:
            return f"stopped after {state.step} of {steps} steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A run against the one of its control that has the same seed."""

    control: str
    """Name of that run: control/0."""
    share: float | None = None
    """What that came to; None while it has no outcome."""
    difference: float | None = None
    """In points; None while one of the two has no outcome."""


def beside(study: StudyConfig, control: Arm, replicate: int, here: Outcome | None, there: Outcome | None) -> Beside:
    name = run_name(control.name, replicate)
    own, plain = (measured(one, study.measure) if one is not None else None for one in (here, there))
    if plain is None:
        return Beside(control=name)
    apart = None if own is None else 100 * (own.share - plain.share)
    return Beside(control=name, share=plain.share, difference=apart)


def note(study: StudyConfig, arm: Arm, config: TrialConfig, state: TrialState, why: str, against: Beside | None) -> str:
    """Markdown, for the head of a run's page. `why`: the evidence of a collapse, or the reason of a failure."""
    is_control = arm.origin == "control"
    what = "no noise" if is_control else f"noise {describe_noise(config)}"
    lines = [f"**{ending_words(state, config.grpo.steps)}**{f': {why}' if why else ''}"]
    came_to = []
    if state.outcome is not None:
        scores = state.outcome.eval
        came_to.append(
            f"Accuracy {_percent(scores.accuracy)} after {state.step} steps (unquantised "
            f"{_percent(scores.accuracy_bf16)}), {_percent(scores.accuracy_start)} before training."
        )
    if against is not None:
        came_to.append(_against(study, against))
    elif not is_control:
        came_to.append("It has no control in this sweep: nothing says what its noise did.")
    lines += [" ".join(came_to)] if came_to else []
    lines.append(
        f"{ORIGINS[arm.origin]} {arm.name} of sweep {study.name}: {what}; {config.quant.mode}, seed {config.seed}."
    )
    lines.append(
        "One run proves nothing. Every arm against its control, with an interval: "
        f"`rin report {study.name}`, or the page `{study.folder.uri}/{PAGE_FILE}`."
    )
    given = ", ".join(f"{key}={value}" for key, value in params_of(study, config).items())
    given = given if len(given) <= LONGEST_LIST else f"{given[:LONGEST_LIST]} ..."
    lines.append(f"Searched, or other than in workload {study.workload}: {given}. All of it: `config.yaml`.")
    return "\n\n".join(lines)


ORIGINS: dict[Origin, str] = {
    "control": "Control",
    "point": "Experiment",
    "searcher": "Searched configuration",
    "ablation": "Ablation",
    "winner": "Candidate",
}


def _against(study: StudyConfig, against: Beside) -> str:
    of = "" if study.measure == "accuracy" else f" of {study.measure}"
    if against.share is None:
        return f"Its control {against.control} (the same seed) has not ended."
    there = f"Its control {against.control} (the same seed): {_percent(against.share)}{of}"
    if against.difference is None:
        return f"{there}."
    return f"{there}; difference **{against.difference:+.1f} points**."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# --- files ------------------------------------------------------------------------------------------------------------


def as_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
