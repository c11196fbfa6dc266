"""Whether a trial fits, and the settings that are said to make it fit: each is counted as the trial was."""

import re
from dataclasses import replace

import pytest
import torch

from dashboards.estimate_text import _memory, estimate_lines
from search import fit as fitting
from search.fit import CONTEXT_GIB, GAPS, WITH_ENGINE, Fit, device_here, does_not_fit, fit, remedy
from search.roofline import BANDWIDTH_SHARE, LAUNCH_SECONDS, PEAK_SHARE, Time, Times, seconds_of, summed, times
from spaces.config import TrialConfig
from spaces.devices import DEVICES, Memory
from spaces.reading import read_config
from tests.conftest import ModelFolder, Rin
from trainable.counting import Work
from trainable.footprint import GIB, Phase


@pytest.fixture
def config(model_folder: ModelFolder) -> TrialConfig:
    """Of a small model with a long micro-batch."""
    return sized(model_folder())


def sized(folder: str, *changes: str) -> TrialConfig:
    tree = {
        "model": {"name": folder, "dtype": "bfloat16"},
        "task": {"name": "gsm8k"},
        "grpo": {"prompts": 8, "group_size": 4, "updates_per_step": 1, "micro_batch_size": 16},
        "rollout": {"max_new_tokens": 480, "max_prompt_tokens": 64, "batch_size": 16},
        "eval": {"questions": 64, "batch_size": 64},
    }
    return read_config(tree, changes)


def with_room(gib: float) -> Memory:
    return Memory(name="a small device", memory_gib=CONTEXT_GIB + gib)


def test_what_is_needed_is_what_is_alive_with_gaps_and_a_context(config: TrialConfig) -> None:
    found = fit(config, DEVICES["h200"])
    alive = sum(found.phases["update"].values())
    assert found.needed_gib("update") == pytest.approx(alive / GIB * (1 + GAPS) + CONTEXT_GIB)
    assert found.largest == "update"
    assert found.too_large == ()
    assert does_not_fit(config, DEVICES["h200"]) is None


def test_the_settings_that_are_named_make_it_fit_and_those_before_them_do_not(config: TrialConfig) -> None:
    whole = fit(config, DEVICES["h200"])
    device = with_room(0.4 * (whole.needed_gib("update") - CONTEXT_GIB))
    found = remedy(config, device)
    assert found is not None
    assert set(found.settings) <= {"grpo.micro_batch_size", "eval.batch_size", "rollout.batch_size"}
    again = fit(read_config(config.model_dump(mode="json"), str(found).replace("--set ", "").split()), device)
    assert again.too_large == ()
    assert again.phases == found.fit.phases
    twice = {key: 2 * value for key, value in found.settings.items()}
    before = fit(read_config(config.model_dump(mode="json"), [f"{k}={v}" for k, v in twice.items()]), device)
    assert before.too_large
    told = does_not_fit(config, device)
    assert told is not None
    assert str(found) in told


@pytest.mark.slow
def test_where_no_setting_helps_that_is_said(config: TrialConfig) -> None:
    told = does_not_fit(config, with_room(0.0001))
    assert told is not None
    assert told.endswith("no setting that it could do with makes it fit")


def test_an_engine_holds_its_own_weights_and_cache_and_gives_them_back_where_it_sleeps(
    model_folder: ModelFolder,
) -> None:
    inside = fit(sized(model_folder(), "rollout.backend=vllm", "rollout.kv_cache_gib=3"), DEVICES["a100"])
    for phase in (WITH_ENGINE, "update"):  # there is room for both
        parts = inside.phases[phase]
        assert parts["the engine's weights and working space"] == inside.shapes.weight_bytes + 2 * GIB
        assert parts["the engine's KV cache"] == 3 * GIB
    assert not any(name.endswith(("prompts", "a token")) for name in inside.phases)
    asleep = fit(sized(model_folder(), "rollout.backend=vllm", "rollout.sleep=true"), DEVICES["a100"])
    assert "the engine's KV cache" not in asleep.phases["update"]
    found = remedy(sized(model_folder(), "rollout.backend=vllm", "rollout.kv_cache_gib=8"), with_room(5.0))
    assert found is not None
    assert found.settings == {"rollout.kv_cache_gib": 2.4}  # of 2.7 a trial would say that there is no room
    assert 4.5 < CONTEXT_GIB + (2 + 2.4) * (1 + GAPS) <= found.fit.needed_gib(WITH_ENGINE) <= 6.0


