"""Memory that is counted without weights: is it what real tensors take?"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from spaces.architectures import ARCHITECTURES
from spaces.config import ConfigError, TrialConfig
from spaces.reading import read_config
from spaces.workloads import WORKLOADS
from tests.conftest import ModelFolder
from tests.zoo import ZOO, network_of
from trainable import counting
from trainable.counting import Counted
from trainable.footprint import GIB, CannotCount, Phase, count_step, footprint, without_weights
from trainable.kernels import cpu, cuda
from trainable.policy import sources
from trainable.policy.loading import wrapped
from trainable.policy.policy import Policy
from trainable.policy.sources import Architecture, architecture_of

QWEN = "qwen2.5-1.5b-gsm8k"
MIDDLE = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}


def config(**changes: Any) -> TrialConfig:
    """A model of no folder, with sizes at which activations are most of the memory."""
    tree = {
        "model": {"name": "of-no-folder", "dtype": "float32"},
        "task": {"name": "gsm8k"},
        "grpo": {"prompts": 4, "group_size": 4, "updates_per_step": 2, "micro_batch_size": 4},
        "rollout": {"max_new_tokens": 96, "max_prompt_tokens": 32, "batch_size": 8},
        "eval": {"questions": 6, "batch_size": 6},
    }
    return read_config(tree, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


def qwen(heads: int = 4, kv_heads: int = 4) -> Architecture:
    shapes = Qwen2Config(**MIDDLE, num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True)
    return Architecture(config=shapes, source="here")


def real_policy(config: TrialConfig, architecture: Architecture) -> Policy:
    network = AutoModelForCausalLM.from_config(architecture.config, attn_implementation="sdpa")
    network.generation_config.eos_token_id = [0]
    tokenizer: Any = None
    policy = wrapped(network, tokenizer, config.model, config.quant, config.seed)
    return replace(policy, checkpoints=config.grpo.checkpoint_activations)


def on_shapes(config: TrialConfig, architecture: Architecture) -> dict[str, Phase]:
    counted = Counted()
    with counted:
        return count_step(config, without_weights(config, architecture, counted), counted)


def on_tensors(config: TrialConfig, architecture: Architecture) -> dict[str, Phase]:
    counted = Counted()
    with counted:
        with counted.making("weights"):
            policy = real_policy(config, architecture)
        return count_step(config, policy, counted)


@pytest.fixture
def the_same_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shapes and tensors on a CPU without kernels of ours, with torch's plain attention."""
    monkeypatch.setattr(cpu, "load", lambda: None)
    monkeypatch.setattr(cuda, "takes", lambda x: False)
    monkeypatch.setattr(counting, "_attend", torch.nn.functional.scaled_dot_product_attention)
    with sdpa_kernel(SDPBackend.MATH):
        yield


def flops_of(phases: dict[str, Phase]) -> dict[str, int]:
    return {name: sum(work.flops * work.count for work in phase.work) for name, phase in phases.items()}


def moved_by(phases: dict[str, Phase]) -> list[int]:
    return [sum(work.bytes * work.count for work in phase.work) for phase in phases.values()]


def bytes_of(phases: dict[str, Phase]) -> dict[str, int]:
    return {name: phase.bytes for name, phase in phases.items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__adapter": "lora", "grpo__kl_beta": 0.1, "grpo__checkpoint_activations": True}],
    ids=["full", "lora"],
)
def test_shapes_take_what_the_same_operations_on_tensors_take_to_the_byte(
    changes: dict[str, Any], the_same_way: None
) -> None:
    shapes, tensors = (count(config(**changes), qwen()) for count in (on_shapes, on_tensors))
    assert bytes_of(shapes) == pytest.approx(bytes_of(tensors), rel=0, abs=64)  # indices of groups on their way
    assert flops_of(shapes) == flops_of(tensors)
    assert min(flops_of(shapes)[name] for name in ("rollout: prompts", "log-probs", "update")) > 1e7
    assert moved_by(shapes) == pytest.approx(moved_by(tensors), rel=0.01)  # where a copy to the device is none


