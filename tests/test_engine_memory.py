"""What an engine is given of a machine's memory: rows of numbers, of devices that are not here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import MambaConfig, Qwen2Config

from spaces.config import ConfigError, TrialConfig
from spaces.reading import read_config
from spaces.workloads import WORKLOADS
from tests.conftest import Tiny
from trainable.engines import backend
from trainable.engines.backend import _needs_on_device, _settings, memory_here
from trainable.engines.memory import GIB, EngineMemory, Needs, cache_numbers_per_token, choose, needs_of
from trainable.footprint import CannotCount, footprint
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy

QWEN = Needs(
    cache=int(10.5 * GIB),
    sequence=42 << 20,
    engine=int(5.0 * GIB),
    held=int(2.6 * GIB),
    learning=42 * GIB,
    micro_batch="grpo.micro_batch_tokens",
)
SMALL = replace(QWEN, cache=GIB // 4, sequence=1 << 20, engine=2 * GIB, held=1 << 20, learning=1 << 20)


def on_gpu(needs: Needs, gib: float, **given: object) -> EngineMemory:
    options = {"inside": False, "cache": None, "sleep": None, **given}
    total = int(gib * GIB)
    return choose(needs, free=total - int(3.5 * GIB), total=total, on_device=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gib", "given", "cache_gib", "level"),
    [
        (141, {}, 10.5, 0),
        (80, {}, 10.5, 0),
        (40, {}, 10.5, 1),  # both do not fit together
        (40, {"inside": True}, 10.5, 2),  # weights are on the same device: dropped
        (20, {}, 7.9, 1),  # capped by what training holds
        (80, {"sleep": True}, 10.5, 1),
        (80, {"cache": 5 * GIB}, 5.0, 0),
        (66, {"cache": 5 * GIB}, 5.0, 0),  # a smaller cache, beside which training fits
        (66, {}, 10.5, 1),
        (66, {"sleep": False}, 9.6, 0),
    ],
)
def test_cache_and_sleep_follow_from_the_device(
    gib: float, given: dict[str, object], cache_gib: float, level: int
) -> None:
    memory = on_gpu(QWEN, gib, **given)
    assert memory.cache / GIB == pytest.approx(cache_gib, abs=0.05)
    assert memory.sleep_level == level
    assert memory.needed == QWEN.cache
    assert memory.share * gib == pytest.approx(
        memory.cache / GIB + 5.0, abs=0.01
    )  # 0.92 would not start beside a model


def test_a_device_without_room_for_one_sequence_is_refused_with_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"one sequence need 0\.04 GiB, there is room for 0\.00; lower rollout"):
        on_gpu(QWEN, 11.5)
    with pytest.raises(ConfigError, match=r"one sequence need 0\.04 GiB, there is room .*or grpo\.micro_batch_tokens,"):
        on_gpu(QWEN, 40, sleep=False)


def test_a_cache_that_a_device_has_no_room_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^rollout\.kv_cache_gib=100: there is room for 63\.95 GiB of keys"):
        on_gpu(QWEN, 79, cache=100 * GIB)
    with pytest.raises(ConfigError, match=r"^rollout\.kv_cache_gib=40: there is room for 21\.95 GiB.*; lower it, or"):
        on_gpu(QWEN, 79, cache=40 * GIB, sleep=False)
    assert on_gpu(QWEN, 79, cache=40 * GIB).sleep_level == 1  # asleep there is room for it
    options = {"total": 64 * GIB, "on_device": False, "inside": True, "sleep": None}
    with pytest.raises(ConfigError, match=r"^rollout\.kv_cache_gib=30: there is room for 20\.00 GiB"):
        choose(QWEN, free=20 * GIB, cache=30 * GIB, **options)  # type: ignore[arg-type]
    assert choose(QWEN, free=20 * GIB, cache=15 * GIB, **options).cache == 15 * GIB  # type: ignore[arg-type]


def test_on_a_cpu_nothing_sleeps_and_a_cache_takes_a_quarter_of_the_free_memory() -> None:
    options = {"total": 64 * GIB, "on_device": False, "inside": True, "cache": None}
    assert choose(QWEN, free=60 * GIB, sleep=None, **options).cache == QWEN.cache  # type: ignore[arg-type]
    capped = choose(QWEN, free=20 * GIB, sleep=False, **options)  # type: ignore[arg-type]
    assert (capped.cache, capped.needed, capped.sleep_level) == (5 * GIB, QWEN.cache, 0)
    with pytest.raises(ConfigError, match=r"^rollout\.sleep=true: there is no GPU here"):
        choose(SMALL, free=20 * GIB, sleep=True, **options)  # type: ignore[arg-type]


def test_a_token_of_the_plan_s_model_takes_28_kib_and_its_batch_ten_gib(tiny: Tiny) -> None:
    """28 layers of 2 key and value heads of 128 in 16 bits; from the workload's own sizes."""
    config = tiny()
    policy = load_policy(config.model, config.quant, 0)
    policy.network.to(torch.bfloat16)
    heads = {"num_attention_heads": 12, "num_key_value_heads": 2}
    policy.network.config = Qwen2Config(hidden_size=1536, num_hidden_layers=28, **heads)
    needs = needs_of(read_config(WORKLOADS["qwen2.5-1.5b-gsm8k"].settings), policy, peak=None)
    assert needs.sequence == 1536 * 28 * 1024
    assert needs.cache == 257 * needs.sequence  # 10.5 GiB; it was one


