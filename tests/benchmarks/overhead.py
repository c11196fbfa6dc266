"""What the sweep itself costs: beside a plain loop over the same trials, and in memory over many trials.

    python -m tests.benchmarks.overhead               all, about 20 minutes on two quiet cores; writes docs/overhead.md
    python -m tests.benchmarks.overhead loop          16 embedded trials, of one seed and of 16: sweep against two loops
    python -m tests.benchmarks.overhead memory        1,000 trials of `tiny`: the driver's memory
    python -m tests.benchmarks.overhead cores         16 embedded trials on one core and on two
    python -m tests.benchmarks.overhead footprint     the default sweep: memory of all its processes together
    python -m tests.benchmarks.overhead shared        an embedded trial with and without a beginning to take over

The plain loop is as bare as it gets: two processes, each with half of the sweep's own configurations, `run_trial` one
after the other, one thread each; no Ray, no MLflow, no checkpoints. Both are timed from process start to process end.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from search import delivery, tracking
from search.arms import planned, read_arms, trial_config
from search.lineup import base_tree
from search.store import StudyConfig, default_tracking_uri
from search.study import run_study
from spaces.config import TrialConfig
from spaces.library import SPACES
from spaces.reading import read_config
from spaces.workloads import TRIAL_ENVIRONMENT
from tests.benchmarks.bench import DOCS
from trainable.disk.folder import Folder

SPAWN = multiprocessing.get_context("spawn")


def study(store: Path, **changes: Any) -> StudyConfig:
    places = {"store": str(store), "tracking_uri": default_tracking_uri(str(store))}
    return StudyConfig(**{"name": "s", "space": SPACES["sigma"], "searcher": "random", **places, **changes})


# --- beside a plain loop ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Meter:
    """Seconds in MLflow: those that Tune's own thread waits, and the processor time of the thread that delivers."""

    waiting: float = 0.0
    delivering: float = 0.0


