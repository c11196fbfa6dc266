"""What a generation engine is asked, and what it answers: plain records, without any engine.

An engine computes with weights that it is given before every rollout, under the names that training uses, and holds
nothing that it was not given (`deployed_weights`). It is asked for tokens, for its weights as it has them, and for
single layers: the last two are how `trainable/engines/gate.py` proves that it computes what training computes.

Shapes: R = rows (tokens), I = inputs of a layer, O = its outputs, r = rank of an adapter.
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainable.episode import Completion
from trainable.hashing import stable_hash
from trainable.policy.policy import Policy, bare_name
from trainable.quantization import Arithmetic, QuantLinear

NAME = "rin"
"""Of our quantisation method, as vLLM knows it."""
CONFIG_FILE = "rin_quantization.json"
"""How each linear layer computes, beside a model's config.json; what `rin export --to checkpoint` writes and our vLLM
method reads."""

_SWITCHES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives and dies with its process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns at every start of what it does not need here
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two trials of a sweep would be bound to the same core
}


def set_vllm_switches() -> None:
    """Before vLLM is imported for an engine of ours. A value that is set already stays."""
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm.triton_utils").setLevel(logging.ERROR)  # speaks before it has read them
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """All that an engine is built from; plain values, so that it can travel to another process.

    Example: EngineSettings(model={"model_type": "qwen2", ...}, quantization={"version": 1, ...}, dtype="float32",
    max_tokens=70, ...)
    """

    model: dict[str, Any]
    """config.json of the architecture."""
    quantization: dict[str, Any]
    """What `quantization_tree` gives."""
    dtype: str
    max_tokens: int
    """Longest prompt and completion together."""
    sequences: int
    """Generated at once."""
    kv_cache: int
    """Bytes."""
    sleep_level: int
    """0 = it does not; see `memory.EngineMemory`."""
    device_share: float
    """Of a GPU's memory that it may take in all."""
    end_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Prompts, and how to continue them.

    Example: Request(prompts=[[3, 4, 12]], group_size=8, max_new_tokens=6, temperature=1.0, batch_size=1024,
    draw=("sample", 0, 12, 0))
    """

    prompts: Sequence[Sequence[int]]
    group_size: int
    """Completions for each prompt."""
    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    batch_size: int
    """Completions at once in training's own modules; an engine has `EngineSettings.sequences`."""
    draw: Sequence[object] = ()
    """Names what is sampled: ("sample", seed, step, batch) of a rollout. Greedy answers need no name."""
    first: int = 0
    """Number of the first prompt among all that are sampled under that name."""
    each_token: bool = False
    """In training's own modules: each token has a draw of its own, which depends on its place alone and not on what is
    generated beside it. Otherwise one generator serves the whole request."""

    def seed_of(self, prompt: int) -> int:
        """Of the samples of the prompt with this number here: they depend on it, and not on what else is in the
        batch."""
        return stable_hash(*self.draw, self.first + prompt) % 2**31


class Engine(Protocol):
    """What `trainable/engines/vllm.py` is in this process and `trainable/engines/process.py` in another one."""

    def begin_step(self) -> None:
        """What may happen once in a step may happen again."""

    def sync(self, weights: Mapping[str, Tensor], *, quantize_inputs: bool) -> None:
        """Compute with these from now on; `quantize_inputs` false: the unquantised model, for `accuracy_bf16`."""

    def generate(self, request: Request) -> list[list[Completion]]:
        """`group_size` completions for each prompt."""

    def digests(self) -> dict[str, str]:
        """Hash of every weight that it computes with."""

    def linear(self, name: str, x: Tensor) -> Tensor:
        """What one layer makes of x [R, I]: [R, O]."""

    def sleep(self) -> None:
        """Give the accelerator's memory back until the next `sync`; does nothing on a CPU."""

    def close(self) -> None:
        """Free everything."""


def deployed_weights(policy: Policy) -> dict[str, Tensor]:
    """What the policy computes with, by bare name; call it inside `deployed` or `injected`. Tensors are shared, not
    copied.

    A linear layer's weight is its deployed one (4 bits, with noise); an adapter comes as NAME.lora_A [r, I] and
    NAME.lora_B [O, r], with its factor NAME.lora_scale.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in policy.model.named_parameters():
        bare = bare_name(name)
        if ".lora_" not in bare:
            weights[bare] = parameter.detach()
    for name, linear in policy.linears.items():
        assert linear.deployed_weight is not None, f"{name}: weights are sent from inside `deployed`"
        weights[f"{name}.weight"] = linear.deployed_weight
    for name, module in policy.model.named_modules():
        if hasattr(module, "lora_A") and getattr(module, "scaling", None):
            bare = bare_name(name)
            (key,) = module.scaling
            weights[f"{bare}.lora_A"] = module.lora_A[key].weight.detach()
            weights[f"{bare}.lora_B"] = module.lora_B[key].weight.detach()
            weights[f"{bare}.lora_scale"] = torch.tensor(float(module.scaling[key]))
    return weights


def quantization_tree(linears: Mapping[str, QuantLinear], *, synced: bool) -> dict[str, Any]:
    """Content of `CONFIG_FILE`. `synced`: weights arrive as they are to be computed with; otherwise they are clean
    masters."""
    layers = {name: asdict(linear.arithmetic) for name, linear in linears.items()}
    return {"version": 2, "layers": layers, "synced": synced}


def arithmetic_of(tree: Mapping[str, Any]) -> dict[str, Arithmetic]:
    """How each linear layer computes, from the content of `CONFIG_FILE`. Raises ValueError for another version's."""
    if tree["version"] != 2:
        raise ValueError(f"{CONFIG_FILE}: version {tree['version']} is of another rin-search; export the model again")
    return {name: Arithmetic(**layer) for name, layer in tree["layers"].items()}


def digest(tensor: Tensor) -> str:
    """Hash of dtype, shape and bits."""
    plain = tensor.detach().cpu().contiguous()
    hashed = hashlib.blake2b(f"{plain.dtype}{tuple(plain.shape)}".encode(), digest_size=16)
    hashed.update(plain.view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
