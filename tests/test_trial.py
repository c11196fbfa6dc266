"""A whole trial: deterministic, restorable bit for bit, clean where it has to be clean, and with an outcome for every
ending.

The workload `tiny` is too small for findings. Where a claim needs answers that differ, the task's judge is replaced by
a checksum of the answer: then one changed token anywhere shows.
"""

import copy
import json
import math
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainable.grpo
import trainable.trial
from spaces.config import ConfigError, TrialConfig
from spaces.reading import read_config
from spaces.workloads import WORKLOADS
from tests.conftest import ModelFolder, Tiny
from trainable.disk.checkpoint import VERSION, digest_of, load_state, save_checkpoint, save_final, save_state
from trainable.disk.folder import Folder
from trainable.evaluation import evaluate
from trainable.forward.logps import Batch, clean_logps
from trainable.noise import sigma_at
from trainable.noised import noised
from trainable.outcome import Outcome, StepReport
from trainable.policy.policy import Policy, block_of, deployed, unquantized
from trainable.seeds import generator
from trainable.tasks.addition import exact_reward
from trainable.tasks.task import ProceduralTask, Question, each
from trainable.trial import Trial, run_trial

LINEAR_NOISE = ("noise.modules=[linear]", "noise.sigma_start=0.02", "noise.sigma_end=0.005")
WRECKED = ("noise.modules=[linear]", "noise.sigma_start=2", "noise.sigma_end=2", "grpo.filter_groups=resample")
FROZEN = ("grpo.learning_rate=1e-30",)  # too small to move any fp32 weight
W16A16 = ("quant.weights=none", "quant.activations=none")
TWO_DIGITS = ("task.digits=2",)  # hundreds of held-out sums, where there are a handful of one digit
GSM8K = Path(__file__).parent / "data" / "gsm8k_small.jsonl"


def weights_of(trial: Trial) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trial.policy.model.named_parameters()}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def finish(trial: Trial) -> list[StepReport]:
    reports = []
    while not trial.done:
        reports.append(trial.step())
    return reports


