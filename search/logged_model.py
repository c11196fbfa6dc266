"""The candidate as a LoggedModel of MLflow: what it is, which runs made it, what it scored there on which questions.

One per arm that has ever been the candidate. A resume that finds the same candidate writes into the model that is
there; when another arm takes over, the tag `state` of the one before says so, and nothing is deleted: what was exported
from it can still be traced. Its metrics are those of its runs, each with the evaluation set that it was measured on,
and the mean and the difference to the control over common seeds, on its first run: both of the study's measure and by
its name, since a sweep that is judged by pass@4 says nothing there of accuracy. No weights are uploaded: they lie in
the store, where the tag `weights` says.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from search.arms import Arm, Candidate, candidate_of, trial_folder
from search.secrets import strip_password
from search.store import StudyConfig
from search.told import as_json, param_of, trial_key
from spaces.errors import NoCandidate
from spaces.reading import as_tree, flatten
from trainable.disk.trial_folder import FINAL_FILE
from trainable.metrics import ACCURACY

MODEL_TYPE = "rin-candidate"
HELD, PASSED = "candidate", "no longer the candidate"
PARAMS = ("model.", "noise.", "quant.", "task.name", "grpo.steps", "grpo.learning_rate")
"""Beginnings of those that a model shows; a run has the whole configuration as a file."""
SCORED = (ACCURACY, f"{ACCURACY}_bf16", f"{ACCURACY}_start")
MEAN, DIFFERENCE = "candidate/accuracy", "candidate/difference"
"""Where the measure is accuracy; else its own (`scores_of`)."""
Record = dict[str, Any]


# --- what is told -----------------------------------------------------------------------------------------------------


def candidate_now(study: StudyConfig, arms: Sequence[Arm]) -> Candidate | None:
    """A confirmation chooses nothing."""
    try:
        return None if study.kind == "confirm" else candidate_of(study, arms)
    except NoCandidate:
        return None


def record_of(study: StudyConfig, candidate: Candidate | None) -> Record:
    """For `delivery.MlflowWriter`."""
    record: Record = {"do": "model", "experiment": study.name, "key": trial_key(study.name, "candidate", 0)}
    if candidate is None:
        return {**record, "model": None}
    arm, config = candidate.arm, candidate.config
    place = trial_folder(study, arm.name, 0)
    tags = {
        **{"sweep": study.name, "sweep_id": study.owner.id, "arm": arm.name, "control": candidate.control.name},
        **{"replicates": str(len(candidate.accuracies)), "caveat": candidate.caveat, "state": HELD},
        "weights": strip_password(f"{place.uri}/{FINAL_FILE}") if FINAL_FILE in place.names() else "were not kept",
    }
    tags["mlflow.note.content"] = _described(candidate, tags["weights"])
    asked = {"task": config.task.name, **as_tree(config.eval)}
    model = {
        "arm": arm.name,
        "tags": tags,
        "params": {key: param_of(value) for key, value in flatten(as_tree(config)).items() if key.startswith(PARAMS)},
        "metrics": scores_of(candidate),
        "runs": [trial_key(study.name, arm.name, replicate) for replicate in sorted(arm.results)],
        "questions": {"name": f"{config.task.name} {config.eval.split}"[:500], "source": as_json(asked)},
    }
    return {**record, "model": model}


def scores_of(candidate: Candidate) -> dict[str, float]:
    """By a name that says of what. Example: {"candidate/pass_at_4": 0.98, "candidate/pass_at_4_difference": 0.02}"""
    measure = candidate.study.measure.replace("@", "_at_")  # which MLflow refuses
    names = (MEAN, DIFFERENCE) if measure == "accuracy" else (f"candidate/{measure}", f"candidate/{measure}_difference")
    scores = fmean(candidate.accuracies) if candidate.accuracies else None, candidate.difference
    return {name: score for name, score in zip(names, scores, strict=True) if score is not None}


def _described(candidate: Candidate, weights: str) -> str:
    """Markdown."""
    scores = candidate.accuracies
    of = candidate.study.measure
    mean = f"Mean {of} {fmean(scores):.1%} over {len(scores)} replicates" if scores else "No replicate has ended"
    ahead = "" if candidate.difference is None else f", {100 * candidate.difference:+.1f} points"
    lines = [f"**{candidate.arm.name}** of {candidate.study.name}, put forward by the search."]
    lines.append(f"{mean}{ahead} against its control {candidate.control.name}.")
    return "\n\n".join([*lines, f"{candidate.caveat[0].upper()}{candidate.caveat[1:]}.", f"Weights: `{weights}`"])


# --- how it is told ---------------------------------------------------------------------------------------------------


def deliver(
    mlflow: Any, experiment: str, sweep_id: str, record: Mapping[str, Any], run_of: Callable[[str], str | None]
) -> None:
    """Safe to do twice. `run_of` finds a run by its trial's key; None where somebody has deleted it."""
    mine = f"tags.`sweep_id` = '{sweep_id}' AND attributes.model_type = '{MODEL_TYPE}'"
    known = {model.tags["arm"]: model for model in mlflow.search_logged_models([experiment], mine, max_results=1000)}
    model = record["model"]
    for arm, one in known.items():
        if (model is None or arm != model["arm"]) and one.tags.get("state") != PASSED:
            mlflow.set_logged_model_tags(one.model_id, {"state": PASSED})
    if model is not None:
        runs = [run for key in model["runs"] if (run := run_of(key)) is not None]
        found = known.get(model["arm"]) or _create(mlflow, experiment, model, runs[0] if runs else None)
        mlflow.set_logged_model_tags(found.model_id, model["tags"])
        _log_scores(mlflow, found.model_id, model, runs)


def _create(mlflow: Any, experiment: str, model: Mapping[str, Any], source: str | None) -> Any:
    name = f"candidate {model['arm']}"
    for letter in "/:.%\"'":  # which MLflow refuses
        name = name.replace(letter, "-")
    made = mlflow.create_logged_model(
        experiment, name, source, tags=model["tags"], params=model["params"], model_type=MODEL_TYPE
    )
    return mlflow.finalize_logged_model(made.model_id, "READY")


def _log_scores(mlflow: Any, model_id: str, model: Mapping[str, Any], runs: Sequence[str]) -> None:
    """A run's own last value once more, now with the model's name: MLflow keeps one of them."""
    from mlflow.entities import Dataset, DatasetInput, LoggedModelOutput, Metric

    name, source = model["questions"]["name"], model["questions"]["source"]
    digest = hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
    questions = {"dataset_name": name, "dataset_digest": digest}
    for run in runs:
        mlflow.log_inputs(run, [DatasetInput(Dataset(name, digest, "code", source), [])])
        lasts = [points[-1] for key in SCORED if (points := mlflow.get_metric_history(run, key))]
        found = [Metric(one.key, one.value, one.timestamp, one.step, model_id=model_id, **questions) for one in lasts]
        if run == runs[0] and lasts:
            at = lasts[0]
            found += [
                Metric(key, value, at.timestamp, at.step, model_id=model_id, **questions)
                for key, value in model["metrics"].items()
            ]
        mlflow.log_batch(run, metrics=found)
        outputs = mlflow.get_run(run).outputs
        if model_id not in {
            one.model_id for one in (outputs.model_outputs if outputs else ())
        }:  # MLflow refuses a second
            mlflow.log_outputs(run, [LoggedModelOutput(model_id, lasts[0].step if lasts else 0)])
