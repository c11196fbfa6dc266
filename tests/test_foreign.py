"""Rewards of the user's, in a process of their own: whatever they do there, the trial has its numbers.

Or an end with a name."""

import asyncio
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dashboards.options import SweepOptions, study_config
from dashboards.task_text import examine_task
from search.lineup import fixed_arms
from search.preflight import check_sources
from search.rewards import bring_rewards, keep_rewards, pinned
from search.searchers import RinSearch
from search.store import StudyConfig
from search.submission import ship
from spaces.config import ConfigError, TaskConfig
from tests.conftest import Tiny
from tests.test_trial import comparable, comparable_outcome, finish
from trainable.disk.folder import Folder
from trainable.failure import TrialFailed
from trainable.tasks import code
from trainable.tasks.contract import Finding, check_contract
from trainable.tasks.conventions import UserCode
from trainable.tasks.foreign import Convention, ForeignReward, Worker, metric_name
from trainable.tasks.table import build_task
from trainable.tasks.task import Answer, Question
from trainable.tasks.verifiers_environment import _Rubric
from trainable.trial import Trial
from trainable.trial_worker import TrialWorker

pytestmark = pytest.mark.slow  # each of them starts a process for the user's code

EXACT = "def f(row, completion):\n    return float(completion == row['answer'])\n"
HOSTILE = """
import os, random, subprocess, sys, time

def same(row, completion):
    return float(completion == row["answer"])

def prints(row, completion):
    print("x" * 1_000_000)
    sys.stderr.write("y" * 1_000_000)
    os.write(1, b"z" * 100_000)
    return same(row, completion)

def forks(row, completion):
    os.fork()
    return same(row, completion)

def leaves_children(row, completion):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    return same(row, completion)

def lingers(row, completion):
    leaves_children(row, completion)
    time.sleep(600)

def moves(row, completion):
    os.chdir("/")
    os.environ["HOME"] = "/nowhere"
    return same(row, completion)

def seeds(row, completion):
    import numpy
    random.seed(1)
    numpy.random.seed(1)
    return same(row, completion)

def closes(row, completion):
    sys.stdout.close()
    return same(row, completion)

calls = 0

def rude(row, completion):
    global calls
    calls += 1
    doing = {1: prints, 40: forks, 80: leaves_children, 120: moves, 160: seeds}.get(calls % 240, same)
    return doing(row, completion)

def hangs(row, completion):
    time.sleep(600)

def exits(row, completion):
    os._exit(3)

def crashes(row, completion):
    import ctypes
    ctypes.string_at(0)

def leaves(row, completion):
    sys.exit(0)

def divides(row, completion):
    return 1 / (len(completion) - 4)

def text(row, completion):
    return "1.0"

def nan(row, completion):
    return float("nan")

def nothing(row, completion):
    return None

def chance(row, completion):
    return random.random()

def once(row, completion):
    witness = os.environ["RIN_WITNESS"]
    if not os.path.exists(witness):
        open(witness, "w").close()
        os._exit(1)
    return same(row, completion)
"""
QUESTION = Question(prompt="1+2=", answer="3", where="q.jsonl:7")
ANSWERS = [Answer(question=QUESTION, text=text) for text in ("3", "four", "5")]
opened: list[ForeignReward] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()


def written(folder: Path, code: str, name: str = "reward.py") -> Path:
    path = folder / name
    path.write_text(code)
    return path


def reward(convention: Convention, *functions: str, **settings: Any) -> ForeignReward:
    config = TaskConfig(reward=functions, **settings)
    opened.append(ForeignReward(convention=convention, config=config, functions=functions))
    return opened[-1]


def marked(given: ForeignReward, answers: Sequence[Answer] = ANSWERS) -> list[dict[str, float | None]]:
    return given(answers)


# --- what it does there stays there -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["same", "prints", "forks", "leaves_children", "moves", "seeds", "closes"])
def test_whatever_a_reward_does_around_its_marks_they_arrive(function: str, tmp_path: Path) -> None:
    before = random.getstate(), os.getcwd(), os.environ["HOME"], torch.get_num_threads()
    given = reward("python", f"{written(tmp_path, HOSTILE)}:{function}")
    assert marked(given) == [{function: 1.0}, {function: 0.0}, {function: 0.0}]
    assert marked(given, ANSWERS[::-1]) == [{function: 0.0}, {function: 0.0}, {function: 1.0}]
    assert given.deaths == []
    assert (random.getstate(), os.getcwd(), os.environ["HOME"], torch.get_num_threads()) == before


