"""What survives: sweeps on the workload `tiny` that are killed, starved and frozen at random moments, and resumed.

    python -m tests.benchmarks.faults                 everything, hours on two cores; writes docs/faults.md
    python -m tests.benchmarks.faults driver disk     some faults

The page is written after each sweep. A row that was cut off before it had its moments goes on, a full one is remade.

Each sweep suffers several faults of one kind, one after the other, so that what a fault leaves behind meets the next
one. At the end its records are compared with the plan (trials expected, found, twice, lost, still open in MLflow) and
every trial, number by number, with `run_trial` of the same configuration in a plain loop, which knows neither Ray nor
checkpoints. Moments are uniform between the sweep's first sign of life and its end, from a fixed seed.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from search.arms import Arm, read_arms, trial_config
from search.mirror import send_missing
from search.store import StudyConfig, load_study_config
from search.told import with_four_digits
from tests.benchmarks.bench import DOCS, RIN
from tests.real_mlflow import mlflow_server, runs
from trainable.trial import Trial

SETTINGS = ("grpo.steps=12", "eval.questions=32", "eval.every=4", "task.digits=1", "noise.num_stages=4")
LONG = 120  # steps of a trial that is to be in work when it is struck
TRIALS = 4
ROWS = DOCS / "faults.json"
FAULTS_PER_SWEEP = 5
DEADLINE = 600.0  # seconds until a process counts as stuck

# Frozen by the harness: the first rollout that finds the file takes it away and waits for ever.
FREEZE = """
import os, sys, time, importlib.abc, importlib.util

class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "trainable.engines.backend":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            generate = module.generate
            def freezing(*arguments, **options):
                try:
                    os.remove(os.environ["RIN_FREEZE"])
                except OSError:
                    return generate(*arguments, **options)
                time.sleep(10_000)
            module.generate = freezing
        spec.loader.exec_module = exec_module
        return spec

if "RIN_FREEZE" in os.environ:
    sys.meta_path.insert(0, _Finder())
"""


@dataclass(slots=True)
class Tally:
    """What became of the sweeps of one fault."""

    faults: int = 0
    sweeps: int = 0
    resumes: int = 0
    expected: int = 0
    found: int = 0
    twice: int = 0
    lost: int = 0
    unclosed: int = 0
    other_numbers: int = 0
    seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counted: str = ""
    """The day of its last sweep; empty: before MLflow became a place that is only written to."""


@dataclass(slots=True)
class Sweep:
    """One sweep under fire."""

    name: str
    store: Path
    draw: random.Random
    tally: Tally
    tracking: str | None = None
    more: tuple[str, ...] = ()
    address: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    strikes: int = FAULTS_PER_SWEEP
    """Of a fault that strikes several times in one run."""
    latest: float = 5.0
    """Seconds after the first sign of life by which its driver is struck."""

    @property
    def folder(self) -> Path:
        return self.store / self.name

    def options(self) -> list[str]:
        given = {"--store": str(self.store), "--tracking-uri": self.tracking, "--address": self.address}
        return [part for option, value in given.items() if value for part in (option, value)]

    def start(self, read: bool = False) -> subprocess.Popen[str]:
        """A new sweep, or its continuation; `read`: what it says is to be read."""
        if (self.folder / "study.json").exists():
            self.tally.resumes += 1
            command = ["resume", self.name, *self.options()]
        else:
            command = [
                "sweep",
                "--workload",
                "tiny",
                "--no-confirm",
                "--searcher",
                "random",
                "--trials",
                str(TRIALS),
                "--name",
                self.name,
            ]
            own = {word.partition("=")[0] for word in self.more}
            settings = (setting for setting in SETTINGS if setting.partition("=")[0] not in own)
            command += [*self.options(), *(part for setting in settings for part in ("--set", setting)), *self.more]
        log = (self.store / f"{self.name}.log").open("a")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        return subprocess.Popen(
            [str(RIN), *command],
            stdout=subprocess.PIPE if read else log,
            stderr=log,
            text=True,
            start_new_session=True,
            env=environment,
        )

    def outcomes(self) -> int:
        return len(list(self.folder.glob("trials/*/outcome.json")))

    @property
    def in_work(self) -> bool:
        """Whether a trial has no outcome yet."""
        return self.outcomes() < TRIALS

    def attempts(self) -> int:
        return len(list(self.folder.glob("trials/*/attempt-*.json")))

    def wait_for_life(self, running: subprocess.Popen[str]) -> None:
        """Until a trial's process has begun in this session, or the sweep has ended."""
        before = self.attempts()
        until = time.monotonic() + DEADLINE
        while running.poll() is None and self.attempts() == before:
            assert time.monotonic() < until, "nothing happens"
            time.sleep(0.05)

    def finish(self) -> None:
        """Resume until every trial has its outcome and the sweep has ended well; twice must be enough. A finished sweep
        is resumed too: it may have runs to close."""
        for _ in range(3):
            if self.start().wait(DEADLINE) == 0 and not self.in_work:
                return
        self.tally.notes.append(f"{self.name}: not finished after three resumes")


