"""A trial that follows a scan runs with numbers: of that very model, mode and task, the same in every replicate, told
in its receipt, and taken away without the scan."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainable.following
from dashboards.srdd import measure
from dashboards.srdd_plan import plan_srdd
from search.arms import Candidate, as_ran, read_arms, write_arm
from search.export import EXPORTS
from search.first_build import build, to_build
from search.preflight import check_sources
from spaces import scans
from spaces.config import MODES, ConfigError, NoiseConfig, QuantConfig, TrialConfig
from spaces.library import Choice, Dimension, Space
from spaces.narrowing import searched
from spaces.reading import as_tree, load_yaml, read_config
from spaces.workloads import WORKLOADS
from tests.conftest import ModelFolder, Tiny
from tests.test_trial import comparable, finish
from tests.written_sweeps import make_arm, outcome, study, write_trial
from trainable import scan
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import read_outcome
from trainable.following import follow
from trainable.noise import chosen_layers, layer_multipliers
from trainable.outcome import Outcome
from trainable.policy.loading import skipped_layers
from trainable.scan import Scan
from trainable.tasks.table import build_task
from trainable.trial import Trial
from trainable.trial_worker import TrialWorker

LINEAR = ("noise.modules=linear", "noise.num_stages=1")
DEEP = ("model.recipe.depth=4", "model.recipe.clean_steps=0", "model.recipe.signed_steps=0", "eval.questions=2")
RULES = {
    "noise.layers": "srdd:top2",
    "noise.layer_multipliers": "srdd:deadzone@down",
    "quant.skip_layers": "srdd:sqnr:top1",
}
ALL = tuple(f"{key}={rule}" for key, rule in RULES.items())


@pytest.fixture(autouse=True)
def scans_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is made here is found by no other test, and is of few prompts; base models stay where they are."""
    monkeypatch.setattr(trainable.following, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(trainable.following, "PROMPTS", 2)
    return tmp_path / "cache" / "scans"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Scan]:
    """Scans that were really made, in order."""
    found: list[Scan] = []

    def scan_policy(*arguments: Any, **options: Any) -> Scan:
        found.append(scan_policy_itself(*arguments, **options))
        return found[-1]

    scan_policy_itself = trainable.following.scan_policy
    monkeypatch.setattr(trainable.following, "scan_policy", scan_policy)
    return found


def followed(config: TrialConfig, sweep: Folder | None = None) -> TrialConfig:
    return follow(config, build_task(config.task), sweep)[0]


# --- how it is written ------------------------------------------------------------------------------------------------


def test_scores_and_sites_are_those_of_scans() -> None:
    assert {name: part for name, (part, *_) in scan.SCORES.items()} == {
        **dict.fromkeys(scans.STATIC, "sites"),
        **dict.fromkeys(scans.FUNCTIONAL, "functional"),
    }
    assert scans.SITES == scan.SITES
    assert set(scans.UPDATES) < set(scans.FUNCTIONAL)


