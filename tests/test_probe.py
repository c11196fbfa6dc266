"""`rin probe`: its plan, its rows against floors measured apart from it, and the command as its users meet it."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dashboards.probe import GROUP_SIZE, Row, as_tree, cast, conclusion, draw, header, line, measure, settings
from dashboards.probe_plan import DTYPES, Plan, check_plot, plan_probe
from spaces.config import MODES, ConfigError, Correction
from spaces.workloads import WORKLOADS
from tests.conftest import ModelFolder, Rin, byte_tokenizer
from trainable.engines.engine import Request
from trainable.floor import Floor, Gap, eager_logps, gap, measure_floor
from trainable.forward.logps import clean_logps, make_batch
from trainable.policy.loading import load_policy
from trainable.policy.policy import deployed
from trainable.rollout import encode_prompts, generate, judge
from trainable.seeds import generator
from trainable.tasks.table import build_task

Rows = list[tuple[Row, ...]]
DEPTH = 4


@pytest.fixture(scope="module")
def folder(model_folder: ModelFolder) -> str:
    return model_folder("llama", text=True, layers=DEPTH)


def small_plan(folder: str, **options: Any) -> Plan:
    return plan_probe(folder, **{"dtypes": "float32", "tokens": 8, "prompts": 3, "seed": 0, **options})


@pytest.fixture(scope="module")
def measured(folder: str) -> Rows:
    return list(measure(small_plan(folder)))


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workload", "options", "lengths", "prompts"),
    [
        ("embedded", {}, (1, 3, 6), 64),
        ("embedded", {"tokens": 12, "prompts": 4}, (3, 6, 12), 4),
        ("smollm2-135m", {}, (4, 8, 16), 8),
        ("tiny", {"tokens": 1}, (1,), 64),
        ("tiny", {"tokens": 2}, (1, 2), 64),
    ],
)
def test_lengths_are_a_quarter_half_and_all(
    workload: str, options: dict[str, int], lengths: tuple[int, ...], prompts: int
) -> None:
    plan = plan_probe(workload, dtypes="float32", **options)
    assert (plan.lengths, plan.prompts, plan.seed) == (lengths, prompts, 0)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_workload_is_probed_on_its_own_task_with_what_it_excludes(workload: str) -> None:
    config = plan_probe(workload, dtypes="bfloat16").config
    own = WORKLOADS[workload].settings
    assert config.model.dtype == "bfloat16"
    assert config.quant.mode == "W4A4"
    assert config.quant.skip_layers == tuple(own.get("quant", {}).get("skip_layers", ()))
    assert (config.task.name, config.task.chat) == (
        own.get("task", {}).get("name", "addition"),
        own.get("task", {}).get("chat", False),
    )


def test_a_folder_is_named_from_the_root_and_asked_in_text(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(folder).parent)
    config = small_plan(Path(folder).name).config
    assert config.model.name == folder
    assert config.task == plan_probe("smollm2-135m", dtypes="float32").config.task


@pytest.mark.parametrize("text", ["float32,bfloat16", " float32 , bfloat16,", "bfloat16,float32,bfloat16"])
def test_dtypes_are_a_list(folder: str, text: str) -> None:
    assert small_plan(folder, dtypes=text).dtypes == DTYPES


# --- the rows ---------------------------------------------------------------------------------------------------------


def test_every_setting_is_measured_at_every_depth_and_length(measured: Rows) -> None:
    assert settings(DEPTH) == [
        *((mode, "floor", blocks) for mode in ("W16A16", "W4A16", "W4A8", "W4A4") for blocks in (1, 2, 4)),
        *(("W4A4", rule, 4) for rule in ("even", "rceil", "ceil")),
    ]
    found = [
        (row.dtype, row.mode, row.scale_rule, row.blocks, row.depth, row.length) for rows in measured for row in rows
    ]
    assert found == [
        ("float32", mode, rule, blocks, DEPTH, n) for mode, rule, blocks in settings(DEPTH) for n in (2, 4, 8)
    ]


def test_longer_completions_have_more_tokens(measured: Rows) -> None:
    for rows in measured:
        tokens = [row.floor.widest.tokens for row in rows]
        assert tokens[0] <= 2 * 3 * GROUP_SIZE
        assert tokens == sorted(tokens)
        assert tokens[-1] > tokens[0]


def whole(measured: Rows, mode: str, rule: str = "floor") -> Row:
    (row,) = [
        row
        for rows in measured
        for row in rows
        if (row.mode, row.scale_rule, row.blocks, row.length) == (mode, rule, row.depth, 8)
    ]
    return row


def test_4_bit_activations_have_a_floor_and_16_bits_have_none_to_speak_of(folder: str, measured: Rows) -> None:
    """In bfloat16 some rounding flips for sure; in float32 that takes a larger model than this one."""
    assert 0 < whole(measured, "W16A16").floor.kl < 1e-9
    assert 0 < whole(measured, "W4A16").floor.kl < 1e-9
    coarse = list(measure(small_plan(folder, dtypes="bfloat16")))
    found = [whole(coarse, "W4A4", rule).floor.kl for rule in ("floor", "even", "rceil", "ceil")]
    assert min(found) > 3 * whole(coarse, "W16A16").floor.kl
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    ("mode", "rule"), [("W16A16", "floor"), ("W4A8", "floor"), ("W4A4", "floor"), ("W4A4", "ceil")]
)
def test_a_row_is_the_floor_of_a_policy_loaded_in_that_setting(
    folder: str, measured: Rows, mode: str, rule: str
) -> None:
    """Loaded, not switched; its completions sampled, teacher-forced and cut here."""
    config = small_plan(folder).config
    quant = config.quant.model_copy(update={**MODES[mode], "scale_rule": rule})
    policy = load_policy(config.model, quant, seed=0)
    task = build_task(config.task)
    questions = task.sample(3, seed=0, step=0, batch=0)
    prompts = encode_prompts(policy, questions, config.task, 256)
    with deployed(policy):
        asked = Request(
            prompts=prompts,
            group_size=GROUP_SIZE,
            max_new_tokens=8,
            temperature=1.0,
            batch_size=12,
            draw=("probe", 0),
        )
        sampled = generate(policy, asked)
        batch = make_batch(policy, judge(policy, task, questions, prompts, sampled), torch.zeros(3, GROUP_SIZE))
        floor = measure_floor(policy, batch, 1.0, config.grpo.micro_batch_size)
        training, eager = (way(policy, batch, 1.0, config.grpo.micro_batch_size) for way in (clean_logps, eager_logps))
    row = whole(measured, mode, rule)
    assert row.floor.pairs["eager"] == floor.pairs["eager"]
    assert row.floor.pairs["cached"].kl == pytest.approx(gap(batch.rollout_logps, training, batch.mask).kl, rel=1e-9)
    assert row.effective_share == gap(batch.rollout_logps, training, batch.mask).effective_share
    assert row.floor.pairs["cached"].tokens == floor.pairs["cached"].tokens
    (cut,) = [
        r for rows in measured for r in rows if (r.mode, r.scale_rule, r.blocks, r.length) == (mode, rule, DEPTH, 2)
    ]
    assert cut.floor.pairs["eager"] == gap(
        eager[:, :2], training[:, :2], batch.mask[:, :2], sampler_logps=batch.rollout_logps[:, :2]
    )


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(
    folder: str, measured: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(measure(small_plan(folder))) == measured
    other = next(iter(measure(small_plan(folder, seed=1))))
    assert other != measured[0]
    draws: list[tuple[object, ...]] = []
    monkeypatch.setattr("trainable.rollout.generator", lambda *of, **on: (draws.append(of), generator(*of, **on))[1])
    monkeypatch.setattr("dashboards.probe.settings", lambda depth: [("W4A4", "floor", depth)] * 2)
    first, second = measure(small_plan(folder, seed=7))
    assert draws == [("probe", 7)] * 2, "each setting from the same random numbers"
    assert first == second


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_policy_that_is_cast_is_one_that_was_loaded_in_that_dtype(model_folder: ModelFolder, kind: str) -> None:
    config = small_plan(model_folder(kind, text=True, layers=2)).config
    policy, loaded = (
        load_policy(config.model.model_copy(update={"dtype": dtype}), config.quant, seed=0)
        for dtype in ("float32", "bfloat16")
    )
    cast(policy, torch.bfloat16)
    for parts in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(policy.model, parts)()), dict(getattr(loaded.model, parts)())
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name].dtype, torch.equal(ours[name], tensor)) == (tensor.dtype, True), name
    assert {tensor.dtype for tensor in loaded.model.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in loaded.model.buffers()} == {torch.float32}


@pytest.mark.parametrize(("adapter", "times"), [("full", 1), ("lora", 2)])
def test_a_model_is_read_once_but_for_its_adapters(
    folder: str, monkeypatch: pytest.MonkeyPatch, adapter: str, times: int
) -> None:
    """Adapters stay in float32 whatever the model's dtype."""
    monkeypatch.setattr("dashboards.probe.settings", lambda depth: [("W4A4", "floor", depth)])
    reads: list[str] = []
    monkeypatch.setattr(
        "dashboards.probe.load_policy", lambda model, *rest: (reads.append(model.dtype), load_policy(model, *rest))[1]
    )
    plan = small_plan(folder, dtypes="float32,bfloat16", tokens=4)
    model = plan.config.model.model_copy(update={"adapter": adapter})
    both = list(measure(replace(plan, config=plan.config.model_copy(update={"model": model}))))
    assert len(reads) == times
    alone = replace(plan, dtypes=("bfloat16",), config=plan.config.model_copy(update={"model": model}))
    assert list(measure(alone)) == both[1:]