def actors(running: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes that work on trials."""
    return [process for process in psutil.process_iter() if _is_trial(process, running.pid)]


# --- faults: each is a function of a running sweep that waits for its moment and strikes ------------------------------


def kill_driver(sweep: Sweep) -> None:
    running = sweep.start()
    sweep.wait_for_life(running)
    time.sleep(sweep.draw.uniform(0, sweep.latest))
    if running.poll() is None:
        os.kill(running.pid, signal.SIGKILL)
    running.wait()
    _wait_until_gone(running.pid)
    sweep.tally.faults += sweep.in_work


def interrupt(*signals: int, group: bool = False) -> Callable[[Sweep], None]:
    """`group`: to all processes of the sweep's group, as a batch system or a terminal that closes does it."""

    def strike(sweep: Sweep) -> None:
        running = sweep.start()
        sweep.wait_for_life(running)
        time.sleep(sweep.draw.uniform(0, sweep.latest))
        _end(sweep, running, signals, os.killpg if group else os.kill)

    return strike


def _end(
    sweep: Sweep, running: subprocess.Popen[str], signals: Sequence[int], send: Callable[[int, int], None]
) -> None:
    """Counts where work was cut off: a sweep that had done all of it was not struck."""
    struck, started = running.poll() is None, time.monotonic()
    for number in signals:
        if running.poll() is None:
            send(running.pid, number)
            time.sleep(0.3)
    running.wait(DEADLINE)
    if struck and sweep.in_work:
        sweep.tally.faults += 1
        sweep.tally.seconds.append(time.monotonic() - started)


def interrupt_start(sweep: Sweep) -> None:
    """While Ray starts: its first process is there, and no trial."""
    running, before = sweep.start(), sweep.attempts()
    until = time.monotonic() + DEADLINE
    while running.poll() is None and not _ray_starts(running.pid):
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.01)
    time.sleep(sweep.draw.uniform(0, 3))
    if sweep.attempts() > before:  # too late
        running.wait(DEADLINE)
    else:
        _end(sweep, running, [signal.SIGINT], os.killpg)


def close_pipe(sweep: Sweep) -> None:
    """`rin sweep | head`: whoever reads has enough at some moment."""
    running = sweep.start(read=True)
    assert running.stdout is not None
    sweep.wait_for_life(running)
    time.sleep(sweep.draw.uniform(0, 5))
    running.stdout.close()
    sweep.tally.faults += running.poll() is None and sweep.in_work
    if running.wait(DEADLINE) != 0 or sweep.in_work:
        sweep.tally.notes.append(f"{sweep.name}: a closed pipe ended the sweep with {running.returncode}")


def kill_actors(sweep: Sweep) -> None:
    """Several times in one run; a trial that is hit more often than it is tried again fails, and is finished by a
    resume."""
    running = sweep.start()
    for _ in range(sweep.strikes):
        time.sleep(sweep.draw.uniform(1, 8))
        kill_an_actor(sweep, running)
    running.wait(DEADLINE)