def test_a_gpus_way_takes_what_the_fused_kernels_here_take_but_for_a_few_hundredths() -> None:
    """Another kernel of attention, shared heads that are repeated for it: the largest phase is compared."""
    shapes, tensors = (bytes_of(count(config(), qwen(kv_heads=2))) for count in (on_shapes, on_tensors))

    assert shapes["update"] == pytest.approx(tensors["update"], rel=0.05)
    assert max(shapes, key=shapes.__getitem__) == max(tensors, key=tensors.__getitem__) == "update"


def test_what_is_let_go_is_counted_until_then_and_no_longer() -> None:
    with Counted() as counted:
        x = torch.empty(1000, device="meta", requires_grad=True)
        y = (x.exp() * 2).exp()  # keeps both results for its gradient, and not what lies between
        assert counted.alive.total() == 4 * 3000
        assert counted.most == 4 * 4000  # when both stood beside x and what lies between
        y.sum().backward()
        del y
        assert counted.alive.total() == 4 * 2000  # x and its gradient
        counted.begin()
        with counted.making("cache"):
            z = torch.zeros(10, 10, device="meta")
        assert z.t().shape == (10, 10)  # a view holds nothing of its own
        assert counted.peak == {"activations": 8000, "cache": 400}


def test_no_view_is_work_and_a_lookup_reads_what_it_gives() -> None:
    with Counted() as counted:
        table, ids = torch.empty(1000, 8, device="meta"), torch.zeros(5, dtype=torch.long, device="meta")
        counted.begin()
        rows = torch.nn.functional.embedding(ids, table)
        rows.t().unsqueeze(0)
        assert [work.bytes for work in counted.work] == [5 * 8 * 4 * 2 + 5 * 8]
        counted.begin()
        rows @ torch.empty(8, 3, device="meta", dtype=torch.float32)
        assert [(work.flops, work.wide) for work in counted.work] == [(2 * 5 * 8 * 3, True)]


def test_the_cache_is_that_of_the_shared_heads_by_hand() -> None:
    """2 (keys and values) x 1 block x 2 shared heads of 32 numbers x (32 + 96) tokens x 8 completions x 4 bytes."""
    phases = on_shapes(config(), qwen(kv_heads=2))
    assert phases["rollout: a token"].peak["KV cache"] == 2 * 1 * 2 * 32 * (32 + 96) * 8 * 4
    assert phases["evaluation: a token"].peak["KV cache"] == 2 * 1 * 2 * 32 * (32 + 96) * 6 * 4


def test_parts_that_follow_from_the_shapes_are_those() -> None:
    full, adapters = (on_shapes(config(**{"model__adapter": kind}), qwen()) for kind in ("full", "lora"))
    weights = full["optimizer"].peak["weights"]
    quantised = full["deploy"].peak["quantised weights"]
    block = 4 * 128 * 128 + 3 * 128 * 256
    assert quantised == 4 * block
    assert full["optimizer"].peak["gradients"] == pytest.approx(weights, rel=0.01)
    assert full["optimizer"].peak["optimiser"] == pytest.approx(2 * weights, rel=0.01)
    assert adapters["optimizer"].peak["optimiser"] == 2 * adapters["optimizer"].peak["gradients"] + 4 * 7 * 2
    assert adapters["update"].bytes < full["update"].bytes


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "qwen3", "gpt2", "mamba2"])
def test_a_policy_without_weights_has_the_parts_of_one_with_them(name: str) -> None:
    network = network_of(ZOO[name])
    sizes = config(quant__exclude=list(ZOO[name].exclude), model__attention=ZOO[name].attention)
    tokenizer: Any = None
    with Counted() as counted:
        shapes = without_weights(sizes, Architecture(config=network.config, source=""), counted)
    real = wrapped(network, tokenizer, sizes.model, sizes.quant, 0)
    for part in ("linears", "norms", "final_norm"):
        assert list(getattr(shapes, part)) == list(getattr(real, part))
    assert (shapes.norm_kinds, shapes.norm_targets) == (real.norm_kinds, real.norm_targets)
    assert (shapes.quantized, shapes.coverage) == (real.quantized, real.coverage)
    assert all(parameter.is_meta for parameter in shapes.model.parameters())