def descendants(pid: int) -> set[int]:
    parents: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(place.parent.name)] = int(place.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set[int](), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are adopted on Linux alone")
def test_children_of_a_reward_end_with_it_also_those_that_left_its_session(tmp_path: Path) -> None:
    given = reward("python", f"{written(tmp_path, HOSTILE)}:leaves_children")
    marked(given)
    assert given._worker is not None
    family = descendants(given._worker._process.pid)
    assert len(family) >= 2 + 2 * len(ANSWERS)
    given.close()
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are adopted on Linux alone")
def test_a_trial_that_is_killed_in_a_call_leaves_no_process_of_its_reward(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from spaces.config import TaskConfig\n"
        "from trainable.tasks.foreign import ForeignReward\n"
        "from trainable.tasks.task import Answer, Question\n"
        "given = ForeignReward(convention='python', config=TaskConfig(), functions=(sys.argv[1],))\n"
        "given.open()\n"
        "print(given._worker._process.pid, flush=True)\n"
        "given([Answer(question=Question(prompt='', answer=''), text='')])\n"
    )
    command = [sys.executable, "-c", code, f"{written(tmp_path, HOSTILE)}:lingers"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trial:
        assert trial.stdout is not None
        guard = int(trial.stdout.readline())
        until = time.monotonic() + 30
        while len(family := descendants(guard)) < 4:  # guard, worker, and two that left it
            assert time.monotonic() < until, family
            time.sleep(0.02)
        trial.kill()
    until = time.monotonic() + 10
    while left := [pid for pid in family if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < until, left
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("function", "how"),
    [
        ("hangs", "it took over 0.3 s in score"),
        ("exits", "it ended with exit code 3 in score"),
        ("crashes", f"it ended with exit code {128 + signal.SIGSEGV}"),
    ],
)
def test_a_reward_whose_process_dies_twice_fails_the_trial_by_name(function: str, how: str, tmp_path: Path) -> None:
    path = written(tmp_path, HOSTILE)
    given = reward("python", f"{path}:{function}", reward_timeout_seconds=0.3 if function == "hangs" else 60)
    with pytest.raises(TrialFailed, match=f"^reward: the process of .*:{function} died: .*then, started again") as said:
        marked(given)
    assert str(said.value).count(how) == 2


def test_a_process_that_dies_once_is_started_again_and_asked_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIN_WITNESS", str(tmp_path / "witness"))
    given = reward("python", f"{written(tmp_path, HOSTILE)}:once")
    assert marked(given) == [{"once": 1.0}, {"once": 0.0}, {"once": 0.0}]
    assert given.deaths == ["it ended with exit code 1 in score"]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("divides", r"reward\.py:\d+: ZeroDivisionError: division by zero \(of the answer 'four' to q\.jsonl:7\)"),
        ("leaves", r"reward\.py:\d+: SystemExit: 0 \(of the answer '3' to q\.jsonl:7\)"),
        ("text", r"text returned '1\.0', which is no number \(of the answer '3' to q\.jsonl:7\)"),
        ("nan", r"nan is nan \(of the answer '3' to q\.jsonl:7\); give a finite number"),
        ("nothing", r"nothing gave None \(of the answer '3' to q\.jsonl:7\): nothing marks it"),
        ("absent", r"reward\.py has no function absent; it has .*divides"),
    ],
)
def test_what_a_reward_gets_wrong_is_the_users_mistake_with_line_and_row(
    function: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^task.reward: .*{said}") as mistake:
        marked(reward("python", f"{written(tmp_path, HOSTILE)}:{function}"))
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nowhere_at_all\n", r"reward\.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def f(:\n", r"reward\.py:1: SyntaxError"),
        ("exit(0)\n", r"reward\.py:1: SystemExit"),
    ],
)
def test_a_file_that_does_not_load_is_told_with_its_line(code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"does not load: .*{said}"):
        reward("python", f"{written(tmp_path, code)}:f").open()


def test_a_file_or_package_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere/r\.py cannot be read \(No such file or directory\)"):
        reward("python", "/nowhere/r.py:f").open()
    with pytest.raises(ConfigError, match=r"no\.package does not load: .*ModuleNotFoundError"):
        reward("python", "no.package:f").open()