@pytest.mark.parametrize("score", [*scan.SCORES, *(f"deadzone@{site}" for site in scan.SITES)])
def test_every_score_can_be_followed(score: str) -> None:
    noise = NoiseConfig(layers=f"srdd:{score}:top3", layer_multipliers=f"srdd:{score}")
    quant = QuantConfig(skip_layers=f"srdd:{score}:top2")
    rules = TrialConfig(noise=noise, quant=quant).rules
    assert [(rule.score, rule.top) for rule in rules.values()] == [(score, 3), (score, 0), (score, 2)]
    config = TrialConfig(noise=noise, quant=quant)
    assert read_config(as_tree(config)) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("noise.layers=srdd:daedzone:top5", "did you mean deadzone?"),
        ("noise.layers=srdd:deadzone@dwn:top5", "did you mean down?"),
        ("noise.layers=srdd:kl@down:top5", "write kl"),
        ("noise.layers=srdd:top0", "how many of the worst layers"),
        ("noise.layers=srdd:relative_error", "write srdd:top5"),
        ("noise.layers=srdd", "write srdd:top5"),
        ("noise.layers=srd:top5", "srdd:topK"),
        ("noise.layer_multipliers=srdd:top5", "write srdd:relative_error"),
        ("noise.layer_multipliers=srdd:sqrn", "did you mean sqnr?"),
        ("quant.skip_layers=srdd:top2:deadzone", "how many of the worst layers"),
        ("quant.skip_layers=first", "write srdd:top5"),
        ("noise.layers=srdd:top3", "the worst 3 of 2 layers; give top1 to top2"),
    ],
)
def test_what_is_misspelt_is_refused_in_one_line_with_what_was_meant(tiny: Tiny, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(override)
    key = override.partition("=")[0]
    assert key in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("mode", "rule", "said"),
    [
        ("W4A16", "srdd:top1", "choose relative_error@weights"),
        ("W4A16", "srdd:deadzone@down:top1", "choose deadzone@weights"),
        ("W4A16", "srdd:deadzone@weights:top1", ""),
        ("W4A16", "srdd:kl:top1", ""),
        ("W16A16", "srdd:kl:top1", "nothing is quantised"),
    ],
)
def test_a_score_needs_what_it_scores_to_be_quantised(tiny: Tiny, mode: str, rule: str, said: str) -> None:
    given = [f"noise.layers={rule}", *(f"quant.{part}={name}" for part, name in MODES[mode].items())]
    if not said:
        assert tiny(*given).rules
        return
    with pytest.raises(ConfigError, match=said):
        tiny(*given)
    assert not tiny(*given, "noise.sigma_start=0").rules, "a control has no use for it"


@pytest.mark.parametrize(
    "use",
    [
        lambda: chosen_layers(NoiseConfig(layers="srdd:top1"), 4),
        lambda: layer_multipliers(NoiseConfig(layer_multipliers="srdd:deadzone"), 4),
        lambda: skipped_layers(QuantConfig(skip_layers="srdd:top1"), 4),
    ],
)
def test_whoever_has_no_scan_refuses_a_rule(use: Callable[[], Any]) -> None:
    """As in a TRL script."""
    with pytest.raises(ConfigError, match="only a trial makes one; give numbers"):
        use()


def test_a_space_may_list_rules_as_choices(tmp_path: Path) -> None:
    options = {"all": "all", "worst": "srdd:top1", "flushed": "srdd:deadzone@down:top1"}
    space = Space(
        name="mine",
        description="",
        settings={"noise": {"layer_multipliers": "srdd:nmse"}},
        dimensions=(Dimension(key="noise.layers", domain=Choice(options=options)),),
    )
    assert searched(space, WORKLOADS["tiny"].settings, {}) == space
    wrong = space.model_copy(
        update={"dimensions": (Dimension(key="noise.layers", domain=Choice(options={"worst": "srdd:top9"})),)}
    )
    with pytest.raises(ConfigError, match=r"noise\.layers: the worst 9 of 2 layers"):
        searched(wrong, WORKLOADS["tiny"].settings, {})
    study_of = study(tmp_path, space=space)
    build(study_of, to_build(study_of, [make_arm(study_of, "control").config]), None)
    assert len(list((tmp_path / "cache" / "scans").glob("*.json"))) == 1, "one scan serves all choices"


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_trial_runs_with_the_scans_numbers_and_its_receipt_says_which_and_from_where(
    tiny: Tiny, made: list[Scan]
) -> None:
    trial = Trial(tiny(*DEEP, *LINEAR, *ALL))
    (found,) = made
    assert found.quant["skip_layers"] == [], "what is to be skipped is not known yet"
    worst, (skipped,) = sorted(scan.worst(found, 2)), scan.worst(found, 1, "sqnr")
    factors = scan.multipliers(found, "deadzone@down")
    assert trial.config.noise.layers == tuple(worst)
    assert trial.config.noise.layer_multipliers == factors
    assert trial.config.quant.skip_layers == (skipped,)
    assert {target.layer: target.multiplier for target in trial.targets} == {i: factors[i] for i in worst}
    receipt = trial.receipt()
    assert {int(name.split(".")[2]) for name in receipt.quantized} == {0, 1, 2, 3} - {skipped}
    assert {one.setting: one.rule for one in receipt.followed} == RULES
    layers, multipliers, skip = receipt.followed
    assert layers.scores == scan.score(found, "relative_error")
    assert (layers.value, multipliers.value, skip.value) == (tuple(worst), factors, (skipped,))
    assert {one.fingerprint for one in receipt.followed} == {found.fingerprint}
    assert str(layers) == f"noise.layers = {worst} from srdd:top2, scan {layers.scan}"


