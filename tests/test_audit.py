"""Every rule of `rin audit` sees its fault and not its neighbour; on the written examples it finds what is planted, and
nothing else."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from search.audit.audit import audit
from search.audit.reading import read_runs
from search.audit.rules import RULES
from search.audit.run import UNKNOWN
from search.export import EXPORTS
from spaces.config import TrialConfig
from spaces.errors import ConfigError
from spaces.points import POINTS
from spaces.reading import merge, read_config
from spaces.workloads import WORKLOADS
from tests import processes

EXAMPLES = Path(__file__).parent / "audit_examples"
ALONE = {"no-control", "one-seed"}
"""What is said of files that stand alone."""

PLANTED: dict[str, set[tuple[int, str]]] = {
    "variable_sigma.sh": {
        (8, "noise-in-evaluation"),
        (10, "hooks-in-graphs"),
        (13, "never-arrives"),
        (18, "never-arrives"),
        (19, "never-arrives"),
    },
    "one_stage.sh": {(10, "one-stage"), (11, "targets-nothing"), (12, "unknown-key")},
    "switch_off.sh": {(5, "filter-without-metric"), (6, "endless-filter"), (7, "switched-off")},
    "linear_lora.sh": {
        (12, "filter-limit-small"),
        (15, "quantised-on-one-side"),
        (17, "layer-by-substring"),
        (17, "adapters-quantised"),
        (19, "two-stages"),
        (21, "sigma-rises"),
        (22, "adapters-noised"),
        (22, "noised-twice"),
        (23, "share-of-kept-groups"),
    },
    "resampled.sh": {(7, "filter-eats-schedule")},
    "filter_off.sh": {(5, "filter-off-other-batch"), (11, "never-judged"), (12, "evaluation-in-other-precision")},
    "epochs.yaml": {(13, "stages-unreached"), (18, "sigma-zero"), (20, "epoch-aware")},
    "upstream.sh": {(7, "limit-ignored"), (9, "set-twice"), (10, "unknown-key")},
    "qerl.sh": {
        (6, "noise-of-other-classes"),
        (6, "noise-stays"),
        (9, "noise-in-evaluation-qerl"),
        (11, "evaluation-without-adapter"),
    },
    "qerl_bf16.sh": {(3, "model-without-nvfp4")},
    "trl_noise.py": {(11, "stages-unreached"), (13, "unknown-key"), (14, "corrected-by-default")},
    "nemo.yaml": {(6, "unknown-key"), (10, "unknown-key"), (11, "unknown-key")},
    "collapsed.log": {
        (3, "log-stages-unreached"),
        (4, "log-no-layers"),
        (5, "log-noise-in-evaluation"),
        (6, "log-filter-limit"),
        (7, "wrong-share"),
    },
}


@pytest.mark.parametrize("name", PLANTED)
def test_every_planted_fault_is_found_at_its_line_and_none_is_invented(name: str) -> None:
    found = {(one.line, one.rule) for one in audit([str(EXAMPLES / name)]) if one.rule not in ALONE}
    assert found == PLANTED[name]


def test_the_clean_examples_have_no_finding() -> None:
    clean = sorted(str(path) for path in EXAMPLES.glob("clean*"))
    assert len(clean) == 3
    assert audit(clean) == []
    assert {path.name for path in EXAMPLES.iterdir()} == {*PLANTED, *(Path(path).name for path in clean)}


def fork(*overrides: str) -> str:
    return "python3 -m recipe.dapo.main_dapo trainer.save_freq=1 " + " ".join(f"'{line}'" for line in overrides)


N, H, F = "trainer.noise_injection", "trainer.hw_error_injection", "algorithm.filter_groups"
ON = (f"{N}.enabled=True", f"{N}.sigma_start=0.01", f"{N}.sigma_end=0.001", f"{N}.num_stages=10")
BITS = (f"{H}.enabled=True", f"{H}.error_type=mxfp4", f"{H}.apply_during=both")
LORA, LINEAR = "actor_rollout_ref.model.lora_rank=8", f"++{N}.layer_types=[linear]"
FILTER = (f"{F}.enable=True", f"{F}.metric=acc", "data.train_batch_size=128", "data.gen_batch_size=128")
QERL = "python qerl.py --model_name /m-nvfp4 --sigma_start 0.01 --num_stages 10 "
AQN = "[AQN] Applying noise injection: step="

ROWS: list[tuple[str, str, str]] = [
    ("never-arrives", fork(f"++{N}.layer_multipliers=[1,2]"), fork(f"++{N}.layer_types=[linear]")),
    ("unknown-key", fork(f"++{N}.sigma=1"), fork("critic.anything=1", f"{N}.sigma_start=1")),
    ("unknown-key", "accelerate launch grpo.py --epsilon_hi 0.3", "accelerate launch grpo.py --my_reward_scale 0.3"),
    ("unknown-key", "uv run examples/run_grpo.py grpo.max_steps=9", "uv run examples/run_grpo.py grpo.max_num_steps=9"),
    ("set-twice", fork("data.seed=1", "data.seed=2"), fork("data.seed=1", "data.seed=1")),
    ("switched-off", fork(f"{N}.sigma_start=1", f"{N}.enabled=False"), fork(f"{N}.sigma_start=1", f"{N}.enabled=True")),
    ("model-without-nvfp4", QERL.replace("nvfp4", "bf16"), QERL),
    ("targets-nothing", fork(*ON, f"{N}.target_modules=[rmsnorm]"), fork(*ON, f"{N}.target_modules=[layernorm]")),
    (
        "targets-nothing",
        fork(*ON, LINEAR, f"{N}.target_modules=[input_layernorm]"),
        fork(*ON, LINEAR, f"{N}.target_modules=[layers.10.]"),
    ),
    (
        "targets-nothing",
        fork(*ON, f"{N}.exclude_patterns=[norm]"),
        fork(*ON, f"{N}.exclude_patterns=[input_layernorm]"),
    ),
    (
        "layer-by-substring",
        fork(*ON, f"{N}.exclude_patterns=[layers.1]"),
        fork(*ON, f"{N}.exclude_patterns=[layers.1.,layers.27,layers.0]"),
    ),
    ("adapters-noised", fork(*ON, LORA, LINEAR), fork(*ON, LORA, LINEAR, f"{N}.exclude_patterns=[lora_]")),
    ("noised-twice", fork(*ON, LORA, LINEAR), fork(*ON, LORA, LINEAR, f"{N}.exclude_patterns=[base_layer]")),
    ("noised-twice", fork(*ON, LORA, LINEAR), fork(*ON, LORA)),
    ("adapters-quantised", fork(*BITS, LORA), fork(*BITS, LORA, f"{H}.exclude_modules=[lora_A,lora_B]")),
    ("adapters-quantised", fork(*BITS, LORA), fork(*BITS)),
    ("one-stage", fork(*ON[:3], f"{N}.num_stages=1"), fork(*ON)),
    ("one-stage", QERL.replace("10", "1"), QERL),
    ("two-stages", fork(*ON[:3], f"{N}.num_stages=2"), fork(*ON[:3], f"{N}.num_stages=3")),
    ("sigma-rises", fork(*ON, f"{N}.sigma_end=0.1"), fork(*ON, f"{N}.sigma_end=0.01")),
    ("sigma-zero", fork(*ON, f"{N}.sigma_start=0"), fork(f"{N}.enabled=False", f"{N}.sigma_start=0")),
    ("epoch-aware", fork(*ON, f"++{N}.epoch_aware=True"), fork(*ON, f"++{N}.epoch_aware=False")),
    (
        "stages-unreached",
        fork(*ON, "trainer.total_training_steps=29"),
        fork(*ON, "trainer.total_training_steps=29", "trainer.total_epochs=1"),
    ),
    (
        "stages-unreached",
        fork(
            *ON,
            "trainer.total_training_steps=5",
            "trainer.total_epochs=1",
            "data.train_max_samples=40",
            "data.train_batch_size=8",
        ),
        fork(
            *ON,
            "trainer.total_training_steps=10",
            "trainer.total_epochs=1",
            "data.train_max_samples=80",
            "data.train_batch_size=8",
        ),
    ),
    ("stages-unreached", QERL + "--max_steps 5", QERL + "--max_steps 50"),
    (
        "filter-eats-schedule",
        fork(*ON, *FILTER, f"{F}.max_num_gen_batches=5"),
        fork(*FILTER, f"{F}.max_num_gen_batches=5"),
    ),
    ("schedule-restarts", QERL + "--num_train_epochs 2", QERL + "--num_train_epochs 1"),
    ("endless-filter", fork(*FILTER), fork(*FILTER, f"{F}.max_num_gen_batches=5")),
    (
        "filter-without-recipe",
        fork(*ON, *FILTER).replace("recipe.dapo.main_dapo", "verl.trainer.main_ppo"),
        fork(*ON, *FILTER),
    ),
    ("filter-limit-small", fork(*FILTER, f"{F}.max_num_gen_batches=1"), fork(*FILTER, f"{F}.max_num_gen_batches=2")),
    (
        "limit-ignored",
        fork(*FILTER, f"{F}.max_num_gen_batches=5").replace("recipe.dapo.main_dapo", "verl.trainer.main_ppo"),
        fork(*FILTER, f"{F}.max_num_gen_batches=5"),
    ),
    ("filter-without-metric", fork(f"{F}.enable=True"), fork(*FILTER)),
    (
        "filter-off-other-batch",
        fork(f"{F}.enable=False", "data.train_batch_size=8", "data.gen_batch_size=16"),
        fork(f"{F}.enable=True", "data.train_batch_size=8", "data.gen_batch_size=16"),
    ),
    ("noise-in-evaluation", fork(*ON, "trainer.test_freq=5"), fork(*ON, "trainer.test_freq=-1")),
    ("noise-in-evaluation", fork(*ON, "trainer.test_freq=5"), fork(f"{N}.enabled=False", "trainer.test_freq=5")),
    ("noise-in-evaluation-qerl", QERL + "--eval_strategy steps", QERL + "--eval_strategy no"),
    ("quantised-on-one-side", fork(*BITS[:2]), fork(*BITS)),
    (
        "evaluation-in-other-precision",
        fork(*BITS) + "\npython eval_it.py --dtype bf16",
        fork() + "\npython eval_it.py --dtype bf16",
    ),
    ("evaluation-without-adapter", QERL + "\npython eval/gsm8k.py", QERL + "\npython eval/merged.py"),
    ("hooks-in-graphs", fork(*BITS), fork(*BITS, "actor_rollout_ref.rollout.enforce_eager=True")),
    ("never-judged", fork(*ON, "trainer.save_freq=-1"), fork(*ON)),
    ("noise-of-other-classes", QERL, QERL + "--vllm_model_impl transformers"),
    ("noise-stays", QERL, QERL + "--ln True"),
    (
        "corrected-by-default",
        "GRPOConfig(use_vllm=True)\nNoiseConfig(sigma_start=0.1)",
        "GRPOConfig(use_vllm=True)\nNoiseConfig(sigma_start=0.0)",
    ),
    ("no-control", fork(*ON), fork(*ON) + "\n" + fork(f"{N}.enabled=False")),
    ("one-seed", fork(*ON, "data.seed=1"), fork(*ON, "data.seed=1") + "\n" + fork(*ON, "data.seed=2")),
    ("one-seed", fork(*ON, "data.seed=1"), fork(*ON, "data.seed=$1")),
    ("log-no-layers", "[AQN] Applied noise to 0 linear layers", "[AQN] Applied noise to 57 rmsnorm layers"),
    (
        "log-filter-limit",
        "ValueError: num_gen_batches=5 >= max_num_gen_batches=5.",
        "num_gen_batches=2. Keep generating... critic/",
    ),
    (
        "log-noise-in-evaluation",
        f"{AQN}5/29, sigma_id=1, sigma=0.05\nval-core/x/acc/mean@1:0.5",
        f"{AQN}0/29, sigma_id=0, sigma=0.00\nval-core/x/acc/mean@1:0.5",
    ),
    ("log-stages-unreached", f"{AQN}5/29, sigma_id=1, sigma=0.05", f"{AQN}28/29, sigma_id=8, sigma=0.05"),
    ("wrong-share", "val-core/ acc 50% (500/1319)", "val-core/ acc 37.9% (500/1319)"),
    ("other-total", "val-core/openai/gsm8k accuracy 30/64", "val-core/openai/gsm8k accuracy 942/1319"),
    (
        "share-of-kept-groups",
        fork(*FILTER) + "\ngrep critic/score/mean log",
        fork(f"{F}.enable=False") + "\ngrep critic/score/mean log",
    ),
]


@pytest.mark.parametrize(("rule", "true", "false"), ROWS)
def test_a_rule_sees_its_fault_and_not_its_neighbour(rule: str, true: str, false: str, tmp_path: Path) -> None:
    suffix = "py" if "GRPOConfig" in true else "sh"
    for name, text in (("true", true), ("false", false)):
        (tmp_path / f"{name}.{suffix}").write_text(text)
    assert rule in {one.rule for one in audit([str(tmp_path / f"true.{suffix}")])}
    assert rule not in {one.rule for one in audit([str(tmp_path / f"false.{suffix}")])}


def test_every_rule_has_a_row_and_an_id_of_its_own() -> None:
    assert {rule.id for rule in RULES} == {row[0] for row in ROWS}
    assert len({rule.id for rule in RULES}) == len(RULES)
    assert all(rule.looks_at and rule.remedy and rule.severity in ("wrong", "doubt") for rule in RULES)


def points(workload: str) -> list[tuple[str, TrialConfig]]:
    """Every experiment of the plan with two seeds."""
    return [
        (f"{name}-{seed}", read_config(merge(merge(WORKLOADS[workload].settings, point.settings), {"seed": seed})))
        for name, point in POINTS.items()
        for seed in (0, 1)
    ]


@pytest.mark.parametrize("workload", ["embedded", "qwen2.5-1.5b-gsm8k"])
@pytest.mark.parametrize(("to", "suffix"), [("verl", "sh"), ("verl-upstream", "sh"), ("trl", "py")])
def test_our_own_exports_have_no_finding(to: str, suffix: str, workload: str, tmp_path: Path) -> None:
    """Of every point, the control among them, where there is a step for each stage."""
    paths = []
    for name, config in points(workload):
        path, candidate = tmp_path / f"{name}.{suffix}", SimpleNamespace(config=config)
        path.write_text(EXPORTS[to](cast(Any, candidate)))
        paths.append(str(path))
    assert [(Path(one.file).stem, one.rule, one.message) for one in audit(paths)] == []


def test_what_the_shell_alone_knows_is_unknown_and_no_rule_looks_at_it(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(
        "N=$1\nGROUP=${2:-8}\nSTAGES=1\nRANK=$((4*4))\nif [ $N = 8 ]; then STAGES=10; fi\n"
        'ARGS=(\n  "data.seed=$N"\n)\n'
        "python3 -m recipe.dapo.main_dapo \\\n  # a comment\n"
        f"  {N}.enabled=True {N}.num_stages=$STAGES actor_rollout_ref.model.lora_rank=$RANK {N}.sigma_start=1e-2 \\\n"
        "  actor_rollout_ref.rollout.n=$GROUP\n"
    )
    (run,) = read_runs(str(script))
    assert run.value(f"{N}.num_stages") is UNKNOWN
    assert run.value("actor_rollout_ref.model.lora_rank") is UNKNOWN
    assert (run.value("data.seed"), run.value(f"{N}.sigma_start")) == (UNKNOWN, 0.01)
    assert run.value("actor_rollout_ref.rollout.n") == 8  # as it starts when nothing is said
    assert "one-stage" not in {one.rule for one in audit([str(script)])}


def test_what_is_merged_into_a_mapping_is_given_there(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "base: &b\n  sigma_start: 0.1\ntrainer:\n  noise_injection:\n    <<: *b\n    enabled: true\n    num_stages: 1\n"
    )
    (run,) = read_runs(str(config))
    assert run.settings[f"{N}.sigma_start"].value == 0.1
    assert run.settings[f"{N}.num_stages"].line == 7


def test_each_launch_of_a_script_is_a_run_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "two.sh"
    script.write_text(f"{fork('data.seed=1')}\n{fork('data.seed=2', *ON)}\n")
    assert [(run.launch, run.value("data.seed"), run.noisy) for run in read_runs(str(script))] == [
        (1, 1, False),
        (2, 2, True),
    ]


def test_what_a_file_says_is_meant_is_no_finding(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f"# rin audit: sigma-rises is meant: an anneal\n{fork(*ON, f'{N}.sigma_end=0.1')}\n")
    assert "sigma-rises" not in {one.rule for one in audit([str(script)])}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.sh", None, "cannot be read"),
        ("latin.sh", b"caf\xe9", "no text in UTF-8"),
        ("other.sh", b"echo hello\n", "nothing of verl, TRL, QeRL or NeMo RL stands in it"),
        ("parser.py", b"TrlParser((GRPOConfig,))", "no setting stands in it"),
        ("best.yaml", b"noise: {sigma_start: 0.1}\ngrpo: {steps: 3}\nquant: {}", "a trial of this program"),
        ("broken.py", b"GRPOConfig(", "no Python of this version"),
        ("broken.yaml", b"a: [1", "no YAML or JSON"),
        ("deep.yaml", b"trainer:\n" + b"".join(b" " * n + b"a:\n" for n in range(1, 900)), "nested too deeply"),
        ("list.json", b"[1, 2]", "nothing of verl"),
    ],
)
def test_a_file_that_tells_nothing_is_refused_in_one_line(
    name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as refused:
        audit([str(tmp_path / name)])
    assert str(refused.value).startswith(str(tmp_path / name))
    assert "\n" not in str(refused.value)


def test_the_command_prints_findings_with_remedies_or_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Findings are a result: exit code 0; a file that cannot be read is the user's mistake: 2."""
    name = str(EXAMPLES / "one_stage.sh")
    said = processes.rin("audit", name)
    assert said.code == 0, said.err
    assert f"{name}:10: wrong (one-stage)" in said.out
    assert "did you mean trainer.noise_injection.sigma_start?" in " ".join(said.out.split())
    assert said.out.splitlines()[-1] == "5 findings in 1 file: 3 wrong, 2 in doubt"
    rows = json.loads(processes.rin("audit", name, "--json").out)
    assert {row["rule"] for row in rows} >= {"one-stage", "targets-nothing"}
    assert set(rows[0]) == {"rule", "severity", "file", "line", "message", "remedy"}
    clean = processes.rin("audit", str(EXAMPLES / "clean.log"))
    assert (clean.code, clean.out) == (0, f"nothing found in 1 file by {len(RULES)} rules\n")
    assert processes.rin("audit", "nowhere.sh").code == 2


def test_exports_and_audit_speak_of_the_same_systems() -> None:
    assert {"verl", "verl-upstream", "trl", "qerl", "nemo-rl"} <= EXPORTS.keys()


def test_the_page_names_every_rule() -> None:
    page = (Path(__file__).parents[1] / "docs/audit.md").read_text(encoding="utf-8")
    table = page[page.index("| what | rules |") :]
    assert set(re.findall(r"`([\w-]+)`", table[: table.index("Examples")])) == {rule.id for rule in RULES}


def test_a_log_that_echoes_its_command_has_no_findings_of_its_metrics(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(
        "+ " + fork(*FILTER, f"{F}.max_num_gen_batches=5", "trainer.test_freq=5") + "\n"
        "step:5 - critic/score/mean:0.42 - val-core/openai/gsm8k/acc/mean@1:0.71 - timing_s/step:31.2\n" * 3
    )
    assert audit([str(log)]) == []