def test_chance_in_a_reward_is_the_same_chance_again_in_another_process(tmp_path: Path) -> None:
    path = written(tmp_path, HOSTILE)
    first, second = reward("python", f"{path}:chance"), reward("python", f"{path}:chance")
    assert marked(first) == marked(second) == marked(first)
    assert marked(first) != [*reversed(marked(first, ANSWERS[::-1]))]


def test_a_worker_starts_without_torch_and_within_a_moment(tmp_path: Path) -> None:
    heavy = "{'torch', 'numpy', 'pydantic'}"
    code = f"import sys\ndef f(row, completion):\n    return float(len({heavy} & sys.modules.keys()))\n"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    given = reward("python", f"{written(tmp_path, code)}:f")
    assert marked(given)[0] == {"f": 0.0}
    given.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3, "seconds of computing"


def test_an_answer_that_is_none_is_a_death() -> None:
    worker = Worker()
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(Exception, match="it ended with exit code -9"):
        worker.ask("open", 5)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_reward_is_hashed_as_it_was_read_and_a_changed_file_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, EXACT)
    given = reward("python", f"{path}:f")
    given.open()
    assert given.hashes == (hashlib.sha256(EXACT.encode()).hexdigest(),)
    path.write_text(EXACT + "# and more\n")
    with pytest.raises(ConfigError, match=rf"reward={path}:f: its file has changed \(sha256 [0-9a-f]{{12}}, and "):
        reward("python", f"{path}:f", reward_sha256=given.hashes).open()


def test_a_function_that_a_package_hands_on_has_the_hash_of_its_own_file() -> None:
    import asyncio.tasks

    (found,) = UserCode().open("python", [("sleep", "asyncio:sleep")], {})
    assert found == hashlib.sha256(Path(asyncio.tasks.__file__).read_bytes()).hexdigest()


