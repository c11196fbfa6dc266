"""Resources of a trial, the Ray that carries it, and the examples in docs/cluster; with a real Ray cluster on this
machine."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
from ray._private import services
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start, symmetric_run

from search.cluster import check_fits, connected, resources
from search.execution import trial_environment
from search.ray_internals import in_a_group_of_its_own
from search.study import resume_study, run_study
from spaces.config import BaseRecipe
from spaces.errors import ConfigError
from spaces.reading import parse_yaml
from tests.processes import program
from tests.ray_nodes import head_node, kill_raylet, short_folder, worker_node
from tests.real_mlflow import runs
from tests.written_sweeps import make_arm, study, write_sweep
from trainable.cores import usable_cpus
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import read_outcome
from trainable.policy.embedded import ensure_base
from trainable.trial import run_trial

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "cluster"
RIN = [sys.executable, "-c", "from dashboards.cli import main; main()"]


# What a trial asks of a node


@pytest.mark.parametrize(
    ("workload", "ranks", "cpus", "gpus", "processes", "bundle"),
    [
        ("tiny", 1, None, None, 1, {"CPU": 1.0}),
        ("tiny", 1, 3, None, 1, {"CPU": 3.0}),
        ("tiny", 1, None, 0.25, 1, {"CPU": 1.0, "GPU": 0.25}),
        ("tiny", 2, 3, None, 2, {"CPU": 3.0}),
        ("tiny", 4, None, 4.0, 4, {"CPU": 1.0, "GPU": 1.0}),
        ("qwen2.5-1.5b-gsm8k", 1, None, None, 1, {"CPU": 8.0, "GPU": 1.0}),
        ("qwen2.5-1.5b-gsm8k", 1, 2, 0.5, 1, {"CPU": 2.0, "GPU": 0.5}),
        ("qwen2.5-1.5b-gsm8k", 1, None, 0, 1, {"CPU": 8.0}),
        ("qwen2.5-1.5b-gsm8k", 4, None, None, 4, {"CPU": 8.0, "GPU": 1.0}),
        ("qwen2.5-1.5b-gsm8k", 4, None, 2.0, 2, {"CPU": 8.0, "GPU": 1.0}),  # it goes on where there are fewer
        ("qwen2.5-1.5b-gsm8k", 4, None, 0.5, 1, {"CPU": 8.0, "GPU": 0.5}),
        ("qwen2.5-1.5b-gsm8k", 4, None, 0, 4, {"CPU": 8.0}),
    ],
)
def test_a_trial_takes_what_its_workload_names_for_each_of_its_ranks_unless_told_otherwise(
    tmp_path: Path,
    workload: str,
    ranks: int,
    cpus: int | None,
    gpus: float | None,
    processes: int,
    bundle: dict[str, float],
) -> None:
    settings = {"parallel": {"ranks": ranks}}
    request = resources(study(tmp_path, workload=workload, settings=settings, cpus=cpus, gpus=gpus))
    assert request.bundles == [bundle] * processes
    assert request.head_cpus == bundle["CPU"]
    assert request.strategy == ("PACK" if processes == 1 else "STRICT_PACK")


def node(alive: bool = True, **offers: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": offers}


@pytest.mark.parametrize(
    ("nodes", "fits"),
    [
        ([node(CPU=2)], False),
        ([node(CPU=2, GPU=1)], True),
        ([node(CPU=2), node(CPU=1, GPU=1)], False),  # 2 CPUs and 1 GPU, but never on one node
        ([node(CPU=1, GPU=1), node(CPU=4, GPU=0.5)], True),
        ([node(CPU=8, GPU=8, alive=False)], False),
        ([], False),
    ],
)
def test_a_trial_that_no_single_node_can_hold_is_an_error_and_not_an_endless_wait(
    tmp_path: Path, nodes: list[dict[str, Any]], fits: bool
) -> None:
    request = resources(study(tmp_path, workload="tiny", cpus=2, gpus=0.5))
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=re.escape("2 CPU and 0.5 GPU")):
        check_fits(request, nodes)


def test_all_ranks_of_a_trial_have_to_fit_on_one_node_and_what_they_lack_is_said(tmp_path: Path) -> None:
    request = resources(study(tmp_path, settings={"parallel": {"ranks": 4}}, gpus=4.0))
    check_fits(request, [node(CPU=4, GPU=4)])
    said = "a trial asks for 4 CPU and 4 GPU for its 4 ranks, which no node has (at most 8 CPU, 2 GPU)"
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_fits(request, [node(CPU=8, GPU=2), node(CPU=8, GPU=2)])


@pytest.mark.parametrize(
    ("files", "own", "cores"),
    [
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"cpu.max": "max 100000", "job/cpu.max": "200000 100000", "job/x/cpu.max": "max 100000"}, "0::/job/x", 2),
        ({"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}, "4:cpu:/job", 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n3:memory:/", None),
        ({}, "", None),
    ],
)
def test_as_many_cores_as_the_affinity_and_the_control_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], own: str, cores: float | None
) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    for here in ({0}, {0, 1, 2}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, here=here: here)
        expected = max(1, int(min(len(here), cores or 99)))
        assert usable_cpus(tmp_path / "cgroup", tmp_path / "own") == expected


def test_a_trial_without_gpus_sees_none_also_on_a_machine_that_has_one(tmp_path: Path) -> None:
    plain = trial_environment(study(tmp_path))
    assert (plain["CUDA_VISIBLE_DEVICES"], plain["HIP_VISIBLE_DEVICES"]) == ("", "")
    assert "CUDA_VISIBLE_DEVICES" not in trial_environment(study(tmp_path, gpus=0.5))


@pytest.mark.parametrize(
    ("changes", "said"), [({"gpus": 1.0}, "1 CPU and 1 GPU, which no node has"), ({"address": "127.0.0.1:1"}, "no Ray")]
)
def test_a_place_that_cannot_run_a_trial_leaves_nothing_and_the_name_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    """Neither a folder nor a claim in the tracking; a resume leaves the sweep as it was."""
    monkeypatch.setattr(
        "search.start.built_beside", lambda config, trials, progress: contextlib.nullcontext(lambda: None)
    )
    monkeypatch.setattr("search.cluster.ray.init", lambda *args, **named: None)
    monkeypatch.setattr("search.execution.ray.nodes", lambda: [node(CPU=2)])
    with pytest.raises(ConfigError, match=said):
        run_study(study(tmp_path, **changes), lambda event: None)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    begun = study(tmp_path, trials=3, replicates=1)
    write_sweep(begun, [make_arm(begun, "control")], {})
    before = (tmp_path / "s" / "study.json").read_text()
    with pytest.raises(ConfigError, match=said):
        resume_study(begun.model_copy(update=changes), lambda event: None)
    assert (tmp_path / "s" / "study.json").read_text() == before


# Who is let in


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "no-such-host.invalid:6379"])
def test_a_cluster_that_is_not_there_is_an_error_at_once(address: str) -> None:
    """Ray itself goes on trying for more than ten minutes."""
    with pytest.raises(ConfigError, match="no Ray cluster answers there"), connected(address, {}):
        pass


def test_a_password_does_not_become_the_name_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray keeps the command line of every process that drives a cluster."""
    monkeypatch.setattr("sys.argv", ["rin", "sweep", "--tracking-uri", "http://me:canary-4711@host:5000"])
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught, connected("127.0.0.1:1", {}):
        pass
    assert "canary-4711" not in str(caught.value)