@pytest.mark.parametrize(("sleep", "asleep"), [("null", True), ("false", False)])
def test_where_an_engine_has_no_room_at_all_the_search_for_settings_ends(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, sleep: str, asleep: bool
) -> None:
    """Its working space alone is larger than the device. It proposed rollout.sleep=true again and again."""
    small = ("grpo.micro_batch_size=1", "eval.batch_size=1", "model.adapter=lora")
    config, device = sized(model_folder(), "rollout.backend=vllm", f"rollout.sleep={sleep}", *small), with_room(1.0)
    asked = []

    def counted(config: TrialConfig, device: Memory) -> Fit:
        asked.append(config)
        assert len(asked) == len({one.model_dump_json() for one in asked}), "the same settings were tried before"
        return fit(config, device)

    monkeypatch.setattr(fitting, "fit", counted)
    assert remedy(config, device) is None
    assert config.rollout.sleep == asked[-1].rollout.sleep
    found = fit(config, device)
    assert found.engine is not None
    assert bool(found.engine.sleep_level) == asleep
    assert found.refused.startswith("rollout.backend=vllm: keys and values of one sequence need")


def test_what_is_said_to_fit_is_not_refused_by_the_trial(model_folder: ModelFolder) -> None:
    """A trial leaves 5 % of the device, a count 5 % of what is alive: an engine's cache may fall between the two."""
    config = sized(model_folder(), "rollout.backend=vllm", "rollout.kv_cache_gib=2.7")
    between = with_room(2 + 2.7 * (1 + GAPS) + 0.16)
    found = fit(config, between)
    assert found.needed_gib(found.largest) < between.memory_gib
    assert found.too_large == (WITH_ENGINE,)
    told = does_not_fit(config, between)
    assert told is not None
    assert "a trial would be refused (rollout.kv_cache_gib=2.7: there is room for 2.6" in told
    assert told.endswith("it fits with --set rollout.kv_cache_gib=2.4")
    assert any("vLLM      REFUSED: rollout.kv_cache_gib=2.7" in line for line in _memory(found, None))


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work(flops=10**15, bytes=1, wide=False, count=3), 3 * 1000 / (312 * PEAK_SHARE)),
        (Work(flops=10**15, bytes=1, wide=True, count=1), 1000 / (19.5 * PEAK_SHARE)),
        (Work(flops=1, bytes=2039 * 10**9, wide=False, count=2), 2 / BANDWIDTH_SHARE),
        (Work(flops=1, bytes=1, wide=False, count=1000), 1000 * LAUNCH_SECONDS),
    ],
)
def test_an_operation_takes_its_arithmetic_its_bytes_or_its_launch(work: Work, seconds: float) -> None:
    phase = Phase(peak={}, work=(work,), rows=1)
    assert seconds_of(phase, DEVICES["a100"]) == pytest.approx(seconds)


def test_a_trial_takes_its_parts_as_often_as_it_has_them(config: TrialConfig) -> None:
    shapes, device = fit(config, DEVICES["a100"]).shapes, DEVICES["a100"]
    found = times(config, shapes, device)
    parts = seconds_by_part(found.step)
    once = {name: seconds_of(phase, device) for name, phase in shapes.phases.items()}
    assert parts["update"] == pytest.approx(once["update"] * 32 / shapes.phases["update"].rows)
    assert parts["rollout: a token"] == pytest.approx(once["rollout: a token"] * 480 * 2)  # 32 completions, 16 at once
    assert summed(found.evaluation) == pytest.approx(once["evaluation: prompts"] + 480 * once["evaluation: a token"])
    assert summed(found.ends) == pytest.approx(2 * summed(found.evaluation)), "deployed, and unquantised"
    assert found.between == 1  # after 15 of 29
    learning = {"update", "optimizer"}
    assert seconds_by_part(found.baseline) == {name: took for name, took in parts.items() if name not in learning}
    assert found.seconds == pytest.approx(
        29 * summed(found.step) + summed(found.baseline) + (1 + 2 * 2) * summed(found.evaluation)
    )
    assert times(config, shapes, replace(device, gb_per_second=0.01)).seconds > 10 * found.seconds


def seconds_by_part(parts: tuple[Time, ...]) -> dict[str, float]:
    return {part.what: part.seconds for part in parts}