def kill_an_actor(sweep: Sweep, running: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while running.poll() is None and time.monotonic() < until:
        victims = actors(running)
        if victims:
            sweep.draw.choice(victims).kill()
            sweep.tally.faults += 1
            break
        time.sleep(0.1)


def damage_checkpoint(sweep: Sweep) -> None:
    """A killed driver, and then the newest checkpoint of a trial has a flipped byte or is cut short."""
    kill_driver(sweep)
    found = sorted(sweep.folder.glob("trials/*/checkpoint-*"), key=lambda path: path.stat().st_mtime)
    if not found:
        return
    file = found[-1] / sweep.draw.choice(["tensors.safetensors", "progress.json"])
    if not file.exists():
        return
    data = bytearray(file.read_bytes())
    if sweep.draw.random() < 0.5:
        data[sweep.draw.randrange(len(data))] ^= 0x40
    else:
        del data[sweep.draw.randrange(len(data)) :]
    file.write_bytes(bytes(data))


def fill_disk(sweep: Sweep) -> None:
    """The store's file system is full for some seconds."""
    running = sweep.start()
    sweep.wait_for_life(running)
    time.sleep(sweep.draw.uniform(0, 5))
    filler = sweep.store / "filler"
    try:
        with filler.open("wb") as file:
            while True:
                file.write(b"0" * 65536)
                file.flush()
    except OSError:
        sweep.tally.faults += 1
    time.sleep(sweep.draw.uniform(2, 6))
    filler.unlink(missing_ok=True)
    running.wait(DEADLINE)


def freeze(sweep: Sweep) -> None:
    """A rollout that never comes back; the limit of a phase is 5 seconds here."""
    running = sweep.start()
    sweep.wait_for_life(running)
    for _ in range(sweep.strikes):
        time.sleep(sweep.draw.uniform(0, 4))
        if running.poll() is None:
            freeze_a_rollout(sweep, running)
    running.wait(DEADLINE)


def prepare_freeze(sweep: Sweep) -> None:
    (sweep.store / "sitecustomize.py").write_text(FREEZE)
    sweep.environment = {"RIN_FREEZE": str(sweep.store / "freeze"), "PYTHONPATH": str(sweep.store)}
    sweep.more += ("--set", "hang_seconds=5")


def freeze_a_rollout(sweep: Sweep, running: subprocess.Popen[str]) -> None:
    file = Path(sweep.environment["RIN_FREEZE"])
    file.touch()
    until = time.monotonic() + 60
    while file.exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    sweep.tally.faults += not file.exists()


def second_driver(sweep: Sweep) -> None:
    """`rin resume` on a sweep that is running must be refused, and leave it alone."""
    running = sweep.start()
    sweep.wait_for_life(running)
    for _ in range(sweep.strikes):
        time.sleep(sweep.draw.uniform(0, 2))
        if running.poll() is None:
            command = [str(RIN), "resume", sweep.name, *sweep.options()]
            second = subprocess.run(command, capture_output=True, text=True, check=False)
            if running.poll() is None:
                if sweep.outcomes() == TRIALS:  # it was over, and the first is on its way out
                    break
                sweep.tally.faults += 1
                if second.returncode != 2 or "another process" not in second.stderr:
                    sweep.tally.notes.append(f"{sweep.name}: a second driver was not refused: {second.stderr[-200:]}")
    running.wait(DEADLINE)


def kill_mlflow(sweep: Sweep) -> None:
    """The tracking server dies and comes back, several times in one run."""
    with mlflow_server(sweep.store) as server:
        sweep.tracking = server.uri
        running = sweep.start()
        for _ in range(sweep.strikes):
            time.sleep(sweep.draw.uniform(1, 6))
            if running.poll() is None:
                sweep.tally.faults += 1
            server.kill()
            time.sleep(sweep.draw.uniform(1, 4))
            server.start()
        running.wait(DEADLINE)
        sweep.finish()
        check(sweep)


def kill_node(sweep: Sweep) -> None:
    """A Ray cluster of a head without CPUs and two nodes; a node dies, another one comes."""
    from tests.ray_nodes import head_node, kill_raylet, worker_node

    with ExitStack() as stack:
        place = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", dir="/tmp"))
        )  # sockets want a short path
        cluster = stack.enter_context(head_node(place, cpus=0))

        def new_node() -> subprocess.Popen[bytes]:
            folder = place / f"node{len(list(place.iterdir()))}"
            folder.mkdir()
            return stack.enter_context(worker_node(cluster, folder, cpus=1))

        nodes = [new_node(), new_node()]
        sweep.address = cluster.address
        sweep.environment |= cluster.environment
        running = sweep.start()
        sweep.wait_for_life(running)
        for _ in range(sweep.strikes):
            time.sleep(sweep.draw.uniform(1, 8))
            if running.poll() is None:
                number = sweep.draw.randrange(2)
                kill_raylet(nodes[number])
                sweep.tally.faults += 1
                nodes[number] = new_node()
        running.wait(DEADLINE)
        sweep.finish()
    sweep.address = None


# --- the comparison ---------------------------------------------------------------------------------------------------


