"""Models for `gd-plugin train`: from the Hub, from a folder, or an untrained timm architecture."""

from __future__ import annotations

import difflib
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from .arguments import ModelArguments, json_mapping
from .data import ClassificationData

__all__ = ["build_model"]

_MAX_IMAGE_SIZE = 8192
_OF_THE_WEIGHTS = (
    "tag", "label_names", "label_descriptions", "label_offset", "license", "description", "origin_url", "paper_name",
    "paper_ids", "notes",
)  # fmt: skip


def build_model(args: ModelArguments, data: ClassificationData) -> tuple[Any, Any]:
    """(model, image processor or tokenizer) for the data's classes."""
    if not args.model:
        raise ValueError("no model: give --model, a local folder, a Hub name, or timm:ARCHITECTURE")
    if args.image_size is not None and args.image_size < 1:
        raise ValueError(f"--image_size must be at least 1, got {args.image_size}")
    if args.image_size is not None and args.image_size > _MAX_IMAGE_SIZE:  # one picture of it would fill the memory
        raise ValueError(f"--image_size must be at most {_MAX_IMAGE_SIZE}, got {args.image_size}")
    labels = dict(enumerate(data.label_names))
    classes = {"num_labels": len(labels), "id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    if args.model.startswith("timm:"):
        if data.kind != "image":
            raise ValueError(f"--model {args.model} classifies images, and {data.name} holds text")
        return _untrained_timm_model(args, classes)
    processor_class, model_class = (
        (AutoImageProcessor, AutoModelForImageClassification)
        if data.kind == "image"
        else (AutoTokenizer, AutoModelForSequenceClassification)
    )
    try:
        processor = processor_class.from_pretrained(args.model)
        model = model_class.from_pretrained(args.model, ignore_mismatched_sizes=True, **classes)
    except Exception as error:  # dozens of types, from the network to the file format
        reason = " ".join(str(error).split())[:300]
        if data.kind == "image" and _is_timm_architecture(args.model):
            reason = f"did you mean timm:{args.model}, untrained, or a timm/ model of the Hub?"
        if isinstance(error, ImportError) and "timm" in reason:
            raise
        raise ValueError(f"--model {args.model} is not a model for {data.kind} classification: {reason}") from error
    if data.kind == "text":
        _make_batches_possible(model, processor)
    if model.config.model_type == "timm_wrapper":
        # What transformers keeps of the model that it was: its classes, and where its weights were from.
        model.config.label_names = data.label_names
        for key in _OF_THE_WEIGHTS:
            (getattr(model.config, "pretrained_cfg", None) or {}).pop(key, None)
    return model, processor


def _is_timm_architecture(name: str) -> bool:
    try:
        import timm
    except ModuleNotFoundError:
        return False
    return timm.is_model(name)


def _make_batches_possible(model: Any, tokenizer: Any) -> None:
    """Language models have no padding, and many tokenizers do not say how much their model can read."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and tokenizer.model_max_length > positions:
        tokenizer.model_max_length = positions


def _untrained_timm_model(args: ModelArguments, classes: dict[str, Any]) -> tuple[Any, Any]:
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor

    architecture = args.model.removeprefix("timm:")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them"
        raise ValueError(f"--model {args.model}: timm has no such architecture; {hint}")
    cfg = timm.get_pretrained_cfg(architecture)
    size = [3, args.image_size, args.image_size] if args.image_size is not None else list(cfg.input_size)
    pretrained_cfg = {
        "input_size": size,
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "interpolation": cfg.interpolation,
        "crop_pct": 1.0,  # the whole image
    }
    config = TimmWrapperConfig(
        architecture=architecture,
        model_args=json_mapping("model_args", args.model_args) if args.model_args else {},  # timm reads no null
        pretrained_cfg=pretrained_cfg,
        **classes,
    )
    try:
        model = TimmWrapperForImageClassification(config)
    except Exception as error:  # timm passes the arguments on, through whatever its layers make of them
        raise ValueError(f"--model {args.model} with --model_args {args.model_args}: {error}") from error
    return model, TimmWrapperImageProcessor(pretrained_cfg=pretrained_cfg, architecture=architecture)