# A real cluster


@pytest.fixture
def short() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.mark.slow
def test_a_killed_node_costs_no_trial_and_changes_no_number(short: Path, tmp_path: Path) -> None:
    """Three raylets, tokens on: a head without CPUs, a node that dies in the middle of a trial, and one that comes
    instead."""
    trials = tmp_path / "s" / "trials"
    arguments = ["--workload", "tiny", "--trials", "2", "--no-confirm", "--name", "s", "--store", str(tmp_path)]
    arguments += ["--set", "grpo.steps=150", "--set", "eval.questions=64", "--set", "collapse.mode=off"]
    with head_node(short, cpus=0) as running, worker_node(running, short, cpus=1) as first:
        with program(
            [*RIN, "sweep", *arguments, "--address", running.address],
            env=dict(running.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as sweep:
            deadline = time.monotonic() + 120
            while not any(path.parent.name > "checkpoint-000003" for path in trials.glob("*/*/progress.json")):
                assert sweep.poll() is None, sweep.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.05)
            kill_raylet(first)
            assert not list(trials.glob("*/outcome.json")), "the first trial was under way"
            with worker_node(running, short, cpus=2):
                said, _ = sweep.communicate(timeout=300)
        assert sweep.returncode == 0, said

    shown = [
        (run.data.tags["arm"], run.data.tags["status"], run.info.status)
        for run in runs(f"sqlite:///{tmp_path}/mlflow.db", "s")
    ]
    assert shown == [("control", "completed", "FINISHED"), ("c01", "completed", "FINISHED")]
    assert {folder.name: len(list(folder.glob("attempt-*.json"))) for folder in trials.iterdir()} == {
        "control-0": 2,
        "c01-0": 1,
    }
    killed, went_on = (json.loads((trials / "control-0" / f"attempt-00{number}.json").read_text()) for number in (1, 2))
    assert (killed["ended"], went_on["ended"]) == ("", "outcome")
    assert went_on["first_step"] > 0, "it did not begin again"
    reports = json.loads((trials / "control-0" / "outcome.json").read_text())["reports"]
    outcome = read_outcome(Folder(str(trials / "control-0")))
    assert outcome is not None
    undisturbed = list(run_trial(outcome.config))
    for name in ("grpo/reward", "gen/entropy", "grpo/grad_norm"):
        assert [report[name] for report in reports] == [report.signals[name] for report in undisturbed]


# The examples


def test_the_ray_up_example_fits_ray_s_own_schema() -> None:
    config = parse_yaml((EXAMPLES / "ray-cluster.yaml").read_text(), "ray-cluster.yaml")
    validate_config(prepare_config(config))
    config["available_node_types"]["gpu"]["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config))


def test_the_kuberay_example_fits_the_schema_and_waits_longer_than_its_hook(tmp_path: Path) -> None:
    schema = json.loads((ROOT / "tests" / "data" / "rayjob_schema.json").read_text())
    job = parse_yaml((EXAMPLES / "rayjob.yaml").read_text(), "rayjob.yaml")
    jsonschema.validate(job, schema)
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    hook = head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert head["terminationGracePeriodSeconds"] > int(re.search(r"timeout (\d+)", hook[-1])[1])  # type: ignore[index]
    for worker in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
        trial = resources(study(tmp_path, workload="qwen2.5-1.5b-gsm8k")).bundles[0]
        assert (float(limits["cpu"]), float(limits["nvidia.com/gpu"])) == (trial["CPU"], trial["GPU"])
    job["spec"]["rayClusterSpecs"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, schema)


@pytest.mark.slow
def test_the_kuberay_hook_ends_the_sweep_and_nothing_else(tmp_path: Path) -> None:
    """The very command of the example, on a process that is called as rin is, and on itself."""
    job = parse_yaml((EXAMPLES / "rayjob.yaml").read_text(), "rayjob.yaml")
    hook = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"][
        "exec"
    ]["command"]
    place = f"{tmp_path.name}/bin/rin "  # of this test alone: other sweeps of this machine go on
    hook = [word.replace("[b]in/rin ", f"{tmp_path.name}/[b]in/rin ") for word in hook]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "rin").write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(7)))\n"
        "print('up', flush=True)\ntime.sleep(60)\n"
    )
    with program([sys.executable, str(tmp_path / "bin" / "rin"), "sweep"], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        assert place in " ".join(Path(f"/proc/{running.pid}/cmdline").read_text().split("\0"))
        subprocess.run(hook, timeout=30, check=True)
        assert running.wait(10) == 7


@pytest.mark.slow
def test_the_slurm_example_hands_the_signal_to_the_sweep_and_asks_to_be_resumed(tmp_path: Path) -> None:
    """The script itself, with Slurm and Ray played by six shell scripts: TERM reaches rin, which gets its time, then
    requeue."""
    tools = tmp_path / "rin-search" / ".venv" / "bin"
    tools.mkdir(parents=True)
    played = {
        "activate": f'export PATH="{tools}:$PATH"',
        "scontrol": f'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "$@" >>"{tmp_path}/requeued"; fi',
        "getent": "echo '10.0.0.1 STREAM n1'",
        "srun": 'shift; exec "$@"',
        "ray": (
            f'[ "$1" = symmetric-run ] || exit 0; echo "$@" >>"{tmp_path}/ray"; '
            'while [ "$1" != -- ]; do shift; done; shift; "$@"'
        ),
        "rin": f'trap \'sleep 1; echo checkpointed >>"{tmp_path}/rin"; exit 1\' TERM; echo "$@" >>"{tmp_path}/rin"; '
        "while :; do sleep 0.1; done",
    }
    for name, text in played.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    script = tmp_path / "slurm.sbatch"
    script.write_text((EXAMPLES / "slurm.sbatch").read_text().replace("/shared", str(tmp_path)))
    subprocess.run(["bash", "-n", str(script)], check=True)

    def run_and_end() -> list[str]:
        (tmp_path / "rin").unlink(missing_ok=True)
        environment = {**os.environ, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "17"}
        with program(["bash", str(script)], env=environment, start_new_session=True, stderr=subprocess.PIPE) as job:
            deadline = time.monotonic() + 30
            while not (tmp_path / "rin").exists() and job.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            job.send_signal(signal.SIGTERM)
            job.wait(30)
        return (tmp_path / "rin").read_text().splitlines()

    first = run_and_end()
    assert first[0].startswith("sweep sigma --name sigma-1")
    assert first[1:] == ["checkpointed"]
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    assert "--address 10.0.0.1:6379 --min-nodes 2" in (tmp_path / "ray").read_text()
    (tmp_path / "runs" / "sigma-1").mkdir(parents=True)
    (tmp_path / "runs" / "sigma-1" / "study.json").touch()
    assert run_and_end()[0] == f"resume sigma-1 --store {tmp_path}/runs --address auto"


def rin_lines() -> list[str]:
    """Every rin command of the examples, as a shell would see it."""
    found = []
    for path in sorted(EXAMPLES.iterdir()):
        text = path.read_text().replace("\\\n", " ").replace('"$NAME"', "NAME").replace('"$STORE"', "/STORE")
        text = re.sub(r"(rin=\([^)]*)\n\s*", r"\1 ", text)  # a bash array over two lines
        if path.suffix == ".yaml":
            text = re.sub(r"\n    (?=\S)", " ", text)  # a folded scalar
        found += re.findall(r"(?:^|[`(; ])(rin (?:sweep|resume|status|export|ui)\b[^`\n;)]*)", text, re.MULTILINE)
    return found


def test_the_examples_hold_command_lines() -> None:
    assert len(rin_lines()) >= 9


@pytest.mark.parametrize("line", sorted(set(rin_lines())))
def test_every_rin_line_of_the_examples_is_one_that_rin_reads(line: str) -> None:
    from dashboards.cli import app

    words = [word for word in shlex.split(line.split("#")[0]) if word != "..."]
    command = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    command.make_context(words[1], words[2:])  # parses and checks; runs nothing


def test_every_ray_option_of_the_examples_is_one_that_ray_knows() -> None:
    known = {option for command in (start, symmetric_run) for parameter in command.params for option in parameter.opts}
    used = set()
    for path in EXAMPLES.iterdir():
        for line in path.read_text().replace("\\\n", " ").splitlines():
            called = re.search(r"ray (?:symmetric-run|start)\b(.*?)(?: -- |$)", line)
            used |= (
                set(re.findall(r"(?<!\S)(--[a-z-]+)", called[1]))
                if called and not line.lstrip().startswith(("#", "-" * 3))
                else set()
            )
    assert {"--address", "--min-nodes", "--num-cpus", "--head", "--dashboard-host"} <= used
    assert used <= known


# A machine that is not as it should be


def test_a_temporary_folder_too_long_for_ray_s_sockets_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **named: object) -> None:
        assert args == ("local",)
        raise OSError("AF_UNIX path length cannot exceed 107 bytes: /tmp/...")

    monkeypatch.setattr("search.cluster.ray.init", refuse)
    with pytest.raises(ConfigError, match=r"TMPDIR=.*AF_UNIX path length .*; set TMPDIR"), connected(None, {}):
        pass


def test_without_an_address_a_sweep_has_a_ray_of_its_own_with_the_cores_that_it_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever RAY_ADDRESS names, and whatever Ray runs on this machine already."""
    begun: list[tuple[Any, ...]] = []
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("search.cluster.usable_cpus", lambda: 3)
    monkeypatch.setattr("search.cluster.ray.init", lambda *given, num_cpus, **named: begun.append((*given, num_cpus)))
    monkeypatch.setattr("search.cluster.ray.shutdown", lambda: begun.append(("ended",)))
    with connected(None, {}):
        assert begun == [("local", 3)]
    assert begun[1:] == [("ended",)]


def test_ray_s_processes_are_out_of_reach_of_signals_to_the_group() -> None:
    with in_a_group_of_its_own():
        apart = services.ConsolePopen(["sleep", "60"])
    beside = services.ConsolePopen(["sleep", "60"])
    groups = [os.getpgid(process.pid) for process in (apart, beside)]
    for process in (apart, beside):
        process.kill()
        process.wait()
    assert groups == [apart.pid, os.getpgid(0)]


def test_a_home_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"RIN_CACHE=.*/file/cache: cannot be made \(Not a directory\)"):
        ensure_base(BaseRecipe(depth=1))