def test_a_trial_follows_the_scan_that_rin_srdd_shows(tiny: Tiny) -> None:
    options: dict[str, Any] = {"text": None, "completions": False, "functional": False, "seed": 0}
    shown = measure(
        plan_srdd("tiny", overrides=["task.digits=1"], prompts=2, **options), lambda done, total, what: None
    )
    rule = "noise.layer_multipliers=srdd:nmse@down"
    assert followed(tiny(rule)).noise.layer_multipliers == scan.multipliers(shown, "nmse@down")


@pytest.mark.parametrize("kind", ["kl", "survival"])
def test_a_functional_score_makes_the_functional_part(tiny: Tiny, made: list[Scan], kind: str) -> None:
    """What hangs on how is learned is scanned anew for another way of learning; the KL of a layer is not."""
    given = [f"noise.layer_multipliers=srdd:{kind}", "noise.layers=srdd:top1"]
    first, records = follow(config := tiny(*given), build_task(config.task))
    assert isinstance(first.noise.layer_multipliers, tuple)
    assert sum(first.noise.layer_multipliers) == pytest.approx(2)
    assert first.noise.layer_multipliers[0] != first.noise.layer_multipliers[1]
    assert [one.score for one in records] == ["relative_error", kind]
    followed(tiny(*given, "grpo.learning_rate=1e-3"))
    assert len(made) == (2 if kind == "survival" else 1)


@pytest.mark.slow
def test_the_outcome_repeats_the_trial_without_a_scan(
    tiny: Tiny, made: list[Scan], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(tiny(*DEEP, *LINEAR, *ALL, "grpo.steps=1"))
    reports, ended = finish(trial), trial.outcome()
    assert Outcome.from_tree(json.loads(json.dumps(ended.as_tree()))).receipt.followed == ended.receipt.followed
    monkeypatch.delattr(trainable.following, "scan_policy")
    again = Trial(read_config(as_tree(ended.config)))
    assert [comparable(report) for report in finish(again)] == [comparable(report) for report in reports]
    assert again.outcome().receipt.followed == ()
    assert not ended.config.rules


def test_a_control_makes_no_scan_and_is_written_down_without_rules(tiny: Tiny, made: list[Scan]) -> None:
    quiet = followed(tiny("noise.sigma_start=0", *ALL[:2]))
    assert (quiet.noise.layers, quiet.noise.layer_multipliers, made) == ("all", (), [])
    bare = tiny("quant.weights=none", "quant.activations=none", ALL[2])
    assert (followed(bare).quant.skip_layers, made) == ((), [])


def test_replicates_and_adapters_are_told_what_the_first_trial_was_told(tiny: Tiny, made: list[Scan]) -> None:
    given = [*DEEP, *LINEAR, *ALL]
    plain = [
        followed(tiny(*given, f"seed={seed}", more)) for seed in (0, 1) for more in ("threads=1", "grpo.prompts=4")
    ]
    assert len(made) == 1
    assert len({(c.noise.layers, c.noise.layer_multipliers, c.quant.skip_layers) for c in plain}) == 1
    adapted = followed(tiny(*given, "model.adapter=lora", "seed=3"))
    assert adapted.noise == plain[0].noise


def test_a_checkpoint_that_began_with_other_numbers_is_refused(tiny: Tiny) -> None:
    trial = Trial(tiny("noise.layers=srdd:top1"))
    state = trial.state_dict()
    trial.load_state_dict(state)
    state["progress"]["followed"] = {"noise.layers": [1 - trial.config.noise.layers[0]]}
    with pytest.raises(ConfigError, match=r"noise\.layers=srdd:top1: came to \[\d\] when this trial began"):
        trial.load_state_dict(state)


# --- which scan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "scanned"),
    [
        ("quant.scale_rule=even", 2),
        ("quant.exclude=[lm_head, o_proj]", 2),
        ("quant.skip_layers=[0]", 2),
        ("model.dtype=bfloat16", 2),
        ("model.recipe.seed=1", 2),
        ("task.digits=2", 2),
        ("noise.layers=srdd:deadzone:top1", 1),
        ("grpo.learning_rate=1e-3", 1),
    ],
)
def test_a_scan_is_of_one_model_mode_and_task(tiny: Tiny, made: list[Scan], other: str, scanned: int) -> None:
    given = [*DEEP, "noise.layers=srdd:top1"]
    followed(tiny(*given))
    followed(tiny(*given, other))
    assert len(made) == scanned