def test_each_setting_changes_the_estimate_by_its_share_of_the_work(model_folder: ModelFolder) -> None:
    device, folder, more = DEVICES["a100"], model_folder(), "eval.samples=16"
    shapes = fit(sized(folder, more), device).shapes

    def of(*changes: str) -> Times:
        return times(sized(folder, *changes), shapes, device)

    plain, step = of(), seconds_by_part(of().step)
    assert shapes.phases["pass@k: a token"].rows == shapes.phases["pass@k: prompts"].rows == 4 * 16
    parts = seconds_by_part(of(more).ends)
    once = {name: seconds_of(phase, device) for name, phase in shapes.phases.items()}
    drawn = {"pass@k: prompts": 16 * once["pass@k: prompts"], "pass@k: a token": 16 * 480 * once["pass@k: a token"]}
    assert parts == pytest.approx(seconds_by_part(plain.ends) | drawn)  # 64 x 16 answers, 64 at once
    assert of(more).seconds - plain.seconds == pytest.approx(2 * sum(drawn.values()))

    reference, passes = of("grpo.kl_beta=0.1"), 29 + 1  # of each step, and of the baseline
    deploy = once["deploy"] * passes  # a reference of all weights is quantised as well
    assert reference.seconds - plain.seconds == pytest.approx(passes * step["log-probs"] + deploy)
    adapted = [of("model.adapter=lora", f"grpo.kl_beta={beta}").seconds for beta in (0.1, 0)]
    assert adapted[0] - adapted[1] == pytest.approx(passes * step["log-probs"])

    assert plain.seconds - of("eval.every=0").seconds == pytest.approx(summed(plain.evaluation))
    assert of("quant.weights=none", "quant.activations=none").ends == plain.evaluation, (
        "nothing else than the one in the model's dtype"
    )

    quiet = of("noise.sigma_start=0").seconds
    assert plain.seconds == quiet, "of norms it takes no time"
    noisy = of("noise.modules=[linear]", "grpo.steps=30", "noise.num_stages=3").seconds
    assert noisy - of("grpo.steps=30").seconds == pytest.approx(20 * once["deploy"])


def test_by_an_engine_samples_of_questions_take_their_tokens(model_folder: ModelFolder) -> None:
    device, config = DEVICES["a100"], sized(model_folder(), "rollout.backend=vllm", "eval.samples=16")
    found = times(config, fit(config, device).shapes, device, 8 * GIB)
    parts = {part.what: part for part in found.ends}
    assert parts["pass@k: tokens"].seconds == pytest.approx(16 * parts["evaluation: tokens"].seconds)
    assert parts["pass@k: prompts"].seconds == parts["evaluation: prompts"].seconds  # each is read once


def test_every_number_of_an_estimate_is_called_one_and_has_its_assumptions(config: TrialConfig) -> None:
    said = "\n".join(estimate_lines(config, DEVICES["h100"]))
    assert "an estimate of which nothing was measured" in said
    assert said.count("assumed: ") == 6
    assert DEVICES["h100"].source in said
    for phase in fit(config, DEVICES["h100"]).phases:
        assert re.search(rf"GiB  {phase}: weights|GiB  {phase}: ", said)


def test_of_weights_in_shards_it_says_that_it_does_not_count_them(config: TrialConfig) -> None:
    parallel = config.parallel.model_copy(update={"ranks": 2, "weights": "sharded"})
    (said,) = estimate_lines(config.model_copy(update={"parallel": parallel}), DEVICES["h100"])
    assert said.endswith("(parallel.weights=sharded: what one process of several holds is not counted)")


def test_a_device_nobody_knows_is_one_line(rin: Rin) -> None:
    code, out, err = rin("plan", "--device", "b200")
    assert (code, out) == (2, "")
    assert err.strip() == "rin: --device b200: is not known; choose one of h200, h100, a100, 4090"
    assert rin("doctor", "--device", "h100")[0] == 2


def test_a_plan_says_what_a_trial_holds_on_a_device(rin: Rin) -> None:
    code, out, _ = rin("plan", "--workload", "tiny", "--device", "4090")
    assert code == 0
    assert "fits: at most 1.0 GiB" in out
    assert "model.recipe" in out
    told = out.splitlines()[-1]
    assert told.startswith("time and cost of the sweep above are made of 2 s per trial (the workload's figure")
    assert told.endswith("and not of this estimate")


@pytest.mark.slow
def test_a_sweep_on_a_gpu_that_is_too_small_is_warned_of_it(rin: Rin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "device_here", lambda: Memory(name="a toy", memory_gib=1.001))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    _, out, _ = rin("plan", "--workload", "tiny", "--gpus", "1")
    assert "warning: a trial needs about 1.0 GiB (" in out
    assert "and a toy has 1.0; " in out
    _, out, _ = rin("plan", "--workload", "tiny")
    assert "a toy" not in out  # a trial that computes on no GPU


def test_this_machines_device_is_asked_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert device_here() is None

    class Properties:
        name, total_memory = "NVIDIA L40S", 44 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert device_here() == Memory(name="NVIDIA L40S", memory_gib=44)


@pytest.mark.slow
def test_a_4090_is_told_the_settings_with_which_the_plans_model_fits_it() -> None:
    from spaces.workloads import WORKLOADS

    plan, device = read_config(WORKLOADS["qwen2.5-1.5b-gsm8k"].settings), DEVICES["4090"]
    told = does_not_fit(plan, device)
    assert told is not None
    settings = re.findall(r"--set (\S+)", told)
    assert settings
    assert fit(read_config(WORKLOADS["qwen2.5-1.5b-gsm8k"].settings, settings), device).too_large == ()