def _measured(meter: _Meter) -> None:
    """Put clocks around tracking, in this process."""

    def clocked(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                meter.waiting += time.perf_counter() - started

        return run

    for name in ("begin", "report", "retry", "end"):
        setattr(tracking.Tracker, name, clocked(getattr(tracking.Tracker, name)))
    send = delivery.MlflowWriter.send

    def sending(self: Any, *arguments: Any) -> Any:
        started = time.thread_time()
        try:
            return send(self, *arguments)
        finally:
            meter.delivering += time.thread_time() - started

    delivery.MlflowWriter.send = sending  # type: ignore[assignment,method-assign]


def _sweep(store: str, changes: dict[str, Any]) -> None:
    meter = _Meter()
    _measured(meter)
    result = run_study(study(Path(store), **changes), lambda event: None)
    assert result.unfinished == 0
    (Path(store) / "mlflow.json").write_text(json.dumps([meter.waiting, meter.delivering]))


def _loop(configs: list[TrialConfig]) -> None:
    from trainable.trial import run_trial  # which the process that drives a sweep must not import

    for config in configs:
        for _ in run_trial(config):
            pass


def _timed(*processes: Any) -> float:
    started = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return time.perf_counter() - started


def loop(trials: int, rounds: int, workload: str) -> list[str]:
    """Of one seed, whose trials share their beginning; of as many seeds, where nothing is shared."""
    kinds = {
        "with one seed": {"trials": trials, "workload": workload},
        "with a seed each": {"trials": 1, "replicates": trials, "workload": workload},
    }
    lines, shares = [], []
    for kind, changes in kinds.items():
        ratios = []
        for _ in range(rounds):
            sweep, plain, waiting, delivering = _round(changes)
            ratios.append(sweep / plain)
            shares.append((waiting / sweep, delivering / (2 * sweep)))
            told = f"{kind}: sweep {sweep:.1f} s, plain loops {plain:.1f} s, ratio {sweep / plain:.3f}"
            print(f"{told}, MLflow {waiting:.2f} s and {delivering:.2f} s", flush=True)
        listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        lines += [
            f"- {trials} {workload} trials {kind}, two at a time: the sweep takes {listed} times as long as two plain",
            f"  loops over the same trials (last round: {sweep:.0f} s against {plain:.0f} s).",
        ]
    waits, delivers = (100 * max(column) for column in zip(*shares, strict=True))
    return [
        *lines,
        (
            f"- MLflow's part of it: the thread that drives the trials waits {waits:.2f} % of the time for tracking; "
            "the thread that"
        ),
        f"  delivers takes {delivers:.2f} % of the two cores.",
    ]


def _round(changes: dict[str, Any]) -> tuple[float, float, float, float]:
    """Seconds of the sweep and of the plain loops; of the sweep, those of tracking."""
    with tempfile.TemporaryDirectory() as store:
        sweep = _timed(SPAWN.Process(target=_sweep, args=(store, changes)))
        config = study(Path(store), **changes)
        configs = [trial_config(config, arm, n) for arm in read_arms(config) for n in planned(config, arm)]
        plain = _timed(*(SPAWN.Process(target=_loop, args=(configs[half::2],)) for half in range(2)))
        waiting, delivering = json.loads((Path(store) / "mlflow.json").read_text())
    return sweep, plain, waiting, delivering


# --- memory over many trials ------------------------------------------------------------------------------------------


def memory(trials: int) -> list[str]:
    settings = {"grpo": {"steps": 1}, "eval": {"questions": 8, "every": 0}, "task": {"digits": 1}}
    samples: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as store:
        changes = {"trials": trials, "workload": "tiny", "settings": settings}
        driver = SPAWN.Process(target=_sweep, args=(store, changes))
        started = time.perf_counter()
        driver.start()
        assert driver.pid is not None
        watched = psutil.Process(driver.pid)
        done = threading.Event()

        def watch() -> None:
            while not done.wait(2.0):
                ended = len(list(Path(store).glob("s/trials/*/outcome.json")))
                if ended:
                    samples.append((ended, watched.memory_info().rss / 2**20))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        driver.join()
        done.set()
        seconds = time.perf_counter() - started
        assert driver.exitcode == 0
    first, early = next((ended, mib) for ended, mib in samples if ended >= trials // 10)
    last, late = samples[-1]
    return [
        (
            f"- {trials} trials of `tiny` (one step each) in one sweep, {seconds:.0f} s: "
            f"the driver has {early:.0f} MiB after {first} trials"
        ),
        f"  and {late:.0f} MiB after {last}: {1024 * (late - early) / (last - first):.0f} KiB more per trial. "
        f"Its peak was {max(mib for _, mib in samples):.0f} MiB.",
    ]


# --- cores and memory of the default sweep ----------------------------------------------------------------------------


def cores(trials: int) -> list[str]:
    """From process start to process end, Ray's start included. The one core is that of the whole process tree."""
    seconds = {}
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as store:
            seconds[count] = _timed(SPAWN.Process(target=_pinned_sweep, args=(store, trials, count)))
        print(f"{count} cores: {seconds[count]:.1f} s", flush=True)
    return [
        f"- {trials} embedded trials on one core {seconds[1]:.0f} s, on two {seconds[2]:.0f} s: "
        f"{seconds[1] / seconds[2]:.2f} times faster (start-up of Ray included, one thread per trial)."
    ]


def _pinned_sweep(store: str, trials: int, count: int) -> None:
    os.sched_setaffinity(0, set(range(count)))
    run_study(study(Path(store), trials=trials, workload="embedded", concurrent=count), lambda event: None)


def footprint(trials: int) -> list[str]:
    """Of the default sweep: proportional set size, so that what processes share counts once."""
    peak, processes, running = 0.0, 0, threading.Event()
    with tempfile.TemporaryDirectory() as store:
        driver = SPAWN.Process(target=_sweep, args=(store, {"trials": trials, "workload": "embedded"}))
        driver.start()
        assert driver.pid is not None
        root = psutil.Process(driver.pid)
        while driver.is_alive() and not running.wait(1.0):
            total, count = 0, 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                    count += 1
                except psutil.Error:  # ended meanwhile
                    continue
            if total / 2**30 > peak:
                peak, processes = total / 2**30, count
        driver.join()
        assert driver.exitcode == 0
    told = (
        f"- The default sweep ({trials} embedded trials, two at a time): "
        f"at most {peak:.2f} GiB in {processes} processes together"
    )
    return [f"{told}, Ray's included."]


# --- beginnings that trials share -------------------------------------------------------------------------------------


def shared(rounds: int) -> list[str]:
    """Processor seconds of a trial with noise, loading included: alone, and after the control of its seed."""
    alone, after = [], []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as store:
            noisy = study(Path(store), workload="embedded")
            control = study(Path(store), workload="embedded", settings={"noise": {"sigma_start": 0.0}})
            alone.append(_one_trial(f"{store}/alone/trials/c01-0", noisy))
            _one_trial(f"{store}/sweep/trials/control-0", control)
            after.append(_one_trial(f"{store}/sweep/trials/c01-0", noisy))
    least, most = min(after[1:]), min(alone[1:])  # the first round warms caches
    return [
        "- An embedded trial that takes its beginning over from the control of its seed",
        f"  ([how-a-trial-works.md](how-a-trial-works.md#what-trials-share)): {least:.1f} processor seconds instead of "
        f"{most:.1f}, {least / most:.2f} times, loading included.",
    ]


def _one_trial(folder: str, config: StudyConfig) -> float:
    from trainable.trial_worker import TrialWorker

    settings = read_config(base_tree(config), ("threads=1",))
    started, outcome = time.process_time(), None
    work = TrialWorker(Folder(folder), settings)
    while outcome is None:
        _, outcome = work.step()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="loop, memory, cores, footprint, shared; default: all")
    parser.add_argument("--trials", type=int, help="default: 16 for loop, 1,000 for memory")
    parser.add_argument("--rounds", type=int, default=1, help="of loop and shared")
    parser.add_argument("--workload", default="embedded", help="of loop")
    arguments = parser.parse_args()
    os.environ.update(TRIAL_ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
    page = DOCS / "overhead.json"
    results: dict[str, list[str]] = json.loads(page.read_text()) if page.exists() else {}
    if not arguments.parts or "loop" in arguments.parts:
        results["loop"] = loop(arguments.trials or 16, arguments.rounds, arguments.workload)
    if not arguments.parts or "memory" in arguments.parts:
        results["memory"] = memory(arguments.trials or 1000)
    if not arguments.parts or "cores" in arguments.parts:
        results["cores"] = cores(arguments.trials or 16)
    if not arguments.parts or "footprint" in arguments.parts:
        results["footprint"] = footprint(arguments.trials or 8)
    if not arguments.parts or "shared" in arguments.parts:
        results["shared"] = shared(arguments.rounds)
    page.write_text(json.dumps(results, indent=1))
    lines = [
        "# What the sweep itself costs",
        "",
        f"`python -m tests.benchmarks.overhead`, {os.cpu_count()} cores, {platform.processor() or platform.machine()}.",
        "",
        "Memory, cores and the default sweep were measured before the embedded model got heads of 32 and before "
        "tracking lost its",
        "queue on disk.",
        "",
    ]
    lines += [line for part in ("loop", "memory", "cores", "footprint", "shared") for line in results.get(part, [])]
    (DOCS / "overhead.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