def test_imports_and_files_beside_a_reward_are_found(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("3")
    written(tmp_path, "RIGHT = open('words.txt').read()\n", "neighbour.py")
    path = written(tmp_path, "from neighbour import RIGHT\ndef f(row, completion):\n    return completion == RIGHT\n")
    assert marked(reward("python", f"{path}:f"))[0] == {"f": 1.0}


@pytest.mark.parametrize(
    ("mark", "name"),
    [("f1@10", "f1_10"), ("accuracy", "accuracy_mark"), ("n", "n_mark"), ("a b/c.d-e", "a b/c.d-e"), ("acc", "acc")],
)
def test_a_mark_has_a_name_that_can_be_tracked_and_is_nobody_elses(mark: str, name: str) -> None:
    assert metric_name(mark) == name


# --- calling conventions ----------------------------------------------------------------------------------------------

CONVENTIONS = """
import asyncio

def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    right = solution_str == ground_truth
    more = {"turns": extra_info["num_turns"], "index": extra_info["index"], "pred": solution_str}
    return {"score": right + bonus, "acc": right, **more}

async def compute_later(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0.002 * (3 - len(solution_str)))
    return int(solution_str == ground_truth)

def length(prompts, completions, completion_ids, solution, **kwargs):
    kwargs["log_extra"]("tokens", [len(ids) for ids in completion_ids])
    kwargs["log_metric"]("half", 0.5)
    return [None if text == "5" else len(text) / 2 for text in completions]

def costs(completions, log_extra, log_metric, each=0.0, **kwargs):
    log_extra("whole", [99.0] * len(completions))
    for text in completions:
        log_metric("letters", len(text))
    return [-each] * len(completions)

def whole(completions, **kwargs):
    return [1.0] * len(completions)

def other(data_source, solution_str, ground_truth, extra_info):
    return {"score": 0.5, "acc": 0.0, "turns@": 7}

def same_mark(data_source, solution_str, ground_truth, extra_info):
    return {"score": 0.5, "f1@10": 1, "f1_10": 0}

def pops(row, completion):
    return row["left"].pop()

async def chat_right(prompts, completions, solution, trainer_state, **kwargs):
    await asyncio.sleep(0)
    return [float(c[0]["content"] == s and p[-1]["role"] == "user") for p, c, s in zip(prompts, completions, solution)]

def wrong_length(completions, **kwargs):
    return [1.0]

def divides(completions, **kwargs):
    return [1 / (len(text) - 4) for text in completions]

def lacks(completions, solutions, **kwargs):
    return [1.0] * len(completions)

def looks(completions, trainer_state, **kwargs):
    return [trainer_state.global_step] * len(completions)

async def exact(completion, answer, state):
    state["right"] = completion[-1]["content"] == answer
    return float(state["right"])

def seen(state):
    return 0.5 * state["right"]

def asked(prompt, info, task, parser=None):
    return float(prompt[0]["content"] == "1+2=" and info == {"k": 1} and task == "sums" and parser is None)
"""


def rows(**entry: Any) -> list[Answer]:
    question = Question(prompt="1+2=", answer="3", where="q.jsonl:7", entry=entry)
    return [Answer(question=question, text=text, ids=(1, 2, 3)[:n]) for n, text in enumerate(("3", "four", "5"), 1)]


def test_verl_is_called_by_keyword_and_gives_numbers_or_mappings(tmp_path: Path) -> None:
    path = written(tmp_path, CONVENTIONS)
    answers = rows(data_source="openai/gsm8k", ground_truth="3", extra_info={"index": 4})
    given = reward("verl", f"{path}:compute_score", reward_options={"bonus": 0.25})
    assert given.weights == {"compute_score": 1.0}
    found = marked(given, answers)
    more = {"turns": 2.0, "index": 4.0}
    assert found[0] == {"compute_score": 1.25, "acc": 1.0, "pred": None, **more}
    assert found[2] == {"compute_score": 0.25, "acc": 0.0, "pred": None, **more}
    later = reward("verl", f"{path}:compute_later")
    assert marked(later, answers) == [{"compute_later": 1.0}, {"compute_later": 0.0}, {"compute_later": 0.0}]


def test_trl_is_called_with_the_whole_batch_and_none_does_not_apply(tmp_path: Path) -> None:
    path = written(tmp_path, CONVENTIONS)
    given = reward("trl", f"{path}:length", f"{path}:length", reward_weights=(1.0, 0.5))
    assert given.weights == {"length": 1.0, "length_2": 0.5}
    found = marked(given, rows(prompt="1+2=", solution="3")[:2])
    logged = {"half": 0.5, "length_2/half": 0.5}
    assert found[0] == {"length": 0.5, "length_2": 0.5, "tokens": 1.0, "length_2/tokens": 1.0, **logged}
    assert found[1] == {"length": 2.0, "length_2": 2.0, "tokens": 2.0, "length_2/tokens": 2.0, **logged}
    with pytest.raises(ConfigError, match="length, length_2 gave None"):
        marked(given, rows(prompt="1+2=", solution="3")[2:] * 2)


def test_what_a_function_logs_takes_no_other_functions_place_and_options_reach_trls_too(tmp_path: Path) -> None:
    path = written(tmp_path, CONVENTIONS)
    given = reward("trl", f"{path}:whole", f"{path}:costs", reward_options={"each": 0.25})
    assert marked(given, rows(prompt="1+2="))[0] == {"whole": 1.0, "costs": -0.25, "costs/whole": 99.0, "letters": 2.0}
    row = {"data_source": "openai/gsm8k", "ground_truth": "3", "extra_info": {"index": 4}}
    both = marked(reward("verl", f"{path}:compute_score", f"{path}:other"), rows(**row))
    assert (both[0]["acc"], both[0]["other/acc"]) == (1.0, 0.0)
    with pytest.raises(ConfigError, match=r"two of the marks f1@10, f1_10, same_mark would be tracked under one name"):
        marked(reward("verl", f"{path}:same_mark"), rows(**row))


def test_what_a_reward_does_to_a_row_is_not_there_for_the_next_answer(tmp_path: Path) -> None:
    given = reward("python", f"{written(tmp_path, CONVENTIONS)}:pops")
    assert marked(given, rows(left=[1.0, 2.0, 3.0])) == [{"pops": 3.0}] * 3


def test_trl_completions_are_messages_where_prompts_are(tmp_path: Path) -> None:
    path = written(tmp_path, CONVENTIONS)
    given = reward("trl", f"{path}:chat_right")
    answers = rows(prompt=[{"role": "user", "content": "1+2="}], solution="3")
    assert [marks["chat_right"] for marks in marked(given, answers)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("wrong_length", r"wrong_length returned 1 rewards for 3 completions"),
        ("divides", r"reward\.py:\d+: ZeroDivisionError: division by zero \(of the answer 'four' to q\.jsonl:7\)"),
        ("lacks", r"reward\.py:\d+: TypeError: lacks\(\) missing 1 required positional argument: 'solutions' \("),
        ("looks", r"AttributeError: trainer_state\.global_step: a reward is not told here how far training is"),
    ],
)
def test_a_batched_reward_is_told_its_mistake_and_the_row(function: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        marked(reward("trl", f"{written(tmp_path, CONVENTIONS)}:{function}"), rows(prompt="1+2="))


def test_a_rubric_gets_the_arguments_it_names_and_shares_a_state_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, CONVENTIONS)
    given = reward("verifiers", *(f"{path}:{name}" for name in ("exact", "seen", "asked")))
    answers = rows(prompt=[{"role": "user", "content": "1+2="}], info={"k": 1}, task="sums")
    assert marked(given, answers) == [
        {"exact": 1.0, "seen": 0.5, "asked": 1.0},
        *[{"exact": 0.0, "seen": 0.0, "asked": 1.0}] * 2,
    ]