def test_where_values_decide_nothing_is_guessed(tmp_path: Any) -> None:
    network_of(ZOO["mixtral"]).config.save_pretrained(tmp_path)
    with pytest.raises(CannotCount, match="mixtral"):
        footprint(config(model__name=str(tmp_path)))


def test_shapes_are_those_of_a_folder_where_there_is_one_and_else_written_down(model_folder: ModelFolder) -> None:
    folder = model_folder()
    assert architecture_of(config(model__name=folder).model).source == f"{folder}/config.json"
    named = architecture_of(read_config(WORKLOADS[QWEN].settings).model)
    assert "not on this machine" in named.source
    assert named.config.num_key_value_heads == 2
    packaged = architecture_of(read_config(WORKLOADS["smollm2-135m"].settings).model)
    assert packaged.source.endswith("(spaces/architectures.py)")  # whether its package is here was not asked
    with pytest.raises(ConfigError, match="fetches nothing"):
        architecture_of(config().model)
    assert {read_config(one.settings).model.name for one in WORKLOADS.values()} - {"embedded"} == set(ARCHITECTURES)


def test_no_code_of_a_model_is_run_for_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask whoever types, and run it."""
    asked: list[Any] = []

    def read(name: str, **options: Any) -> Any:
        asked.append(options)
        raise OSError

    monkeypatch.setattr(sources.AutoConfig, "from_pretrained", read)
    architecture_of(read_config(WORKLOADS[QWEN].settings).model)
    assert asked == [{"local_files_only": True, "trust_remote_code": False}]


@pytest.mark.slow
def test_shapes_of_the_model_that_a_package_brings_are_those_of_its_file() -> None:
    folder = sources.smollm2_folder()
    real = AutoConfig.from_pretrained(folder, gguf_file=sources.SMOLLM2_FILE)
    written = ARCHITECTURES["smollm2-135m"]
    found = {key: getattr(real, key) for key in written if key != "rope_theta"}
    assert {"rope_theta": real.rope_parameters["rope_theta"], **found} == pytest.approx(written)


@pytest.mark.slow
def test_the_plans_model_at_its_real_size_has_the_published_weights_and_fits_60_gib() -> None:
    plan = read_config(WORKLOADS[QWEN].settings)  # micro-batches of 8,192 tokens
    found = footprint(plan)
    assert found.weights - found.learned == 1_543_714_304  # as on the model's card: 1.54 B
    assert found.cache_bytes_per_token == 2 * 28 * 2 * 128 * 2
    assert found.phases["update"].bytes < 60 * GIB


RESIDENT = """
import gc
from tests.test_footprint import config, qwen, real_policy
from trainable.counting import Counted
from trainable.footprint import count_step

def highest():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

sizes = config(rollout__max_new_tokens=480, rollout__batch_size=4, grpo__micro_batch_size=16)
with Counted() as counted:
    policy = real_policy(sizes, qwen(kv_heads=2))
    count_step(config(rollout__max_new_tokens=2), policy, counted)  # which imports and compiles
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    before = highest()
    held = counted.alive.total()
    phases = count_step(sizes, policy, counted)
print(highest() - before, max(phase.bytes for phase in phases.values()) - held)
"""


@pytest.mark.slow
def test_the_kernel_of_the_machine_says_so_too() -> None:
    """Resident memory of a process that takes the step for real, over what was there before it."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is freed is given back
    command = [sys.executable, "-c", RESIDENT]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env={**os.environ, **at_once}
    )
    resident, counted = map(int, ran.stdout.split()[-2:])

    assert resident == pytest.approx(counted, rel=0.05)