def comparable(report: StepReport, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A report without the clock; NaN as text, because NaN is not itself."""
    tree = report.as_tree()
    del tree["seconds"]
    tree["signals"] = {n: repr(v) for n, v in tree["signals"].items() if not n.startswith("perf/") and n not in without}
    return tree | {"samples": report.samples}


def comparable_outcome(outcome: Outcome) -> dict[str, Any]:
    tree = outcome.as_tree()
    del tree["seconds"]
    return tree


def checksum(question: Question, text: str) -> float:
    """1 for about half of all answers; any other answer is as likely to change it as not."""
    return float(zlib.crc32(f"{question.prompt}{text}".encode()) % 2)


def with_checksums(trial: Trial) -> Trial:
    trial.task.reward = each(exact=checksum)
    return trial


# --- the same again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [(), (*LINEAR_NOISE, "model.adapter=lora")], ids=["full", "lora"])
def test_same_configuration_and_seed_give_the_same_bits(tiny: Tiny, overrides: tuple[str, ...]) -> None:
    first, second = Trial(tiny(*overrides)), Trial(tiny(*overrides))
    start = weights_of(first)
    reports = finish(first)
    torch.rand(3)  # the global generator has no say
    assert [comparable(r) for r in finish(second)] == [comparable(r) for r in reports]
    assert same_weights(weights_of(first), weights_of(second))
    assert not same_weights(weights_of(first), start), "something was learned"
    assert comparable_outcome(first.outcome()) == comparable_outcome(second.outcome())


def test_another_seed_gives_another_trial(tiny: Tiny) -> None:
    trials = [Trial(tiny("grpo.steps=1", "noise.num_stages=1", f"seed={seed}")) for seed in (0, 1)]
    reports = [finish(trial) for trial in trials]
    assert reports[0][0].samples != reports[1][0].samples
    assert not same_weights(*(weights_of(trial) for trial in trials))


def test_arms_of_one_seed_share_questions_and_start(tiny: Tiny) -> None:
    """What makes a comparison paired: until the first noise, treated and control are the same run, bit for bit."""
    arms = [Trial(tiny("noise.num_stages=2", *overrides)) for overrides in (LINEAR_NOISE, ("noise.sigma_start=0",))]
    reports = [finish(arm) for arm in arms]
    same = [comparable(a) == comparable(b) for a, b in zip(*reports, strict=True)]
    assert same == [True] * 3 + [False] * 3
    prompts = [[[sample.prompt for sample in report.samples] for report in run] for run in reports]
    assert prompts[0] == prompts[1]


RESTORED = {
    "full": (),
    "lora, linear noise": ("model.adapter=lora", *LINEAR_NOISE),
    "reference": ("grpo.kl_beta=0.1", "grpo.warmup_updates=8"),
    "alarms": (*WRECKED, "collapse.mode=monitor", "collapse.patience=2", "grpo.filter_groups=off"),
}


@pytest.mark.parametrize("overrides", RESTORED.values(), ids=RESTORED)
def test_a_restored_trial_continues_bit_for_bit(tiny: Tiny, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = tiny("grpo.steps=5", *overrides)
    undisturbed = Trial(config)
    reports = []
    while True:
        save_state(Folder(str(tmp_path)) / str(undisturbed.so_far.next_step), undisturbed.state_dict())
        if undisturbed.done:
            break
        reports.append(comparable(undisturbed.step()))
    outcome, weights = comparable_outcome(undisturbed.outcome()), weights_of(undisturbed)
    for step in range(6):
        restored = Trial(config)
        restored.load_state_dict(load_state(Folder(str(tmp_path)) / str(step)))
        assert [comparable(r) for r in finish(restored)] == reports[step:]
        assert same_weights(weights_of(restored), weights)
        assert comparable_outcome(restored.outcome()) == outcome
    if "collapse.mode=monitor" in overrides:
        assert outcome["alarms"], "streaks and alarms were really there to be restored"


def test_a_checkpoint_is_not_touched_by_what_follows(tiny: Tiny) -> None:
    trial = Trial(tiny("grpo.steps=3"))
    trial.step()
    state = trial.state_dict()
    before = {name: tensor.clone() for part in ("model", "optimizer") for name, tensor in state[part].items()}
    progress = json.dumps(state["progress"])
    restored = Trial(tiny("grpo.steps=3"))
    restored.load_state_dict(state)
    finish(trial)
    finish(restored)
    assert all(torch.equal(t, before[name]) for part in ("model", "optimizer") for name, t in state[part].items())
    assert json.dumps(state["progress"]) == progress


def test_each_phase_is_announced_as_it_begins(tiny: Tiny) -> None:
    """For whoever watches that none of them hangs."""
    phases: list[str] = []
    trial = Trial(tiny("grpo.steps=2", "grpo.filter_groups=off", "eval.every=0"), on_phase=phases.append)
    finish(trial)
    trial.outcome()
    announced = [phase for before, phase in zip(["", *phases], phases, strict=False) if phase != before]
    assert announced == ["evaluate", *("rollout", "update") * 3, "evaluate"], "the baseline and two steps"


def test_a_checkpoint_of_another_version_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    save_state(Folder(str(tmp_path)), Trial(tiny()).state_dict())
    file = tmp_path / "progress.json"
    file.write_text(file.read_text().replace(f'"version": {VERSION}', '"version": 99', 1))
    with pytest.raises(
        ConfigError, match=f"checkpoint version 99, this program reads {VERSION}; use the program that wrote it"
    ):
        load_state(Folder(str(tmp_path)))


def test_the_recorded_configuration_is_the_one_that_ran(tiny: Tiny) -> None:
    trial = Trial(tiny("grpo.steps=1"))
    finish(trial)
    recorded = read_config(json.loads(json.dumps(trial.outcome().as_tree()))["config"])
    assert recorded == trial.config
    assert recorded.threads == torch.get_num_threads()
    assert recorded.model_copy(update={"threads": None}) == tiny("grpo.steps=1")


# --- noise: in the rollout alone --------------------------------------------------------------------------------------


HUGE = (
    "noise.modules=[rmsnorm, linear]",
    "noise.final_norm=true",
    "noise.sigma_start=3",
    "noise.sigma_end=3",
    "noise.num_stages=1",
)


@pytest.mark.parametrize("placement", ["before", "after"])
def test_noise_never_changes_clean_weights(tiny: Tiny, placement: str) -> None:
    trial = Trial(tiny(*HUGE, *FROZEN, "collapse.mode=off", f"noise.placement={placement}"))
    before = weights_of(trial)
    finish(trial)
    assert trial.so_far.updates == 12, "it did learn, by next to nothing"
    assert same_weights(weights_of(trial), before)
    assert all(linear.deployed_weight is None for linear in trial.policy.linears.values())


def test_evaluation_sees_no_noise(tiny: Tiny) -> None:
    """Same weights, one arm under huge noise: the same answers to every question, and other samples."""
    arms = [
        with_checksums(Trial(tiny(*FROZEN, *TWO_DIGITS, "collapse.mode=off", "eval.every=1", *arm)))
        for arm in (HUGE, ("noise.sigma_start=0",))
    ]
    noisy, control = [finish(arm) for arm in arms]
    outcomes = [arm.outcome() for arm in arms]
    assert outcomes[0].eval == outcomes[1].eval
    assert 0 < sum(outcomes[0].eval.correct) < outcomes[0].eval.n, "answers that differ would show"
    assert len({r.signals["eval/accuracy"] for r in (*noisy, *control)}) == 1
    assert all(a.samples != b.samples for a, b in zip(noisy, control, strict=True))
    assert all(r.signals["rollout_corr/kl"] > 0.1 for r in noisy)


def test_accuracies_are_in_the_deployed_precision_and_unquantised(tiny: Tiny) -> None:
    """W4A4 and W16A16 on the same weights: the second's only accuracy is the first's accuracy_bf16."""
    quantized, plain = (
        with_checksums(Trial(tiny("grpo.steps=1", *TWO_DIGITS, *FROZEN, *mode))) for mode in ((), W16A16)
    )
    arguments = [(trial.policy, trial.task, trial.questions, trial.config) for trial in (quantized, plain)]
    deployed_answers, answers = (evaluate(*of_one).correct for of_one in arguments)
    with unquantized(quantized.policy):
        assert evaluate(*arguments[0]).correct == answers != deployed_answers
    outcomes = [(finish(trial), trial.outcome())[1].eval for trial in (quantized, plain)]
    for end in ("", "_start"):
        assert getattr(outcomes[0], f"accuracy{end}") == sum(deployed_answers) / 128
        assert (
            getattr(outcomes[0], f"accuracy_bf16{end}")
            == getattr(outcomes[1], f"accuracy{end}")
            == getattr(outcomes[1], f"accuracy_bf16{end}")
            == sum(answers) / 128
        )


def test_learning_sees_no_noise(tiny: Tiny) -> None:
    """One update per step: the ratio is that of the clean policy to itself, whoever sampled, so nothing is clipped."""
    trial = Trial(tiny(*HUGE, "grpo.updates_per_step=1", "collapse.mode=off"))
    reports = finish(trial)
    assert all(r.signals["grpo/clip_fraction"] == 0 for r in reports)
    assert all(r.signals["rollout_corr/logp_gap"] > 0.5 for r in reports)


@pytest.mark.parametrize("modules", ["rmsnorm", "linear"])
def test_the_control_is_the_noise_path_at_sigma_zero(tiny: Tiny, modules: str) -> None:
    """Noise that is drawn, scaled, added and quantised, but too small for fp32, gives the control's bits."""
    vanishing = (f"noise.modules=[{modules}]", "noise.sigma_start=1e-30", "noise.sigma_end=1e-30", "noise.num_stages=1")
    treated, control = Trial(tiny(*vanishing)), Trial(tiny("noise.sigma_start=0", "noise.num_stages=1"))
    assert treated.targets
    assert not control.targets
    reports = [[comparable(r, without=("rin/sigma",)) for r in finish(trial)] for trial in (treated, control)]
    for report in (*reports[0], *reports[1]):
        del report["sigma"]
    assert reports[0] == reports[1]
    assert same_weights(weights_of(treated), weights_of(control))
    assert treated.outcome().eval == control.outcome().eval


@pytest.mark.parametrize("schedule", ["qerl_code", "linear", "constant"])
def test_sigma_of_every_step_is_the_schedule_s(tiny: Tiny, schedule: str) -> None:
    config = tiny(f"noise.schedule={schedule}", "noise.sigma_start=0.02", "noise.sigma_end=0.001", "noise.num_stages=4")
    trial = Trial(config)
    reports = finish(trial)
    expected = [sigma_at(config.noise, step, 6) for step in range(6)]
    assert [r.sigma for r in reports] == expected
    assert [r.signals["rin/sigma"] for r in reports] == expected
    effects = trial.outcome().receipt.effects
    assert {(e.step, e.nominal) for e in effects} == {(s, expected[s]) for s in (2, 3, 5)}, "once per noisy stage"
    assert all(e.applied == pytest.approx(e.nominal, rel=0.5) for e in effects)
    assert {e.name for e in effects} == set(trial.outcome().receipt.noised)


def test_the_receipt_costs_no_second_draw(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is drawn once a rollout, and measured in its stage's first step alone."""
    measured: list[bool] = []

    def counted(*arguments: Any) -> Any:
        measured.append(arguments[3] is not None)
        return noised(*arguments)

    monkeypatch.setattr("trainable.noise.noised", counted)
    trial = Trial(tiny("noise.num_stages=2", "noise.sigma_start=0.01", "collapse.mode=off"))
    reports, weights = finish(trial), len(trial.targets)
    noisy = sum(r.sigma > 0 for r in reports)
    assert noisy > 1
    assert measured == [True] * weights + [False] * weights * (noisy - 1)


def test_a_trial_whose_noise_another_generator_drew_is_refused(tiny: Tiny) -> None:
    noisy, control = Trial(tiny()), Trial(tiny("noise.sigma_start=0"))
    for trial in (noisy, control):
        state = trial.state_dict()
        trial.load_state_dict(state)
        del state["progress"]["draws"]  # as it was before it was written down
        if trial is noisy:
            with pytest.raises(ConfigError, match=r"^noise: another generator than philox4x32-10 .* begin anew$"):
                trial.load_state_dict(state)
        else:
            trial.load_state_dict(state)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("noise.layers=[2]",), r"noise\.layers=2: the model has blocks 0 to 1"),
        (("noise.layer_multipliers=[0, 0]",), r"noise\.layer_multipliers .*sigma 0; noise would touch nothing"),
        (("quant.exclude=[lm_head, layers.2]",), r"quant\.exclude=layers\.2: matches no linear layer"),
        (("quant.skip_layers=[2]",), r"quant\.skip_layers=2: the model has blocks 0 to 1"),
        (("task.digits=6",), r"task\.digits=6 is more than the base was trained on"),
    ],
)
def test_a_setting_that_would_touch_nothing_is_an_error_before_the_first_step(
    tiny: Tiny, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trial(tiny(*overrides))


def test_the_baseline_is_free_of_noise_and_not_learned_from(tiny: Tiny) -> None:
    """Also where the schedule has no quiet stage."""
    arms = [
        Trial(tiny("grpo.steps=1", "collapse.mode=off", *arm))
        for arm in (HUGE, ("noise.sigma_start=0", "noise.num_stages=1"))
    ]
    for arm in arms:
        arm.step()
    baselines = [arm.detector.baseline for arm in arms]
    assert baselines[0] == baselines[1]
    (baseline,) = baselines[0]
    assert baseline["kl"] < 1e-6
    assert "grad_norm" not in baseline
    assert [arm.so_far.updates for arm in arms] == [2, 2]


# --- endings ----------------------------------------------------------------------------------------------------------


def test_the_keys_of_a_step_line_and_of_the_outcome_are_fixed(tiny: Tiny) -> None:
    """Scripts of users depend on them (design: "JSON keys that are fixed")."""
    config = tiny("grpo.steps=3", "eval.every=2")
    steps = run_trial(config)
    lines = []
    while True:
        try:
            lines.append(json.loads(json.dumps(next(steps).as_tree())))
        except StopIteration as end:
            outcome = json.loads(json.dumps(end.value.as_tree()))
            break
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert list(line) == ["step", "sigma", "signals", "verdict", "seconds"]
        assert line["verdict"] == {"collapsed": False, "rule": "", "evidence": ""}
        assert all(isinstance(value, float) for value in line["signals"].values())
    fixed = {"outcome", "rule", "step", "eval", "receipt", "config", "seconds"}
    assert set(outcome) == fixed | {"alarms"}
    assert (outcome["outcome"], outcome["rule"], outcome["step"]) == ("completed", "", 3)
    assert {"accuracy", "accuracy_bf16", "accuracy_start", "n", "correct"} <= set(outcome["eval"])
    assert outcome["eval"]["n"] == len(outcome["eval"]["correct"]) == 128
    assert outcome["eval"]["accuracy"] == sum(outcome["eval"]["correct"]) / 128
    receipt = outcome["receipt"]
    assert {"quantized", "noised", "effects"} <= set(receipt)
    assert len(receipt["quantized"]) == 14
    sums = receipt["coverage"]
    assert sums["weights"] == sums["quantized"] + sums["excluded"] + sums["left"] > 0
    assert (sums["excluded"], sums["left"], receipt["adapted"]) == (0, 0, [])
    assert receipt["norms"] == {"rmsnorm, gain w, pre_norm": 4, "rmsnorm, gain w, final": 1}
    assert set(receipt["moved"]) == {"matrices", "vectors"}
    w4a4 = {
        "weights": "mxfp4",
        "activations": "mxfp4",
        "scale_rule": "floor",
        "hadamard": False,
        "backward": "dequantized",
    }
    assert receipt["arithmetic"] == [w4a4]
    assert receipt["noised"] == [
        f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")
    ]
    assert {"stage", "step", "name", "layer", "nominal", "applied"} <= set(receipt["effects"][0])
    assert outcome["config"]["seed"] == 0


@pytest.mark.parametrize(
    ("every", "evaluated"), [(0, [5]), (1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [3, 5]), (10, [5])]
)
def test_evaluations_are_at_the_start_when_due_and_always_at_the_end(
    tiny: Tiny, every: int, evaluated: list[int]
) -> None:
    trial = Trial(tiny(f"eval.every={every}"))
    reports = finish(trial)
    assert [r.step for r in reports if "eval/accuracy" in r.signals] == evaluated
    assert [r.step for r in reports if "eval/accuracy_start" in r.signals] == [0]
    assert [r.step for r in reports if "eval/accuracy_bf16" in r.signals] == [5]
    assert reports[-1].signals["eval/accuracy"] == trial.outcome().eval.accuracy


def test_a_collapse_ends_the_trial_at_once_with_its_name_and_its_results(tiny: Tiny) -> None:
    trial = with_checksums_at_end(Trial(tiny(*WRECKED)))
    reports = finish(trial)
    assert [r.sigma for r in reports] == [0.0, 0.0, 2.0], "the first noisy step is the last"
    verdict = reports[-1].verdict
    assert (verdict.collapsed, verdict.rule) == (True, "filter_rejection")
    assert "groups with variance after 5 batches" in verdict.evidence
    assert reports[-1].signals["filter/gen_batches"] == 5
    assert "grpo/loss" not in reports[-1].signals, "a rejected step is not learned from"
    assert not any(r.verdict.collapsed for r in reports[:-1])
    outcome = trial.outcome()
    assert (outcome.outcome, outcome.rule, outcome.step) == ("collapsed", "filter_rejection", 3)
    assert outcome.eval.n == len(outcome.eval.correct) == 128
    assert reports[-1].signals["eval/accuracy"] == outcome.eval.accuracy > 0, (
        "evaluated on clean weights, when it ended"
    )
    assert [e.step for e in outcome.receipt.effects] == [2] * 14
    with pytest.raises(AssertionError, match="the trial has ended"):
        trial.step()


@pytest.mark.parametrize(("mode", "updates"), [("enforce", 0), ("monitor", 2), ("off", 2)])
def test_too_few_groups_are_learned_from_unless_collapses_are_enforced(tiny: Tiny, mode: str, updates: int) -> None:
    trial = Trial(tiny("grpo.filter_groups=resample", "grpo.max_gen_batches=1", f"collapse.mode={mode}"))
    asked: dict[str, int] = {}

    def rarely(question: Question, text: str) -> float:
        """Groups of two prompts differ within themselves, whatever was sampled; all others are all wrong."""
        if len(asked) < 2 or question.prompt in asked:
            asked[question.prompt] = asked.get(question.prompt, 0) + 1
        return float(asked.get(question.prompt, 0) % 2)

    trial.begin()
    trial.task.reward = each(exact=rarely)
    signals = trial.step().signals
    assert 0 < signals["filter/kept_groups"] < 8
    assert trial.so_far.updates == updates
    assert ("grpo/loss" in signals) == (updates > 0)
    assert trial.done == (mode == "enforce")


def with_checksums_at_end(trial: Trial) -> Trial:
    """Checksums judge evaluations only, so that the samples stay as wrong as they are."""
    held_out = {question.prompt for question in trial.questions}
    trial.task.reward = each(exact=lambda q, text: (checksum if q.prompt in held_out else exact_reward)(q, text))
    return trial


@pytest.mark.parametrize("filter_groups", ["resample", "off"])
def test_monitoring_says_so_and_goes_on(tiny: Tiny, filter_groups: str) -> None:
    trial = Trial(tiny(*WRECKED, f"grpo.filter_groups={filter_groups}", "collapse.mode=monitor", "collapse.patience=2"))
    reports = finish(trial)
    outcome = trial.outcome()
    assert (outcome.outcome, outcome.rule, outcome.step) == ("completed", "", 6)
    alarmed = [2, 3, 4, 5] if filter_groups == "resample" else [3, 4, 5]
    assert [alarm.step for alarm in outcome.alarms] == alarmed
    assert [r.step for r in reports if r.verdict.collapsed] == alarmed
    for alarm in outcome.alarms:
        verdict = reports[alarm.step].verdict
        assert (alarm.rule, alarm.evidence) == (verdict.rule, verdict.evidence)
    if filter_groups == "resample":
        assert outcome.alarms[0].rule == "filter_rejection"


def test_off_does_not_look(tiny: Tiny) -> None:
    trial = Trial(tiny(*WRECKED, "collapse.mode=off"))
    assert not any(r.verdict.collapsed for r in finish(trial))
    outcome = trial.outcome()
    assert (outcome.outcome, outcome.alarms) == ("completed", ())


def test_a_stopped_trial_is_evaluated(tiny: Tiny) -> None:
    trial = with_checksums(Trial(tiny()))
    trial.step()
    trial.step()
    outcome = trial.outcome()
    assert (outcome.outcome, outcome.rule, outcome.step) == ("stopped", "", 2)
    assert outcome.eval.n == 128
    assert 0 < outcome.eval.accuracy < 1


def test_a_trial_that_is_asked_before_its_first_step_has_an_outcome(tiny: Tiny) -> None:
    outcome = Trial(tiny()).outcome()
    assert (outcome.outcome, outcome.step) == ("stopped", 0)
    assert outcome.eval.accuracy == outcome.eval.accuracy_start


def test_an_outcome_is_of_the_weights_when_it_is_asked(tiny: Tiny) -> None:
    """Asked in between, then again after more steps: the second answer is not the first one's."""
    overrides = ("grpo.steps=4", "grpo.learning_rate=3e-3", *TWO_DIGITS)
    asked, left_alone = (with_checksums(Trial(tiny(*overrides))) for _ in range(2))
    between = None
    for _ in range(3):
        asked.step()
        left_alone.step()
        between = between or asked.outcome().eval.correct
    again = asked.outcome().eval.correct
    assert again == left_alone.outcome().eval.correct
    assert again != between


def test_a_reward_function_that_raises_is_a_bug_and_propagates(tiny: Tiny) -> None:
    trial = Trial(tiny())
    trial.step()

    def broken(question: Question, text: str) -> float:
        raise KeyError("a bug")

    trial.task.reward = each(exact=broken)
    with pytest.raises(KeyError, match="a bug"):
        trial.step()


@pytest.mark.parametrize("mode", ["enforce", "monitor", "off"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_a_collapse_in_every_mode(
    tiny: Tiny, mode: str, steps_before: int, value: float
) -> None:
    trial = Trial(tiny(f"collapse.mode={mode}"))
    for _ in range(steps_before):
        trial.step()
    with torch.no_grad():
        next(iter(trial.policy.trainable().values()))[:] = value
    report = trial.step()
    assert trial.done
    assert (report.verdict.collapsed, report.verdict.rule) == (True, "nonfinite")
    assert "nan" in report.verdict.evidence or "inf" in report.verdict.evidence
    assert any(math.isnan(v) for v in report.signals.values()), "NaN is kept"
    outcome = trial.outcome()
    assert (outcome.outcome, outcome.rule, outcome.step) == ("collapsed", "nonfinite", steps_before + 1)
    assert outcome.eval.n == 128


# --- settings that change the algorithm -------------------------------------------------------------------------------


def test_the_reference_is_the_start_and_stays_there(tiny: Tiny) -> None:
    trial = Trial(tiny("grpo.kl_beta=0.1", "grpo.learning_rate=1e-3", "grpo.updates_per_step=1", *W16A16))
    assert trial.reference is not None
    start = weights_of(trial)
    assert {name: p.detach() for name, p in trial.reference.model.named_parameters()}.keys() == start.keys()
    reports = finish(trial)
    assert all(torch.equal(p, start[name]) for name, p in trial.reference.model.named_parameters())
    assert not same_weights(weights_of(trial), start)
    kl = [r.signals["grpo/reference_kl"] for r in reports]
    assert kl[0] < 1e-6 < 1e-3 < kl[-1]
    assert "reference" not in json.dumps(list(trial.state_dict()))


def held_bytes(trial: Trial) -> int:
    """Of all weights that a trial holds, shared ones once; those that a rollout was frozen with, too."""
    found = {}
    for policy in filter(None, (trial.policy, trial.reference)):
        frozen = [linear.deployed_weight for linear in policy.linears.values() if linear.deployed_weight is not None]
        for tensor in (*policy.model.parameters(), *frozen):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def test_with_adapters_there_is_one_copy_of_the_base_and_its_log_probs_are_those_of_the_start(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, learning = ("model.adapter=lora", "model.lora_rank=4"), ("grpo.learning_rate=1e-2", "grpo.steps=3")
    alone = held_bytes(Trial(tiny("grpo.kl_beta=0", *lora)))
    trial = Trial(tiny("grpo.kl_beta=0.1", *lora, *learning))
    begun = copy.deepcopy(trial.policy)
    assert held_bytes(trial) == alone
    held: list[int] = []
    batches: list[Batch] = []

    def spy(policy: Policy, optimizer: Any, batch: Batch, *args: Any, **options: Any) -> Any:
        held.append(held_bytes(trial))
        batches.append(batch)
        return trainable.grpo.update(policy, optimizer, batch, *args, **options)

    monkeypatch.setattr(trainable.trial, "update", spy)
    reports = finish(trial)
    assert held == [alone] * 3, "and the rollout's quantised weights are gone when learning begins"
    with deployed(begun):
        expected = clean_logps(begun, batches[-1], 1.0, 1024)
    assert batches[-1].reference_logps is not None
    assert torch.equal(batches[-1].reference_logps, expected)
    assert not torch.equal(batches[-1].old_logps, expected)
    assert reports[-1].signals["grpo/reference_kl"] > 0
    assert all(parameter.requires_grad for name, parameter in trial.policy.model.named_parameters() if "lora" in name)


def test_the_kl_term_pulls_the_policy_back_to_the_reference(tiny: Tiny) -> None:
    """Nothing but that term has a gradient here: all rewards are equal, and the policy starts beside its reference."""
    trial = Trial(
        tiny(
            "grpo.kl_beta=1",
            "grpo.learning_rate=1e-3",
            "grpo.steps=12",
            "grpo.prompts=32",
            "collapse.mode=off",
            *W16A16,
        )
    )
    trial.task.reward = each(exact=lambda question, text: 0.0)
    source = generator("displacement")
    with torch.no_grad():
        for parameter in trial.policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=source), alpha=0.02)
    kl = [report.signals["grpo/reference_kl"] for report in finish(trial)]
    assert kl[-1] < kl[0] / 3


def test_without_kl_there_is_no_reference(tiny: Tiny) -> None:
    assert Trial(tiny("grpo.kl_beta=0")).reference is None


def test_the_correction_changes_learning_and_nothing_before_it(tiny: Tiny) -> None:
    noise = ("noise.num_stages=1", *LINEAR_NOISE, "grpo.steps=1")
    trials = {c: Trial(tiny(f"rollout.correction={c}", *noise)) for c in ("none", "token", "sequence")}
    reports = {c: finish(trial)[0] for c, trial in trials.items()}
    assert len({report.samples for report in reports.values()}) == 1
    assert reports["none"].signals["rollout_corr/weight"] == reports["token"].signals["rollout_corr/weight"] != 1.0
    assert reports["none"].signals["rollout_corr/kl"] == reports["sequence"].signals["rollout_corr/kl"] > 0
    kinds = list(trials)
    assert not any(
        same_weights(weights_of(trials[a]), weights_of(trials[b])) for i, a in enumerate(kinds) for b in kinds[:i]
    )


def test_switching_the_filter_does_not_change_the_batch_that_is_trained_on(tiny: Tiny) -> None:
    sizes = {}
    for policy in ("off", "drop", "resample"):
        trial = Trial(tiny("grpo.steps=1", f"grpo.filter_groups={policy}", "grpo.generation_prompts=20"))
        signals = finish(trial)[0].signals
        sizes[policy] = signals["filter/kept_groups"]
        generated = signals["filter/kept_groups"] / (1 - signals["filter/wasted"])
        assert generated == pytest.approx(8 if policy == "off" else 20 * signals["filter/gen_batches"])
    assert sizes == {"off": 8, "drop": 8, "resample": 8}


def test_dropping_everything_is_not_an_error(tiny: Tiny) -> None:
    trial = Trial(tiny(*WRECKED, "grpo.filter_groups=drop", "collapse.mode=off", "noise.num_stages=1"))
    reports = finish(trial)
    empty = [r for r in reports if r.signals["filter/kept_groups"] == 0]
    assert empty
    assert all("grpo/loss" not in r.signals for r in empty)
    assert trial.outcome().outcome == "completed"


def test_warm_up_counts_updates_that_were_made(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    update = trainable.grpo.update

    def spy(*arguments: Any, first_update: int, **options: Any) -> Any:
        seen.append(first_update)
        return update(*arguments, first_update=first_update, **options)

    monkeypatch.setattr(trainable.trial, "update", spy)
    finish(Trial(tiny("grpo.steps=3", "grpo.updates_per_step=4")))
    assert seen == [0, 4, 8]


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize(
    "overrides",
    [
        ("grpo.learning_rate=1e-3", *W16A16),
        ("grpo.learning_rate=1e-3",),
        ("grpo.learning_rate=3e-3", "model.adapter=lora"),
    ],
    ids=["W16A16", "W4A4", "W4A4-lora"],
)
def test_what_is_rewarded_is_learned(tiny: Tiny, wanted: int, overrides: tuple[str, ...]) -> None:
    """The same start goes either way, by the reward alone: to answers of one digit, or of two."""
    sizes = ("grpo.steps=12", "grpo.prompts=16", "grpo.group_size=8", "grpo.updates_per_step=4", "eval.every=0")
    trial = Trial(tiny("noise.sigma_start=0", "collapse.mode=off", *sizes, *overrides))
    trial.task.reward = each(exact=lambda question, text: float(len(text) == wanted))
    rewards = [report.signals["grpo/reward"] for report in finish(trial)]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.25


# --- the plan's own workload, in small --------------------------------------------------------------------------------


Plan = Callable[..., TrialConfig]


@pytest.fixture
def plan(model_folder: ModelFolder) -> Plan:
    """qwen2.5-1.5b-gsm8k on a random model of its architecture and 40 problems; sizes are smaller, every other number
    is its own."""
    smaller = [
        f"model.name={model_folder(layers=4, text=True)}",
        f"task.path={GSM8K}",
        "grpo.steps=2",
        "grpo.prompts=2",
        "grpo.updates_per_step=2",
        "grpo.generation_prompts=4",
        "grpo.overlong_buffer=4",
        "rollout.max_new_tokens=12",
        "rollout.batch_size=32",
        "eval.questions=6",
        "noise.num_stages=2",
    ]
    return lambda *overrides: read_config(WORKLOADS["qwen2.5-1.5b-gsm8k"].settings, [*smaller, *overrides])


def even(question: Question, text: str) -> float:
    return float(len(text) % 2 == 0)


def test_the_plan_s_workload_runs(plan: Plan) -> None:
    config = plan()
    assert (config.model.adapter, config.model.dtype, config.grpo.filter_groups, config.task.chat) == (
        "lora",
        "bfloat16",
        "resample",
        True,
    )
    trial = Trial(config)
    assert {block_of(name) for name in trial.policy.quantized} == {1, 2}, "the first and the last block stay at 16 bits"
    trial.task.reward = each(strict=even)  # a random model is never right
    before = weights_of(trial)
    reports = finish(trial)
    outcome = trial.outcome()
    assert (outcome.outcome, outcome.step) == ("completed", 2)
    after = weights_of(trial)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".lora_" in name for name in moved)
    assert [r.sigma for r in reports] == [0.0, 0.01]
    for report in reports:
        assert report.signals["filter/kept_groups"] == 2
        assert math.isfinite(report.signals["grpo/grad_norm"])
        assert report.samples[0].prompt.endswith("followed by the final answer as a bare number.")
    assert reports[0].signals["grpo/reward"] < reports[0].signals["grpo/accuracy"], (
        "the overlong penalty is in the reward"
    )
    assert outcome.eval.n == 6


def test_a_checkpoint_of_adapters_holds_nothing_of_the_base(plan: Plan, tmp_path: Path) -> None:
    """Adapters in 32 bits with two moments each, and a count of updates for each tensor. Of rank 32 on Qwen2.5-1.5B,
    36.9 M weights, that is 443 MB a checkpoint and 148 MB at the end; its base has 3.1 GB."""
    trial = Trial(plan())
    trial.task.reward = each(strict=even)
    trial.step()
    folder = Folder(str(tmp_path))
    save_checkpoint(folder, 1, trial.state_dict())
    save_final(folder, trial.policy.trainable())
    frozen = [weight for weight in trial.policy.model.parameters() if not weight.requires_grad]
    learned = trial.policy.trainable()
    assert frozen
    assert all(".lora_" in name for name in learned)
    size = sum(weight.numel() * 4 for weight in learned.values())
    tensors = load_file(tmp_path / "checkpoint-000001" / "tensors.safetensors")
    steps = [name for name in tensors if name.endswith("/step")]
    assert len(tensors) == 3 * len(learned) + len(steps)
    assert sum(tensor.nbytes for tensor in tensors.values()) == 3 * size + 4 * len(steps)
    assert set(load_file(tmp_path / "final.safetensors")) == set(learned)
    assert sum(tensor.nbytes for tensor in load_file(tmp_path / "final.safetensors").values()) == size


def test_a_base_that_has_changed_under_its_adapters_is_noticed_at_a_resume(plan: Plan, tmp_path: Path) -> None:
    """A checkpoint does not hold it. One that trains every weight holds all that a changed folder could bring, but for
    the reference of a KL penalty."""
    folder = tmp_path / "model"
    shutil.copytree(plan().model.name, folder)
    config = plan(f"model.name={folder}")
    state = Trial(config).state_dict()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"^model\.name=.*not those that this trial began with; put the model back"):
        Trial(config).load_state_dict(state)
    full = Trial(plan("model.adapter=full", "model.dtype=float32"))
    assert full.base == digest_of({})
    full.reference = full.policy
    assert full._not_in_checkpoints().keys() == full.policy.trainable().keys()


def test_the_plan_s_workload_on_a_model_that_is_never_right_collapses_by_name(plan: Plan) -> None:
    trial = Trial(plan())
    (report,) = finish(trial)
    assert report.verdict.rule == "filter_rejection"
    assert report.signals["filter/gen_batches"] == 5
    assert "eval/flexible" in report.signals
    outcome = trial.outcome()
    assert (outcome.outcome, outcome.rule, outcome.step) == ("collapsed", "filter_rejection", 1)
    assert outcome.eval.accuracy == 0


def test_completions_that_are_nearly_all_cut_off_at_the_start_are_warned_of(plan: Plan) -> None:
    """As those of an own model are at the embedded task's 6 tokens: reward 0 for ever."""

    def warnings_at(limit: int) -> list[str]:
        trial = Trial(plan(f"rollout.max_new_tokens={limit}", "grpo.overlong_buffer=0", "grpo.steps=1"))
        trial.step()
        return [line for line in trial.receipt().warnings if "cut off" in line]

    (warning,) = warnings_at(1)
    assert "of the completions before step 0 were cut off at rollout.max_new_tokens=1" in warning
    assert warnings_at(64) == []


def test_the_line_of_the_docs_for_an_own_model_works(model_folder: ModelFolder) -> None:
    page = (Path(__file__).parent.parent / "docs" / "own-model.md").read_text()
    (line,) = re.findall(r"^rin sweep sigma --set model\.name=/path/to/folder(?:.*\\\n)*.*", page, re.MULTILINE)
    overrides = re.findall(r"--set (\S+)", line)
    mine = [f"model.name={model_folder(text=True)}", f"task.path={GSM8K}", "eval.questions=6"]  # it has 40 rows
    config = read_config(WORKLOADS["embedded"].settings, [*overrides, *mine, "grpo.prompts=4"])
    Trial(config).close()
    assert config.rollout.max_new_tokens >= 256


def with_a_long_row(folder: Path, number: int) -> Path:
    """The small file, with one question of 1,000 characters."""
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    rows[number]["question"] += "x" * 1000
    path = folder / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("number", [0, 20])
def test_a_question_that_is_too_long_is_an_error_before_step_0_that_names_its_row(
    plan: Plan, tmp_path: Path, number: int
) -> None:
    path = with_a_long_row(tmp_path, number)
    said = rf"max_prompt_tokens=512: the prompt of .*q\.jsonl:{number + 1} has \d+ tokens; .* task\.too_long=leave_out"
    with pytest.raises(ConfigError, match=said):
        Trial(plan(f"task.path={path}", "rollout.max_prompt_tokens=512"))


def test_a_row_that_is_too_long_is_left_out_and_counted_where_the_task_says_so(plan: Plan, tmp_path: Path) -> None:
    path = with_a_long_row(tmp_path, 20)
    trial = Trial(
        plan(f"task.path={path}", "rollout.max_prompt_tokens=512", "task.too_long=leave_out", "eval.questions=5")
    )
    trial.task.reward = each(strict=even)
    assert sum(len(part) for part in trial.task.questions.values()) == 39  # type: ignore[attr-defined]
    assert [report.signals["task/too_long"] for report in finish(trial)] == [1.0, 0.0]


def test_an_endless_task_is_measured_by_all_that_the_trial_will_ask(tiny: Tiny) -> None:
    """Sums of two digits have 4 to 6 tokens."""
    sums = ("task.digits=2", "rollout.max_prompt_tokens=5")
    with pytest.raises(ConfigError, match=r"max_prompt_tokens=5: the prompt of '\d\d\+\d\d=' has 6 tokens"):
        Trial(tiny(*sums))
    trial = Trial(tiny(*sums, "task.too_long=leave_out", "eval.questions=4"))
    reports = finish(trial)
    assert all(report.signals["task/too_long"] > 0 for report in reports)
    assert all(len(sample.prompt) <= 5 for report in reports for sample in report.samples)


def test_what_is_measured_is_what_is_asked(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every step and of every batch that a filter may take."""
    trial = Trial(tiny("grpo.filter_groups=resample", "grpo.max_gen_batches=2", "collapse.mode=monitor"))
    measured = {question.prompt for questions in trial._may_ask() for question in questions}
    asked: set[str] = set()
    original = ProceduralTask.sample

    def heard(self: ProceduralTask, count: int, **draw: int) -> list[Question]:
        drawn = original(self, count, **draw)
        asked.update(question.prompt for question in drawn)
        return drawn

    monkeypatch.setattr(ProceduralTask, "sample", heard)
    finish(trial)
    assert asked
    assert asked <= measured