def test_two_functions_of_one_name_in_a_group_of_rubrics_are_two_marks() -> None:
    def given(mark: float, weight: float) -> SimpleNamespace:
        def right(completion: Any) -> float:
            return mark

        return SimpleNamespace(funcs=[right], weights=[weight], class_objects={})

    class Environment:
        rubric = SimpleNamespace(rubrics=[given(1.0, 2.0), given(0.0, 1.0)])
        env_response = None

    verifiers = SimpleNamespace(load_environment=lambda env: Environment(), SingleTurnEnv=Environment)
    marks = asyncio.run(_Rubric(verifiers, "sums", {}).score({"prompt": []}, "3"))
    assert marks == {"right": 1.0, "right_2": 0.0, "score": 2.0, "correct": 1.0}


# --- the contract -----------------------------------------------------------------------------------------------------


def findings(config: TaskConfig) -> dict[str, Finding]:
    task = build_task(config)
    assert isinstance(task.foreign, ForeignReward)
    opened.append(task.foreign)
    found = check_contract(task, task.held_out("selection", 8), lambda text: [5] * len(text), per_step=256)
    return {finding.part: finding for finding in found}


@pytest.mark.parametrize(
    ("code", "part", "said"),
    [
        ("return 1.0", "an empty answer is wrong", "the wrong answer '' scores 1, and the known one 1"),
        ("return float(completion != '')", "another row's answer is wrong", "the wrong answer '"),
        ("return -exact(row, completion)", "an empty answer is wrong", "scores 0, and the known one -1"),
        ("import random; return exact(row, completion) + random.random() / 9", "the same answer scores the same", ""),
    ],
)
def test_a_reward_that_breaks_its_contract_is_found_and_the_row_named(
    code: str, part: str, said: str, tmp_path: Path
) -> None:
    exact = "def exact(row, completion):\n    return float(completion == row['answer'])\n"
    path = written(tmp_path, f"{exact}def f(row, completion):\n    {code}\n")
    found = findings(TaskConfig(reward=f"{path}:f"))  # type: ignore[arg-type]
    assert found[part].state == "failed"
    assert said in found[part].detail
    assert "=': the " in found[part].detail  # the row, which is a sum


def test_a_reward_that_keeps_its_contract_is_said_to(tmp_path: Path) -> None:
    found = findings(TaskConfig(reward=f"{written(tmp_path, EXACT)}:f"))  # type: ignore[arg-type]
    assert {finding.state for finding in found.values()} == {"holds"}
    assert " ms an answer, " in found["time"].detail


def test_where_no_answer_is_known_it_says_not_checked(tmp_path: Path) -> None:
    path = written(tmp_path, "def f(row, completion):\n    return len(completion) / 10\n")
    task = build_task(TaskConfig(reward=f"{path}:f"))  # type: ignore[arg-type]
    assert isinstance(task.foreign, ForeignReward)
    opened.append(task.foreign)
    found = check_contract(task, [Question(prompt="write", answer="")], lambda text: [], per_step=8)
    states = {finding.part: finding.state for finding in found}
    assert states["known answers are right"] == states["another row's answer is wrong"] == "not checked"


# --- in a trial -------------------------------------------------------------------------------------------------------