def check(sweep: Sweep) -> None:
    """Counts in its tally."""
    config = load_study_config(str(sweep.store), sweep.name)
    config = config.model_copy(update={"tracking_uri": sweep.tracking or config.tracking_uri})
    tally = sweep.tally
    assert send_missing(config) == 0  # as the next resume, or the next look, would
    shown, arms = runs(config.tracking_uri, sweep.name), read_arms(config)
    keys = [(run.data.tags["arm"], int(run.data.tags["replicate"])) for run in shown]
    expected = {(arm, 0) for arm in ("control", *(f"c{number:02d}" for number in range(1, TRIALS)))}
    tally.sweeps += 1
    tally.expected += len(expected)
    tally.found += len(expected & set(keys))
    tally.twice += len(keys) - len(set(keys))
    tally.lost += len(expected - set(keys)) + len(expected - {(arm.name, k) for arm in arms for k in arm.results})
    over = [run.info.status != "RUNNING" and run.data.tags["status"] in ("completed", "collapsed") for run in shown]
    tally.unclosed += over.count(False)
    for arm in arms:
        wrong = _differences(sweep, config, arm, next((run for run in shown if run.data.tags["arm"] == arm.name), None))
        tally.other_numbers += bool(wrong)
        tally.notes += [f"{sweep.name} {arm.name}: {line}" for line in wrong[:2]]


_UNDISTURBED: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {}


def _differences(sweep: Sweep, config: StudyConfig, arm: Arm, run: Any) -> list[str]:
    settings = trial_config(config, arm, 0)
    key = settings.model_dump_json(exclude={"hang_seconds"})
    if key not in _UNDISTURBED:
        trial = Trial(settings)
        reports = []
        while not trial.done:
            reports.append(_plain(trial.step().signals))
        _UNDISTURBED[key] = reports, trial.outcome().as_tree()
    reports, outcome = _UNDISTURBED[key]
    tree = json.loads((sweep.folder / "trials" / f"{arm.name}-0" / "outcome.json").read_text())
    wrong = []
    if [_plain(report) for report in tree["reports"]] != [
        {**report, "rin/steps_done": step + 1.0} for step, report in enumerate(reports)
    ]:
        wrong.append("its steps have other numbers")
    for part in ("outcome", "rule", "step", "eval", "receipt", "alarms"):
        if json.dumps(tree["outcome"][part]) != json.dumps(outcome[part]):
            wrong.append(f"outcome.{part} differs")
    told = with_four_digits({"eval/accuracy": outcome["eval"]["accuracy"]})
    if run is not None and not told.items() <= run.data.metrics.items():
        wrong.append(f"MLflow has accuracy {run.data.metrics.get('eval/accuracy')}")
    return wrong


def _plain(report: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in report.items() if "/" in name and not name.startswith("perf/")}


# --- the harness ------------------------------------------------------------------------------------------------------


def _wait_until_gone(session: int) -> None:
    """A trial's process ends when it sees that its driver is gone; Ray's own helpers take a minute, and work on
    nothing."""
    until = time.monotonic() + 60
    while any(_is_trial(process, session) for process in psutil.process_iter()):
        assert time.monotonic() < until, "a trial outlives its driver"
        time.sleep(0.1)


def _ray_starts(driver: int) -> bool:
    processes = psutil.process_iter(["name", "ppid"])
    return any(process.info["name"] == "gcs_server" and process.info["ppid"] == driver for process in processes)


def _is_trial(process: psutil.Process, session: int) -> bool:
    try:
        return (
            os.getsid(process.pid) == session
            and re.match(r"ray::\w*Trainable", " ".join(process.cmdline())) is not None
        )
    except (OSError, psutil.Error):
        return False


@contextmanager
def new_store(fault: str) -> Iterator[Path]:
    """A folder; for a full disk a small file system of its own."""
    folder = Path(tempfile.mkdtemp(prefix=f"rin-{fault}-"))
    if fault == "disk":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        if fault == "disk":
            subprocess.run(
                ["umount", "-l", str(folder)], check=True
            )  # Ray's helpers hold its log files for a minute more
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    what: str
    strike: Callable[[Sweep], None]
    moments: int = 5
    per_sweep: int = FAULTS_PER_SWEEP
    """How often `strike` is called on one sweep; 1: it strikes `Sweep.strikes` times itself."""
    steps: int = 12
    """Of each trial: many where a strike is to find it in work."""


