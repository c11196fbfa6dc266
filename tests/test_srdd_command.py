"""`rin srdd` as its users meet it: what it is asked for, its table, its JSON."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dashboards.srdd import purchases
from dashboards.srdd_against import changes
from dashboards.srdd_plan import EMBEDDED_PROMPTS, PROMPTS, plan_srdd
from spaces.config import ConfigError
from tests.conftest import ModelFolder, Rin
from trainable.scan import (
    SCORES,
    Estimate,
    LayerScan,
    Purchase,
    Scan,
    SiteErrors,
    kl_per_bit,
    load_scan,
    score,
)

SMALL = ("--prompts", "2", "--set", "grpo.prompts=2", "--set", "grpo.updates_per_step=1")
SMALL += ("--set", "rollout.max_new_tokens=4", "--set", "model.dtype=float32")


@pytest.fixture(scope="module")
def folder(model_folder: ModelFolder) -> str:
    return model_folder("llama", layers=2, text=True)


def test_its_json_is_a_scan_that_trials_can_read_with_every_part(rin: Rin, folder: str, tmp_path: Path) -> None:
    code, out, err = rin("srdd", folder, *SMALL, "--json")
    assert (code, err) == (0, "")
    (tmp_path / "scan.json").write_text(out)
    scan = load_scan(tmp_path / "scan.json")
    assert (scan.depth, scan.prompts, scan.source, scan.quant["weights"]) == (2, 2, "prompts", "mxfp4")
    for kind in SCORES:
        if kind not in ("cosine", "norm_ratio"):  # of random answers none may be right: nothing is learned
            assert len(score(scan, kind)) == 2
    assert [kl_per_bit(one) for one in scan.bought] == sorted((kl_per_bit(one) for one in scan.bought), reverse=True)
    assert {one.layers for one in scan.bought} == {(0,), (1,), (0, 1), ()}
    assert {key for one in json.loads(out)["bought"] for key in one} == {
        "what",
        "layers",
        "weight_bits",
        "activation_bits",
        "kl_saved",
    }


def test_the_table_has_a_line_for_each_layer_and_fits_a_screen(rin: Rin, folder: str, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    code, out, err = rin("srdd", folder, "--static", "--text", str(text), "--prompts", "3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "3 rows, 192 tokens" in lines[0]
    assert [line.split()[0] for line in lines[3:5]] == ["0", "1"]
    assert all(len(line.split()) == 11 for line in lines[3:5])
    assert all(len(line) <= 160 for line in lines[1:])
    assert "worst by deadzone@down" in out
    assert "KL" not in out


def test_completions_are_scanned_behind_their_prompts(rin: Rin, folder: str) -> None:
    trees = [
        json.loads(rin("srdd", folder, *SMALL, "--static", "--json", *more)[1]) for more in ((), ("--completions",))
    ]
    plain, sampled = trees
    assert sampled["source"] == "completions"
    assert plain["tokens"] < sampled["tokens"] <= plain["tokens"] + 2 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "smol"}, "MODEL=smol: unknown; choose one of embedded"),
        ({"prompts": 0}, "--prompts 0: out of range; give 1 to 256"),
        ({"seed": -1}, "--seed -1: out of range"),
        ({"text": Path("nowhere.txt")}, "--text nowhere.txt: no such file"),
        ({"text": Path(__file__), "completions": True}, "leave out --completions"),
        ({"overrides": ["quant.weights=none", "quant.activations=none"]}, "nothing to scan; choose a format"),
        ({"overrides": ["quant.weight=none"]}, "quant.weight"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan_srdd(**{"model": "embedded", **options})
    assert "\n" not in str(caught.value)


def test_a_text_without_text_is_a_mistake(rin: Rin, folder: str, tmp_path: Path) -> None:
    for name, content in (("empty.txt", b""), ("picture.png", b"\x89PNG\xff\xfe")):
        (tmp_path / name).write_bytes(content)
        code, _, err = rin("srdd", folder, "--static", "--text", name)
        assert code == 2
        assert err.startswith(f"rin: --text {name}: ")
        assert len(err.splitlines()) == 1


def test_defaults_are_those_of_the_model() -> None:
    assert plan_srdd("embedded").prompts == EMBEDDED_PROMPTS
    assert plan_srdd("smollm2-135m").prompts == PROMPTS
    assert plan_srdd("qwen2.5-1.5b-gsm8k").config.quant.skip_layers == (0, -1)


def test_the_purchase_table_shows_the_best_and_all_that_is_free() -> None:
    def bought(number: int, bits: float) -> Purchase:
        saved = Estimate(value=-0.01 * number, low=-1.0, high=1.0)
        return Purchase(what=f"change {number}", layers=(), weight_bits=bits, activation_bits=bits, kl_saved=saved)

    table = list(purchases([bought(number, 0.5) for number in range(30)] + [bought(30, 0)]))
    assert [line.split()[1] for line in table[2:-1]] == [*map(str, range(12)), "30"]
    assert table[-2].split()[-1] == "free"
    assert table[-1] == "18 more: --json"


def test_a_picture_is_drawn_and_two_checkpoints_stand_side_by_side(
    rin: Rin, folder: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    other = model_folder("llama", layers=2, text=True, seed=1)
    code, out, _ = rin("srdd", folder, *SMALL, "--static", "--against", other, "--plot", "a.svg", "--json")
    tree = json.loads(out)
    assert code == 0
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    assert tree["against"]["model"] == other
    assert {one["kind"] for one in tree["changes"]} == {"relative_error", "deadzone", "sqnr", "deadzone@down"}
    assert all(one["spearman"] is None for one in tree["changes"])  # two layers have no ranks to speak of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plot", "a.pdf"), "--plot a.pdf: is drawn as PNG or SVG"),
        (("--against", "nowhere"), "--against nowhere: no such folder"),
    ],
)
def test_what_cannot_be_drawn_or_compared_is_told_before_anything_is_scanned(
    rin: Rin, folder: str, arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = rin("srdd", folder, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def scan_with(relative_error: tuple[float, ...]) -> Scan:
    def errors(value: float) -> SiteErrors:
        same = Estimate(value=value, low=value, high=value)
        names = [field.name for field in fields(SiteErrors)]
        return SiteErrors(**dict.fromkeys(names, same))

    layers = tuple(LayerScan(layer=i, sites={"output": errors(value)}) for i, value in enumerate(relative_error))
    about: dict[str, Any] = {
        "model": "a",
        "fingerprint": "",
        "quant": {},
        "source": "prompts",
        "prompts": 1,
        "tokens": 1,
        "seed": 0,
    }
    return Scan(**about, seconds=0.0, depth=len(layers), layers=layers)


def test_the_layers_with_high_error_improved_where_the_rank_correlation_says_so() -> None:
    before = scan_with((0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    improved = changes(before, scan_with((0.1, 0.19, 0.28, 0.37, 0.46, 0.55)))[0]
    assert (improved.kind, improved.better, improved.layers) == ("relative_error", 5, 6)
    assert improved.spearman == improved.high == pytest.approx(1)
    worsened = changes(before, scan_with((0.1, 0.21, 0.32, 0.43, 0.54, 0.65)))[0]
    assert worsened.better == 0
    assert worsened.spearman == pytest.approx(-1)
    assert math.isnan(changes(before, before)[0].spearman)


def test_a_model_of_another_depth_is_no_later_checkpoint() -> None:
    with pytest.raises(ConfigError, match="give a checkpoint of the same model"):
        changes(scan_with((0.1, 0.2)), scan_with((0.1,)))


@pytest.mark.slow
def test_a_scan_lies_in_the_experiment_of_a_sweep_with_layers_for_steps(rin: Rin, folder: str, tmp_path: Path) -> None:
    from search.mlflow_client import absolute_uri, client
    from search.store import save_study_config
    from tests.written_sweeps import study

    config = study(tmp_path)
    save_study_config(config)
    code, out, err = rin(
        "srdd", folder, "--prompts", "2", "--static", "--sweep", config.name, "--store", config.store, "--json"
    )
    assert (code, err) == (0, "")
    scan = json.loads(out)
    mlflow = client(absolute_uri(config.tracking_uri))
    experiment = mlflow.get_experiment_by_name(config.name)
    (run,) = mlflow.search_runs([experiment.experiment_id])
    assert (run.data.tags["status"], run.info.status) == ("srdd", "FINISHED")
    seen = mlflow.get_metric_history(run.info.run_id, "srdd/deadzone/down")
    told = [layer["sites"]["down"]["deadzone"]["value"] for layer in scan["layers"]]
    assert [(one.step, one.value) for one in seen] == list(enumerate(told))
    assert {file.path for file in mlflow.list_artifacts(run.info.run_id)} == {"scan.json", "scan.svg", "scan.txt"}


def test_where_a_scan_is_to_lie_is_asked_before_it_is_made(rin: Rin, folder: str, tmp_path: Path) -> None:
    code, _, err = rin("srdd", folder, "--tracking-uri", "sqlite:///x")
    assert (code, "--tracking-uri sqlite:///x: has no use without --sweep" in err) == (2, True)
    code, _, err = rin("srdd", folder, "--sweep", "nosuch", "--store", str(tmp_path))
    assert (code, "nosuch" in err, err.count("\n")) == (2, True, 1)