def test_each_dtype_has_its_rows(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashboards.probe.settings", lambda depth: [("W16A16", "floor", depth)])
    rows = list(measure(small_plan(folder, dtypes="float32,bfloat16", tokens=4)))
    assert [group[0].dtype for group in rows] == ["float32", "bfloat16"]
    single, half = (group[-1].floor.kl for group in rows)
    assert half > 100 * single, "8 bits of mantissa instead of 24"


# --- text, JSON, figure -----------------------------------------------------------------------------------------------


def row(mode: str, kl: float, *, length: int = 8, blocks: int = 30, rule: str = "floor", dtype: str = "float32") -> Row:
    near = Gap(
        kl=kl / 2,
        mean_abs=0.01,
        max_abs=0.5,
        apart=0.1,
        tokens=16 * length,
        token_share=0.62,
        sequence_share=0.4 / length,
    )
    far = Gap(kl=kl, mean_abs=0.17, max_abs=7.25, apart=0.6, tokens=16 * length, token_share=0.01, sequence_share=0.9)
    floor = Floor(pairs={"cached": near, "eager": far})
    return Row(dtype=dtype, mode=mode, scale_rule=rule, blocks=blocks, depth=30, length=length, floor=floor)


def three(mode: str, kl: float, **options: Any) -> tuple[Row, ...]:
    return tuple(row(mode, kl * length / 8, length=length, **options) for length in (2, 4, 8))


def test_a_line_shows_the_wider_pair_the_shares_of_the_sampled_one_and_every_length(folder: str) -> None:
    text = line(three("W4A4", 0.088, blocks=15))
    assert (
        " ".join(text.split())
        == "float32 W4A4 floor 15/30 128 0.022 0.044 0.088 0.17 7.2 60.0 % 100 % 62 % 20 % 10 % 5 %"
    )
    *_, names = header(small_plan(folder))
    assert names.split()[5:] == [
        "KL@2",
        "KL@4",
        "KL@8",
        "mean",
        "max",
        "apart",
        "none",
        "token",
        "seq@2",
        "seq@4",
        "seq@8",
    ]
    assert len(text) == len(names), "columns stand under their names"


def test_a_floor_that_is_not_finite_is_shown_and_is_null_in_json(folder: str) -> None:
    bad = Gap(
        kl=math.nan,
        mean_abs=math.nan,
        max_abs=math.nan,
        apart=1.0,
        tokens=4,
        token_share=math.nan,
        sequence_share=math.nan,
    )
    rows = (
        replace(row("W4A4", 1.0), floor=Floor(pairs={"cached": bad, "eager": row("W4A4", 1.0).floor.pairs["eager"]})),
    )
    assert line(rows).split()[5:7] == ["nan", "nan"]
    tree = json.loads(json.dumps(as_tree(small_plan(folder), rows, 1.0), allow_nan=False))
    assert tree["rows"][0]["kl"] is None
    assert tree["rows"][0]["effective_share"] == {"none": 1.0, "token": None, "sequence": None}
    assert tree["rows"][0]["pairs"]["eager"]["kl"] == 1.0


def test_the_conclusion_is_about_the_whole_model_in_w4a4() -> None:
    rows = [
        *three("W16A16", 1e-9),
        *three("W4A4", 0.5, blocks=7),
        *three("W4A4", 0.09),
        *three("W4A4", 0.7, rule="even"),
        *three("W16A16", 0.001, dtype="bfloat16"),
        *three("W4A4", 0.64, dtype="bfloat16"),
    ]
    assert conclusion(rows)[-2:] == [
        "W4A4 in float32: a rollout that differs from training by a KL of 0.09 or less is as equal as arithmetic "
        "allows (W16A16: 1e-09); above 0.27, 3 times that, look for an error.",
        "W4A4 in bfloat16: a rollout that differs from training by a KL of 0.64 or less is as equal as arithmetic "
        "allows (W16A16: 0.001); above 1.9, 3 times that, look for an error.",
    ]


def test_the_conclusion_makes_no_limit_of_tokens_on_which_nothing_flipped() -> None:
    said = conclusion([*three("W16A16", 2e-13), *three("W4A4", 3e-14)])
    assert said[-1].startswith("W4A4 in float32: no rounding flipped on these tokens")
    assert not any("look for an error" in text for text in said)


def curves(
    rows: list[Row], path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, tuple[list[float], list[float]]]]:
    """What each half of the figure shows, by label."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k))[1])
    draw(rows, path)
    return [
        {str(c.get_label()): (list(map(float, c.get_xdata())), list(map(float, c.get_ydata()))) for c in axes.lines}  # type: ignore[arg-type]
        for axes in drawn[0].axes
    ]


def test_the_figure_shows_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*three("W16A16", 0.0), *three("W4A4", 0.2, blocks=7), *three("W4A4", 0.4), *three("W4A4", 0.9, rule="even")]
    rows += three("W4A4", 0.6, dtype="bfloat16")
    left, right = curves(rows, tmp_path / "floor.png", monkeypatch)
    assert left == {
        "W16A16 float32": ([30], [1e-16]),
        "W4A4 float32": ([7, 30], [0.2, 0.4]),
        "W4A4 bfloat16": ([30], [0.6]),
    }
    assert right["W4A4 float32"] == ([2, 4, 8], [0.2, 0.1, 0.05])
    picture = (tmp_path / "floor.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_setting_and_says_what_it_means(rin: Rin, folder: str, measured: Rows) -> None:
    code, out, err = rin("probe", folder, "--dtype", "float32", "--tokens", "8", "--prompts", "3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    table = header(small_plan(folder)) + [line(rows) for rows in measured]
    assert lines[: len(table)] == table
    assert all(len(text) <= 140 for text in lines[1 : len(table)])
    assert lines[len(table) + 1 : -1] == conclusion([row for rows in measured for row in rows])
    assert lines[-1].startswith("45 floors in ")


def test_json_is_one_object_with_every_row_and_the_plot_a_picture(
    rin: Any, folder: str, measured: Rows, tmp_path: Path
) -> None:
    code, out, err = rin(
        "probe", folder, "--dtype", "float32", "--tokens", "8", "--prompts", "3", "--json", "--plot", "floor.png"
    )
    assert (code, err) == (0, "")
    tree = json.loads(out)
    expected = as_tree(small_plan(folder), [row for rows in measured for row in rows], tree["seconds"])
    assert tree == json.loads(json.dumps(expected))
    last = tree["rows"][-1]
    assert (last["mode"], last["scale_rule"], last["weights"], last["blocks"], last["length"]) == (
        "W4A4",
        "ceil",
        "mxfp4",
        4,
        8,
    )
    assert set(last["pairs"]) == {"cached", "eager"}
    assert set(last["pairs"]["eager"]) == {"kl", "mean_abs", "max_abs", "apart", "tokens"}
    assert set(last["effective_share"]) == set(get_args(Correction))
    assert last["kl"] == max(pair["kl"] for pair in last["pairs"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["floor.png"]


@pytest.mark.slow
def test_a_workload_that_is_trained_here_is_built_first(rin: Any) -> None:
    code, out, _ = rin("probe", "tiny", "--dtype", "float32", "--prompts", "1", "--json")
    assert code == 0
    tree = json.loads(out)
    assert {row["blocks"] for row in tree["rows"]} == {1, 2}
    assert tree["lengths"] == [1, 2, 5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "MODEL=nothing: unknown; choose one of embedded, tiny, smollm2-135m"),
        (["Qwen/Qwen2.5-0.5B"], "MODEL=Qwen/Qwen2.5-0.5B: unknown; choose one of embedded"),
        (["."], "cannot be loaded"),
        (["tiny", "--dtype", "float16"], "--dtype float16: choose float32, bfloat16"),
        (["tiny", "--dtype", ","], "--dtype ,: choose float32, bfloat16"),
        (["tiny", "--tokens", "0"], "--tokens 0: out of range; give 1 to 1024"),
        (["tiny", "--tokens", "1025"], "--tokens 1025: out of range; give 1 to 1024"),
        (["tiny", "--prompts", "0"], "--prompts 0: out of range; give 1 to 64"),
        (["tiny", "--prompts", "65"], "--prompts 65: out of range; give 1 to 64"),
        (["tiny", "--seed", "-1"], "--seed -1: out of range; give 0 or more"),
        (["tiny", "--plot", "floor.pdf"], "--plot floor.pdf: is drawn as PNG; give a name that ends with .png"),
        (["tiny", "--plot", "missing/floor.png"], "--plot missing/floor.png: no folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(rin: Rin, arguments: list[str], said: str, tmp_path: Path) -> None:
    code, out, err = rin("probe", *arguments)
    assert (code, out) == (2, ""), err
    (text,) = err.splitlines()
    assert text.startswith("rin: ")
    assert said in text
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_completions_beyond_the_model_s_positions_are_refused(rin: Rin, folder: str) -> None:
    code, _, err = rin("probe", folder, "--tokens", "1000", "--dtype", "float32")
    assert code == 2
    assert "--tokens 1000: the model has 1024 positions" in err
    room = int(err.split("; give ")[1].split()[0])
    assert 900 < room < 1000
    assert small_plan(folder, tokens=room).lengths[-1] == room


def test_a_tokenizer_that_cannot_spell_the_questions_is_refused(rin: Rin, model_folder: ModelFolder) -> None:
    code, _, err = rin("probe", model_folder("llama"), "--dtype", "float32")
    assert code == 2
    assert "its tokenizer cannot spell" in err


def test_a_model_whose_projections_are_no_linear_layers_has_a_floor(
    rin: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place, tokenizer = tmp_path_factory.mktemp("gpt2"), byte_tokenizer()
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1)
    torch.manual_seed(0)  # in another model a rounding may fall the other way
    GPT2LMHeadModel(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    code, out, err = rin("probe", str(place), "--dtype", "float32", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert {row["mode"] for row in rows} == {*MODES}
    assert all(row["kl"] < 1e-9 for row in rows)


def test_without_matplotlib_the_plot_is_refused_before_anything_is_measured(
    rin: Any, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    code, out, err = rin("probe", folder, "--plot", "floor.png")
    assert (code, out) == (2, "")
    assert "--plot floor.png: needs matplotlib; run: pip install" in err
    monkeypatch.undo()
    check_plot(tmp_path / "floor.png")


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "floor.png").mkdir()
    with pytest.raises(ConfigError, match=r"--plot .*floor\.png: Is a directory"):
        draw([row("W4A4", 0.1)], tmp_path / "floor.png")