def test_a_trial_with_the_users_reward_is_the_trial_with_the_same_reward_of_ours(tiny: Tiny, tmp_path: Path) -> None:
    """And a rude one leaves the numbers as they are."""
    path = written(tmp_path, HOSTILE)
    runs = []
    for function in ("same", "rude"):
        trial = Trial(tiny(f"task.reward={path}:{function}"))
        reports = [comparable(report) for report in finish(trial)]
        outcome = comparable_outcome(trial.outcome())
        trial.close()
        assert outcome["config"]["task"]["reward_sha256"] == [hashlib.sha256(HOSTILE.encode()).hexdigest()]
        del outcome["config"]["task"], outcome["eval"]["parts"], outcome["eval"]["parts_start"]
        for report in reports:
            report["signals"] = {k: v for k, v in report["signals"].items() if not k.endswith(f"/{function}")}
            report["signals"].pop(f"eval/{function}_start", None)
        runs.append((reports, outcome))
    ours = Trial(tiny())
    reports = [comparable(report) for report in finish(ours)]
    outcome = comparable_outcome(ours.outcome())
    del outcome["config"]["task"], outcome["eval"]["parts"], outcome["eval"]["parts_start"]
    assert any("eval/accuracy" in report["signals"] for report in reports)
    assert runs == [(reports, outcome)] * 2


def test_a_trial_does_not_begin_with_a_reward_that_breaks_its_contract_unless_it_may(
    tiny: Tiny, tmp_path: Path
) -> None:
    path = written(tmp_path, "def f(row, completion):\n    return float(completion.isdigit())\n")
    with pytest.raises(ConfigError, match=r"another row's answer is wrong: failed: .*; mend the reward, or set"):
        Trial(tiny(f"task.reward={path}:f"))
    trial = Trial(tiny(f"task.reward={path}:f", "task.reward_check=warn"))
    assert "another row's answer is wrong: failed" in trial.receipt().warnings[0]
    trial.close()


def test_a_trial_goes_on_only_with_the_reward_it_began_with(tiny: Tiny, tmp_path: Path) -> None:
    """Also where nobody wrote down its hash beforehand."""
    path = written(tmp_path, EXACT)
    config = tiny(f"task.reward={path}:f")
    first = Trial(config)
    state = first.state_dict()
    first.close()
    path.write_text(EXACT + "# changed\n")
    again = Trial(config)
    with pytest.raises(ConfigError, match="the file of its reward has changed"):
        again.load_state_dict(state)
    again.close()


def test_a_trial_goes_on_only_with_the_rows_it_began_with(tiny: Tiny, tmp_path: Path) -> None:
    def fingerprint(*rows: dict[str, Any]) -> str:
        path = written(tmp_path, "\n".join(map(json.dumps, rows)), "q.jsonl")
        return build_task(TaskConfig(name="trl", path=(str(path),), reward=("trl.rewards:f",))).fingerprint()

    rows = [{"prompt": f"{n}?", "solution": "1", "tests": [n]} for n in range(60)]
    began = fingerprint(*rows)
    assert fingerprint(*rows[::-1]) == began
    assert fingerprint(*rows[:-1], {**rows[-1], "tests": []}) != began
    trial = Trial(tiny())
    state = trial.state_dict()
    state["progress"]["rows"] = began
    with pytest.raises(ConfigError, match="its rows are not those that this trial began with"):
        trial.load_state_dict(state)
    trial.close()


