"""Data sets for `gd-plugin train`: found, checked, split and turned into model inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset

from .arguments import DATASET_HELP, DataArguments

__all__ = ["ClassificationData", "PreparedImages", "PreparedTexts", "augment", "collate_images", "load_data"]

_CACHE_BYTES = 2 * 2**30  # what a split's prepared images may take in memory; larger ones are decoded in every epoch


@dataclass
class Split:
    inputs: Dataset  # one column, `input`: images or texts
    labels: torch.Tensor  # (N,) int64, 0 to C - 1

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass
class ClassificationData:
    name: str
    kind: str  # "image" or "text"
    label_names: list[str]
    train: Split
    validation: Split
    test: Split
    tested_on: str  # the split behind `test`: the validation split where there is no test split
    has_test: bool
    revision: str | None = None  # of a data set of the Hub: its commit

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
            "tested_on": self.tested_on,
            "labels": self.label_names,
            **({"revision": self.revision} if self.revision else {}),
        }


def load_data(args: DataArguments) -> ClassificationData:
    """Load and check a classification data set. Every problem is a ``ValueError`` of one line, with the flag to use."""
    if not args.dataset:
        raise ValueError(f"no data set: give --dataset, {DATASET_HELP}")
    if not 0 < args.validation_fraction < 1:
        raise ValueError(f"--validation_fraction must be between 0 and 1, got {args.validation_fraction}")
    if args.data_dir is not None:
        if not Path(args.data_dir).expanduser().is_dir():
            raise ValueError(f"--data_dir {args.data_dir}: there is no such folder; give one that holds {args.dataset}")
        splits = _load(str(Path(args.data_dir).expanduser().resolve()), None)
    else:
        splits = _digits() if args.dataset == "digits" else _load(args.dataset, args.dataset_config)
    train = _split(splits, args.train_split, "--train_split", args.dataset)
    label_column = _label_column(train, args)
    kind, column = _input_column(train, args, label_column)

    # The test split is never used for selection; where there is none, the final metrics say where they come from.
    test_name = args.test_split or ("test" if "test" in splits else None)
    validation_name = args.validation_split or ("validation" if "validation" in splits else None)
    test = _split(splits, test_name, "--test_split", args.dataset) if test_name else None
    if validation_name:
        validation = _split(splits, validation_name, "--validation_split", args.dataset)
    else:
        if len(train) < 2:
            raise ValueError(f"the training split of {args.dataset} has {len(train)} samples; nothing to cut from it")
        cut = train.train_test_split(args.validation_fraction, seed=0)  # the same for every --seed
        train, validation = cut["train"], cut["test"]
        validation_name = f"{args.validation_fraction:g} of {args.train_split}"
    train = _first(train, args.max_train_samples, "--max_train_samples")
    validation = _first(validation, args.max_eval_samples, "--max_eval_samples")
    has_test = test is not None
    if not has_test:
        test, test_name = validation, validation_name
    else:
        test = _first(test, args.max_eval_samples, "--max_eval_samples")

    names = _label_names(train, label_column)
    if args.classes is not None and sorted(names) != sorted(args.classes):
        found, wanted = set(names), set(args.classes)
        raise ValueError(
            f"{args.data_dir or args.dataset} holds other data than the recipe is for, by its classes: it has "
            f"{_some(found - wanted)} and lacks {_some(wanted - found)}. If they are the same under other names, give "
            "those as --classes"
        )
    parts = [
        Split(part.select_columns(column).rename_column(column, "input"), _labels(part, label_column, names))
        for part in (train, validation, test)
    ]
    return ClassificationData(
        _public_name(args.dataset),
        kind,
        names,
        *parts,
        tested_on=test_name,
        has_test=has_test,
        revision=_revision(splits[args.train_split]),
    )


class PreparedImages(torch.utils.data.Dataset):
    """Images as the model's ``pixel_values``, prepared once and kept in memory where they fit."""

    def __init__(self, split: Split, processor: Any) -> None:
        self.split, self.processor = split, processor
        self.pixels: torch.Tensor | None = None
        first = self._prepare(0)
        if first.nbytes * len(split) <= _CACHE_BYTES:
            pixels = first.new_empty(len(split), *first.shape)
            for i in range(len(split)):
                pixels[i] = self._prepare(i)
            self.pixels = pixels

    def _prepare(self, index: int) -> torch.Tensor:
        try:
            # RGB also where the data are grey: it is what the pipelines of transformers feed the trained model.
            image = self.split.inputs[index]["input"]
            if image is None:
                raise ValueError("there is none")
            image = image.convert("RGB")
        except IndexError:  # the end of an iteration
            raise
        except Exception as error:  # any that a plugin of Pillow raises
            raise ValueError(f"image {index} of the data set cannot be decoded: {error}") from error
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = self._prepare(index) if self.pixels is None else self.pixels[index]
        return {"pixel_values": pixels, "labels": self.split.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch at once, as torch's DataLoader asks for it; one by one they would hold up a small model."""
        if self.pixels is None:
            pixels = torch.stack([self._prepare(index) for index in indices])
        else:
            pixels = self.pixels[indices]
        return {"pixel_values": pixels, "labels": self.split.labels[indices]}


def collate_images(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `PreparedImages.__getitems__` gives is a batch already."""
    return batch


def augment(pixels: torch.Tensor, augmentation: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Shift every image by up to an eighth of its size, and mirror half of them, the whole batch at once.

    Args:
        pixels: shape (N, C, H, W), on any device.
        augmentation: ``"none"``, ``"crop"`` or ``"crop_flip"``.
        generator: of the random numbers; by default the device's.

    What comes in at the border is the mirrored image, as in the fast CIFAR-10 recipes (KellerJordan/cifar10-airbench).
    """
    if augmentation == "none":
        return pixels
    n, _, height, width = pixels.shape
    device, random = pixels.device, {"device": pixels.device, "generator": generator}
    rows, columns = (
        torch.arange(size, device=device) + torch.randint(2 * (size // 8) + 1, (n, 1), **random)
        for size in (height, width)
    )
    if augmentation == "crop_flip":
        columns = torch.where(torch.rand(n, 1, **random) < 0.5, columns, columns.flip(1))
    padded = F.pad(pixels, (width // 8, width // 8, height // 8, height // 8), mode="reflect")
    index = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).view(n, 1, -1)
    return padded.flatten(2).gather(2, index.expand(-1, pixels.shape[1], -1)).view_as(pixels)


class PreparedTexts(torch.utils.data.Dataset):
    """Texts as the model's ``input_ids``, cut to what the model can read; padding is left to the collator."""

    def __init__(self, split: Split, tokenizer: Any) -> None:
        self.labels = split.labels

        def tokenize(batch: dict, rows: list[int]) -> Any:
            if None in batch["input"]:
                raise ValueError(f"row {rows[batch['input'].index(None)]} has no text; mend the data")
            return tokenizer(batch["input"], truncation=True)

        self.tokens = split.inputs.map(
            tokenize,
            with_indices=True,
            batched=True,
            remove_columns="input",
            desc="Tokenizing",
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.tokens[index], "labels": self.labels[index]}


def _digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits (8x8, grey), a fifth of each class held out for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    return DatasetDict(
        {
            name: Dataset.from_dict({"image": list(images[rows]), "label": digits.target[rows].tolist()}, features)
            for name, rows in (("train", train), ("test", test))
        }
    )


def _load(name: str, config: str | None) -> DatasetDict:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"--dataset {name} is a file; give the folder that holds it")
    if looks_local and not path.is_dir():
        raise ValueError(f"--dataset {name}: there is no such folder; give {DATASET_HELP}")
    try:
        loaded = load_dataset(str(path.resolve()) if path.is_dir() else name, config)  # a folder `csv` is no builder
    except Exception as error:  # dozens of types, from the network to the file format
        cause = error.__cause__ or error  # "an error occurred while generating the dataset" helps nobody
        reason = " ".join(str(cause).split())
        elsewhere = "" if path.is_dir() else "; --data_dir names a folder with a copy of it"
        raise ValueError(
            f"--dataset {name} could not be loaded: {type(cause).__name__}: {reason[:300]}{elsewhere}"
        ) from error
    return loaded


def _revision(data: Dataset) -> str | None:
    """The commit of a data set of the Hub, after which `datasets` names the folder of its cache; None of other data."""
    folders = [Path(file["filename"]).parent.name for file in data.cache_files]
    return folders[0] if folders and re.fullmatch("[0-9a-f]{40}", folders[0]) else None


def _split(splits: DatasetDict, name: str, flag: str, dataset: str) -> Dataset:
    if name not in splits:
        raise ValueError(f"{dataset} has no split {name!r}, only {', '.join(splits)}; choose one with {flag}")
    if len(splits[name]) == 0:
        raise ValueError(f"the split {name!r} of {dataset} is empty; choose another with {flag}")
    return splits[name]


def _first(data: Dataset, limit: int | None, flag: str) -> Dataset:
    if limit is None:
        return data
    if limit < 1:
        raise ValueError(f"{flag} must be at least 1, got {limit}")
    return data.select(range(min(limit, len(data))))


def _input_column(data: Dataset, args: DataArguments, label_column: str) -> tuple[str, str]:
    """("image" or "text", column)."""
    if args.image_column and args.text_column:
        raise ValueError("--image_column and --text_column are both given; keep the one to classify")
    for kind, flag in (("image", args.image_column), ("text", args.text_column)):
        if flag:
            _check_column(data, flag, f"--{kind}_column")
            is_image = isinstance(data.features[flag], Image)
            if is_image != (kind == "image"):
                raise ValueError(f"--{kind}_column {flag}: that column holds {data.features[flag]}, not {kind}s")
            return kind, flag
    images = [name for name, feature in data.features.items() if isinstance(feature, Image)]
    strings = [n for n, f in data.features.items() if isinstance(f, Value) and "string" in f.dtype]
    texts = [name for name in strings if name != label_column]
    for kind, found in (("image", images), ("text", texts)):
        if len(found) > 1:
            raise ValueError(f"several {kind} columns, {', '.join(found)}; choose one with --{kind}_column")
        if found:
            return kind, found[0]
    raise ValueError(
        f"no image or text column among {', '.join(data.column_names)}; name it with --image_column or --text_column"
    )


def _label_column(data: Dataset, args: DataArguments) -> str:
    if args.label_column:
        _check_column(data, args.label_column, "--label_column")
        return args.label_column
    found = [name for name, feature in data.features.items() if isinstance(feature, ClassLabel)]
    found = found or [name for name in ("label", "labels") if name in data.features]
    if len(found) != 1:
        what = f"several label columns, {', '.join(found)}" if found else "no label column"
        raise ValueError(f"{what} (the columns are {', '.join(data.column_names)}); choose one with --label_column")
    return found[0]


def _check_column(data: Dataset, name: str, flag: str) -> None:
    if name not in data.features:
        raise ValueError(f"{flag} {name}: there is no such column; the columns are {', '.join(data.column_names)}")


def _label_names(train: Dataset, column: str) -> list[str]:
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    elif isinstance(feature, Value) and not feature.dtype.startswith(("float", "double")):
        names = [str(value) for value in sorted(v for v in train.unique(column) if v is not None)]
    else:
        raise ValueError(f"the label column {column!r} holds {feature}, not classes; choose one with --label_column")
    if len(names) < 2:
        raise ValueError(f"the label column {column!r} has {len(names)} class; a classifier needs at least 2")
    return names


def _labels(data: Dataset, column: str, names: list[str]) -> torch.Tensor:
    values = data[column][:]
    if isinstance(data.features[column], ClassLabel):
        labels = torch.tensor([-1 if value is None else value for value in values])
    else:
        index = {name: i for i, name in enumerate(names)}
        labels = torch.tensor([index.get(str(value), -1) for value in values])
    wrong = ((labels < 0) | (labels >= len(names))).nonzero()
    if len(wrong):
        row = wrong[0].item()
        raise ValueError(
            f"row {row} has the label {values[row]!r}, outside the {len(names)} classes of the training split (an "
            "unlabelled split has -1); mend the data or choose other splits"
        )
    return labels


def _some(names: set[str]) -> str:
    shown = ", ".join(repr(name[:30]) for name in sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"


def _public_name(dataset: str) -> str:
    """A local folder by its last part: a record travels, and other people's paths mean nothing."""
    path = Path(dataset).expanduser()
    return path.resolve().name if path.is_dir() else dataset