@pytest.fixture
def checkpoint(tmp_path: Path, model_folder: ModelFolder) -> Path:
    """A model in a folder whose weights can be changed."""
    place = tmp_path / "model"
    place.mkdir()
    for file in Path(model_folder(text=True)).iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


def of_folder(place: Path, *overrides: str) -> TrialConfig:
    given = [f"model={{name: {place}, recipe: null}}", "task={name: 'reasoning_gym:chain_sum'}"]
    more = ["rollout.max_prompt_tokens=200", "noise.layers=srdd:top1"]
    return read_config({}, [*given, *more, *overrides])


def change_weights(place: Path) -> None:
    tensors = load_file(place / "model.safetensors")
    save_file(
        {n: t + 0.1 * torch.randn_like(t) for n, t in tensors.items()}, place / "model.safetensors", {"format": "pt"}
    )


def test_two_checkpoints_under_one_name_share_no_scan(checkpoint: Path, made: list[Scan]) -> None:
    _, before = follow(of_folder(checkpoint), build_task(of_folder(checkpoint).task))
    change_weights(checkpoint)
    _, after = follow(of_folder(checkpoint), build_task(of_folder(checkpoint).task))
    assert len(made) == 2
    assert before[0].fingerprint != after[0].fingerprint
    assert before[0].scan != after[0].scan


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 99}', None])
def test_a_damaged_scan_is_made_anew(
    tiny: Tiny, made: list[Scan], scans_of_this_test: Path, damage: bytes | None
) -> None:
    config = tiny("noise.layers=srdd:top1")
    first = followed(config)
    (file,) = scans_of_this_test.glob("*.json")
    file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    assert followed(config) == first
    assert len(made) == 2
    followed(config)
    assert len(made) == 2, "which was kept"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 9}, "layers=9, and this trial has 2"),
        ({"quant": {**as_tree(QuantConfig()), "weights": "nvfp4"}}, "quant.weights=nvfp4, and this trial has mxfp4"),
        ({"model": "other"}, "model.name=other, and this trial has embedded"),
        ({"fingerprint": "other"}, "weights=other"),
    ],
)
def test_a_scan_of_another_depth_or_mode_is_refused_in_one_line(
    tiny: Tiny, made: list[Scan], scans_of_this_test: Path, changes: dict[str, Any], said: str
) -> None:
    config = tiny("noise.layers=srdd:top1")
    followed(config)
    (file,) = scans_of_this_test.glob("*.json")
    file.write_text(json.dumps(scan.as_tree(replace(made[0], **changes))))
    with pytest.raises(ConfigError) as error:
        followed(config)
    assert str(error.value).startswith("noise.layers: the scan ")
    assert said in str(error.value)
    assert "remove that file" in str(error.value)


# --- a sweep ----------------------------------------------------------------------------------------------------------