@pytest.mark.parametrize(("settings", "right"), [({}, False), ({"correct_at": 0.5}, True)])
def test_what_is_said_of_a_score_goes_before_acc(settings: dict[str, Any], right: bool, tmp_path: Path) -> None:
    rows = [{"data_source": "s", "prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(60)]
    lines = [json.dumps({**row, "reward_model": {"ground_truth": "1"}, "extra_info": None}) for row in rows]
    path = written(tmp_path, "\n".join(lines), "q.jsonl")
    source = f"{written(tmp_path, CONVENTIONS)}:other"
    task = build_task(TaskConfig(name="verl", path=(str(path),), reward=(source,), **settings))
    assert isinstance(task.foreign, ForeignReward)
    opened.append(task.foreign)
    question = task.held_out("selection", 1)[0]
    assert task.scores([Answer(question=question, text="1")])[0].correct is right


def test_from_which_mark_on_an_answer_is_right_can_be_said(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "def questions(split):\n    return [{'prompt': f'{split}{n}', 'answer': str(n)} for n in range(9)]\n"
        "def reward(row, completion):\n    return 0.5 * (completion == row['answer'])\n",
    )
    half, whole = (build_task(TaskConfig(name="python", path=str(path), correct_at=at)) for at in (0.5, 1.0))  # type: ignore[arg-type]
    for task, right in ((half, True), (whole, False)):
        assert isinstance(task.foreign, ForeignReward)
        opened.append(task.foreign)
        question = task.held_out("selection", 1)[0]
        assert task.scores([Answer(question=question, text=question.answer)])[0].correct is right


# --- in a sweep -------------------------------------------------------------------------------------------------------


def sweep(tmp_path: Path, *overrides: str) -> StudyConfig:
    return study_config(
        SweepOptions(workload="tiny", name="s", store=str(tmp_path / "runs"), overrides=list(overrides), trials=3)
    )


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "cache_folder", lambda: tmp_path / "cache")


def test_every_arm_of_a_sweep_has_the_hash_of_its_reward(tmp_path: Path) -> None:
    path = written(tmp_path, EXACT)
    study = sweep(tmp_path, f"task.reward={path}:f")
    arms = fixed_arms(study)
    search = RinSearch(study, arms)
    path.write_text(EXACT + "# changed since the sweep began\n")
    drawn = [search.suggest(str(number)) for number in range(3)]
    sha256 = hashlib.sha256(EXACT.encode()).hexdigest()
    assert [arm.config.task.reward_sha256 for arm in search.arms] == [(sha256,)] * 3
    assert all(one["config"]["task"]["reward_sha256"] == [sha256] for one in drawn if isinstance(one, dict))
    with pytest.raises(ConfigError, match="its file has changed"):
        check_sources(study, arms)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("from_sweep", [{}, {"name": "s-confirm", "parent": "s"}], ids=["its own", "its parent's"])
def test_a_reward_goes_along_with_its_sweep_to_a_machine_that_does_not_have_it(
    from_sweep: dict[str, str], tmp_path: Path
) -> None:
    path = written(tmp_path, EXACT)
    study = sweep(tmp_path, f"task.reward={path}:f")
    arms = fixed_arms(study)
    ship(study, arms, tmp_path / "job")
    path.unlink()
    with pytest.raises(ConfigError, match=r"reward\.py cannot be read"):
        check_sources(study, arms)
    there = study.model_copy(update={"store": str(tmp_path / "job"), **from_sweep})
    bring_rewards(there, arms)
    check_sources(study, arms)
    keep_rewards(study, arms)  # from the copy that came with the job, into the sweep's own store
    [kept] = (tmp_path / "runs" / "s" / "code").glob("*/*")
    assert kept.read_text() == EXACT
    task = build_task(arms[0].config.task)
    assert isinstance(task.foreign, ForeignReward)
    opened.append(task.foreign)
    assert task.foreign(ANSWERS)[0] == {"f": 1.0}


@pytest.mark.usefixtures("elsewhere")
def test_a_trial_on_another_node_brings_its_reward_from_the_store(tmp_path: Path, tiny: Tiny) -> None:
    path = written(tmp_path, EXACT)
    config = pinned(tiny(f"task.reward={path}:f", "grpo.steps=1", "noise.num_stages=1"))
    code.keep(config.task, Folder(str(tmp_path / "runs" / "s" / "code")))
    path.unlink()
    worker = TrialWorker(Folder(str(tmp_path / "runs" / "s" / "trials" / "control-0")), config)
    _, outcome = worker.step()
    assert outcome is not None
    assert outcome.outcome == "completed"
    worker.leave()


# --- rin doctor -------------------------------------------------------------------------------------------------------


def test_the_doctor_checks_a_task_and_its_reward(tmp_path: Path) -> None:
    good = examine_task("addition", [f"task.reward={written(tmp_path, EXACT)}:f"])
    assert good.good
    assert "holds       known answers are right: 8 rows, as '" in "\n".join(good.lines)
    assert good.lines[-1].endswith(hashlib.sha256(EXACT.encode()).hexdigest())
    always = written(tmp_path, "def f(row, completion):\n    return 1.0\n")
    bad = examine_task("addition", [f"task.reward={always}:f"])
    assert not bad.good
    assert "failed      an empty answer is wrong: " in "\n".join(bad.lines)
    assert examine_task("addition", [f"task.reward={always}:f", "task.reward_check=warn"]).good
    with pytest.raises(ConfigError, match="--set seed: rin doctor --task takes settings of the task alone"):
        examine_task("addition", ["seed=3"])