FAULTS: dict[str, Fault] = {
    "driver": Fault(what="SIGKILL of the driver", strike=kill_driver, moments=20, steps=LONG),
    "actor": Fault(what="SIGKILL of a trial's process", strike=kill_actors, moments=20, per_sweep=1),
    "ctrl-c": Fault(what="Ctrl-C", strike=interrupt(signal.SIGINT), steps=LONG),
    "ctrl-c-twice": Fault(what="Ctrl-C, twice", strike=interrupt(signal.SIGINT, signal.SIGINT), steps=LONG),
    "sigterm": Fault(what="SIGTERM", strike=interrupt(signal.SIGTERM), steps=LONG),
    "group": Fault(
        what="SIGTERM to the process group", strike=interrupt(signal.SIGTERM, group=True), moments=20, steps=LONG
    ),
    "hangup": Fault(what="SIGHUP", strike=interrupt(signal.SIGHUP, group=True), moments=20, steps=LONG),
    "starting": Fault(what="Ctrl-C while Ray starts", strike=interrupt_start, moments=20),
    "pipe": Fault(what="a closed pipe", strike=close_pipe, moments=20, per_sweep=1, steps=LONG),
    "checkpoint": Fault(what="SIGKILL and a damaged newest checkpoint", strike=damage_checkpoint, steps=LONG),
    "disk": Fault(what="a full disk for some seconds", strike=fill_disk),
    "hang": Fault(what="a rollout that never returns (limit 5 s)", strike=freeze, per_sweep=1),
    "second": Fault(what="a second driver", strike=second_driver, per_sweep=1, steps=60),
    "mlflow": Fault(what="SIGKILL of the MLflow server", strike=kill_mlflow, per_sweep=1),
    "node": Fault(what="SIGKILL of a Ray node", strike=kill_node, per_sweep=1),
}


def run_sweep(name: str, seed: int, tally: Tally, moments: int) -> None:
    """One more sweep of a fault, whose row has not had all its moments."""
    fault, number = FAULTS[name], tally.sweeps
    with new_store(name) as store:
        draw = random.Random(f"{seed} {name} {number}")
        strikes = min(FAULTS_PER_SWEEP, moments - tally.faults)
        sweep = Sweep(f"{name}{number}", store, draw, tally, strikes=strikes)
        sweep.more = ("--set", f"grpo.steps={fault.steps}")
        if name == "second":
            sweep.strikes = FAULTS_PER_SWEEP  # the first may come too late, and a refusal disturbs nothing
        if name == "hang":
            prepare_freeze(sweep)
        for _ in range(fault.per_sweep):
            if sweep.in_work and tally.faults < moments:
                fault.strike(sweep)
        if name != "mlflow":
            sweep.finish()
            check(sweep)
    tally.counted = f"{date.today()}"


def table(results: dict[str, Tally]) -> list[str]:
    lines = [
        "| fault | moments | sweeps | resumes | trials expected | found | twice | lost | unclosed | other numbers "
        "| counted |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, tally in results.items():
        numbers = (
            tally.faults,
            tally.sweeps,
            tally.resumes,
            tally.expected,
            tally.found,
            tally.twice,
            tally.lost,
            tally.unclosed,
        )
        cells = (FAULTS[name].what, *numbers, tally.other_numbers, tally.counted or "earlier")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    waits = {name: tally.seconds for name, tally in results.items() if tally.seconds}
    lines += [
        "",
        *(f"- {FAULTS[name].what}: the sweep had ended after at most {max(waits[name]):.1f} s" for name in waits),
    ]
    lines += [f"- {note}" for tally in results.values() for note in tally.notes]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], help="default: all")
    parser.add_argument("--moments", type=int, help="of each fault; default: 20 or 5")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGHUP):  # what this process was started to ignore, a sweep would ignore too
        signal.signal(number, signal.SIG_DFL)
    for name in arguments.faults or FAULTS:
        moments = arguments.moments or FAULTS[name].moments
        tally = read_rows().get(name, Tally())
        if tally.faults >= moments:
            tally = Tally()
        while tally.faults < moments and tally.sweeps < 3 * moments:
            run_sweep(name, arguments.seed, tally, moments)
            write_rows({**read_rows(), name: tally})
            print("\n".join(table({name: tally})), flush=True)


def read_rows() -> dict[str, Tally]:
    return {name: Tally(**tree) for name, tree in json.loads(ROWS.read_text()).items()} if ROWS.exists() else {}


def write_rows(rows: Mapping[str, Tally]) -> None:
    """The numbers, and the page that is made of them."""
    ROWS.write_text(json.dumps({name: asdict(tally) for name, tally in rows.items()}, indent=1))
    text = [
        "# What survives",
        "",
        "Sweeps of 4 trials on the workload `tiny`, hurt at random moments and resumed until they had ended",
        "(`python -m tests.benchmarks.faults`; each sweep takes several faults of one kind). A moment counts where",
        "work was under way. *Twice*: recorded more than once; *lost*: no record or no outcome; *unclosed*: a run",
        "left open in MLflow; *other numbers*: trials whose steps, evaluation or receipt differ in any bit from the",
        "same configuration run in a plain loop.",
        "",
        *table({name: rows[name] for name in FAULTS if name in rows}),
    ]
    if not all(tally.counted for tally in rows.values()):
        text += [
            "",
            "*earlier*: before MLflow became a place that is only written to, and whether or not work was under way;",
            "tests run these strikes since.",
        ]
    (DOCS / "faults.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