def test_all_trials_of_a_sweep_take_the_scan_that_its_first_one_put_there(
    tiny: Tiny, made: list[Scan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine that would have found other numbers."""
    config, sweep = tiny(*DEEP, "noise.layers=srdd:top1"), Folder(str(tmp_path / "s" / "scans"))
    first = followed(config, sweep)
    monkeypatch.setattr(trainable.following, "cache_folder", lambda: tmp_path / "elsewhere")
    assert len(sweep.names()) == 1
    file = sweep.names()[0]
    kept = json.loads(sweep.read(file) or b"")
    for layer in kept["scan"]["layers"]:
        layer["sites"]["output"]["relative_error"]["value"] = float(layer["layer"] == 1 - first.noise.layers[0] % 2)
    sweep.write(file, json.dumps(kept))
    assert followed(config, sweep).noise.layers == (1 - first.noise.layers[0] % 2,)
    assert len(made) == 1, "it needs none of its own"


@pytest.mark.slow
def test_the_workers_of_a_sweep_share_its_scan(tiny: Tiny, tmp_path: Path, made: list[Scan]) -> None:
    config, endings = tiny(*LINEAR, *ALL[2:], "noise.layers=srdd:top1", "grpo.steps=1", "eval.questions=8"), []
    for seed in (0, 1):
        folder = Folder(str(tmp_path / "s" / "trials" / f"a-{seed}"))
        worker = TrialWorker(folder, config.model_copy(update={"seed": seed}))
        worker.step()
        worker.leave()
        endings.append(read_outcome(folder))
    assert len(Folder(str(tmp_path / "s" / "scans")).names()) == len(made) == 1
    first, second = endings
    assert first is not None
    assert second is not None
    assert first.receipt.followed == second.receipt.followed
    assert len(first.receipt.followed) == 2


def test_the_first_writer_of_a_file_that_is_written_once_stays(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write_once("a.json", "first")
    folder.write_once("a.json", "second")
    assert (folder.read("a.json"), folder.names()) == (b"first", ["a.json"])


def test_a_node_with_other_weights_under_the_name_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    sweep = Folder(str(tmp_path / "s" / "scans"))
    followed(of_folder(checkpoint), sweep)
    change_weights(checkpoint)
    with pytest.raises(
        ConfigError, match=r"noise\.layers: the scan .* is of weights=\w+, and this trial has \w+; put back"
    ):
        followed(of_folder(checkpoint), sweep)
    sweep.write(sweep.names()[0], b"{")
    with pytest.raises(ConfigError, match="is damaged"):
        followed(of_folder(checkpoint), sweep)


def test_more_of_the_worst_layers_than_a_folders_model_has_is_refused_before_a_sweep_starts(
    checkpoint: Path, tmp_path: Path, made: list[Scan]
) -> None:
    config = study(tmp_path / "store")
    arm = make_arm(config, "a")
    arm.config = of_folder(checkpoint, "noise.layers=srdd:top9")
    with pytest.raises(ConfigError, match=r"noise\.layers: the worst 9 of 3 layers; give top1 to top3"):
        check_sources(config, [arm])
    arm.config = of_folder(checkpoint)
    check_sources(config, [arm])
    build(config, to_build(config, [arm.config]), None)
    assert len(made) == 1, "before any trial starts"


def test_replicates_that_took_other_numbers_are_an_error(tmp_path: Path) -> None:
    config = study(tmp_path, replicates=2)
    arm = make_arm(config, "a", "noise.layers=srdd:top1")
    write_arm(config, 0, arm)
    for replicate, layer in enumerate((0, 1)):
        ended = outcome(arm, replicate, 300)
        ran = read_config(as_tree(ended.config), [f"noise.layers=[{layer}]"])
        write_trial(config, arm, replicate, replace(ended, config=ran))
    with pytest.raises(ConfigError, match=r"noise\.layers: arm a follows .* took \[0\] and \[1\]; remove trials/a-1"):
        read_arms(config)


@pytest.mark.parametrize("system", EXPORTS)
def test_exports_and_what_follows_a_sweep_have_numbers_and_not_rules(system: str, tiny: Tiny, tmp_path: Path) -> None:
    config = study(tmp_path)
    control, arm = make_arm(config, "control", ALL[2]), make_arm(config, "a", *LINEAR, *ALL)
    candidate = Candidate(study=config, arm=arm, control=control, difference=0.1)
    with pytest.raises(ConfigError, match=r"no trial of this arm has ended.*rin resume"):
        EXPORTS[system](candidate)
    for one in (control, arm):
        plain, origins = follow(one.config, build_task(one.config.task))
        ended = outcome(one, 0, 300)
        one.results[0] = replace(ended, config=plain, receipt=replace(ended.receipt, followed=origins))
    text = EXPORTS[system](candidate)
    taken = arm.results[0].config
    if system == "yaml":
        (tmp_path / "best.yaml").write_text(text)
        assert read_config(load_yaml(tmp_path / "best.yaml")) == taken
        assert (
            f"# noise.layer_multipliers = {list(taken.noise.layer_multipliers)} from srdd:deadzone@down, scan " in text
        )
    else:
        assert "srdd:" not in text
    assert as_ran(control, arm) == [control.ran, arm.ran]
    assert arm.ran.noise == taken.noise
    assert control.ran.quant.skip_layers == taken.quant.skip_layers
    assert not arm.ran.rules
    assert not control.ran.rules