def test_what_training_takes_is_counted_of_its_own_code_and_where_it_cannot_be_the_engine_sleeps(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("rollout.backend=vllm")
    policy = load_policy(config.model, config.quant, 0)
    needs = _needs_on_device(config, policy)
    weights = sum(weight.nbytes for weight in policy.model.parameters())
    assert needs.learning is not None
    assert weights + needs.held + needs.learning == max(p.bytes for p in footprint(config).phases.values())
    assert needs.learning > weights, "gradients alone are as many"
    assert replace(needs, learning=None) == needs_of(config, policy, peak=None)

    def mixture(config: TrialConfig) -> None:
        raise CannotCount("which experts a token goes to hangs on its values")

    monkeypatch.setattr(backend, "footprint", mixture)
    unknown = _needs_on_device(config, policy)
    assert unknown.learning is None
    assert on_gpu(unknown, 80).sleep_level == 1
    assert on_gpu(unknown, 80, sleep=False).sleep_level == 0


def test_of_a_matrix_in_shards_a_process_holds_moments_and_masters_of_its_own_rows(tiny: Tiny) -> None:
    """They were counted whole, and the engine of a trial that fits was refused. What is deployed is whole: here all
    matrices, also those that are not quantised."""
    config = tiny("quant.skip_layers=[0]", "model.dtype=bfloat16")
    policy = load_policy(config.model, config.quant, 0)
    whole = needs_of(config, policy, peak=None)
    with in_shards(policy):
        found = needs_of(config, policy, peak=None)
    learned = list(policy.trainable().values())
    matrices = [weight for weight in learned if weight.dim() == 2]
    every, own = (
        sum(weight.numel() for weight in learned),
        sum(weight[: len(weight) // 2].numel() for weight in matrices),
    )
    vectors = every - sum(weight.numel() for weight in matrices)
    quantized = sum(policy.linears[name].weight.numel() for name in policy.quantized)
    assert whole.held == 2 * quantized + 12 * every  # two moments and a master in fp32
    assert found.held == 2 * (every - vectors) + 12 * (own + vectors)
    assert replace(found, held=whole.held) == whole  # the engine's and its cache


@contextmanager
def in_shards(policy: Policy) -> Iterator[None]:
    """Matrices as one process of two sees them, which holds half of their rows; a group of one process does."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        mesh, made = init_device_mesh("cpu", (1,)), dict[int, nn.Parameter]()
        for module in policy.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2:
                    half = parameter.detach()[: len(parameter) // 2]
                    shape = {"shape": parameter.shape, "stride": parameter.stride()}
                    rows = DTensor.from_local(half, mesh, (Shard(0),), run_check=False, **shape)
                    kept.append((module, name, parameter))
                    module.register_parameter(name, made.setdefault(id(parameter), nn.Parameter(rows)))
        yield
    finally:
        for module, name, parameter in kept:
            module.register_parameter(name, parameter)
        dist.destroy_process_group()


def test_a_model_without_attention_keeps_the_cache_that_it_had() -> None:
    assert cache_numbers_per_token(MambaConfig()) == 0


def test_what_was_chosen_is_what_the_engine_is_built_from(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("rollout.backend=vllm", "rollout.kv_cache_gib=0.5")
    policy = load_policy(config.model, config.quant, 0)
    memory = memory_here(config, policy)
    assert (memory.cache, memory.sleep_level) == (GIB // 2, 0)
    settings = _settings(config, policy, memory)
    assert (settings.kv_cache, settings.sleep_level, settings.device_share) == (memory.cache, 0, memory.share)
    for name in ("require_vllm", "_check_heads"):
        monkeypatch.setattr(backend, name, lambda *_: None)
    monkeypatch.setattr(backend, "_start", lambda *_: None)
    described = backend.start_backend(config, policy).described()
    assert described["kv_cache_gib"] == 0.5
    assert described["kv_cache_needed_gib"] == pytest.approx(memory.needed / GIB, abs=1e-3)


def test_a_record_of_an_earlier_version_is_read_as_it_was() -> None:
    """Its cache had 1 GiB, also where nothing used it."""
    old = TrialConfig.model_validate({"rollout": {"backend": "torch", "kv_cache_gib": 1.0, "answer_seconds": 1800.0}})
    assert old.rollout.kv_cache_gib == 1.0
