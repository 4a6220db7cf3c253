"""The record of one run: what was run, on what, and what came out, in one JSON file that is whole or absent."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import torch

from . import __version__, shape
from .reading import load_json

__all__ = [
    "RECORD_FORMAT",
    "STUDY_FILE",
    "TRACE_FILE",
    "commit",
    "differences",
    "environment",
    "epochs_from_log",
    "family",
    "hardware",
    "json_text",
    "publishable",
    "publishable_words",
    "read_record",
    "versions",
    "write_atomic",
    "write_json",
]

RECORD_FORMAT = 1
TRACE_FILE = "trace.npz"  # beside the record of a run that was traced for gd-plugin diagnose
STUDY_FILE = "study.json"  # beside the records of a study: its methods in their order, and its seeds

_PACKAGES = ("torch", "transformers", "timm", "accelerate", "datasets", "numpy")
_SECRET = re.compile(r"token$|api_key|secret|passw|credential")
_REQUIRED = ("name", "config", "seed", "dataset", "epochs", "final", "wall_time_s")
# Speed, not quality: it differs between two runs of the same seed.
_SPEED = ("_runtime", "_per_second", "_model_preparation_time")


def write_atomic(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a file whole or not at all: a reader, and whoever comes after a crash, sees the old file or the new one.

    Args:
        path: the file; its folder must exist.
        data: bytes, or text, which is written as UTF-8 with its line ends unchanged.

    Raises:
        OSError: the folder is absent or full, or may not be written to. ``path`` is then as it was before.
    """
    path = Path(path)
    if isinstance(data, str):
        data = data.encode()
    # In the same folder, since a rename is atomic only within one file system. Not tempfile, whose files only their
    # owner may read.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # KeyboardInterrupt too
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, obj) -> None:
    """Write ``obj`` as JSON with `write_atomic`; NaN and infinities, which JSON does not have, become null.

    Raises:
        TypeError: something in ``obj`` has no form in JSON.
        OSError: as `write_atomic`.
    """
    write_atomic(path, json_text(obj))


def json_text(obj) -> str:
    """What `write_json` writes."""
    return json.dumps(_finite(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def environment() -> dict:
    """What a result depends on besides its configuration: ``python``, ``platform``, ``versions``, ``commit`` (of the
    checkout that holds this package; null for an installed one) and ``hardware``.

    Records are made to be published: no environment variable, host name, user name or path is in it.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "commit": commit(),
        "hardware": {
            "cpu": _cpu(),
            "cpu_count": os.cpu_count(),
            "gpu": gpus,
            "gpu_count": len(gpus),
            "torch_threads": torch.get_num_threads(),
            "processes": torch.distributed.get_world_size() if _is_distributed() else 1,
        },
    }


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def differences(before: dict, now: dict) -> str:
    """In words: ``timm was 1.0.20 and is 1.0.31``, one after the other."""
    absent = object()

    def shown(values: dict, key: str) -> str:
        return str(values[key])[:80] if key in values else "not set"

    keys = [key for key in {**before, **now} if before.get(key, absent) != now.get(key, absent)]
    return ", ".join(f"{key} was {shown(before, key)} and is {shown(now, key)}" for key in keys)


def hardware(record: dict) -> str:
    """What a run was computed on, in words."""
    known = record["hardware"]
    what = ", ".join(known["gpu"]) or f"{known['cpu']}, {known['torch_threads']} thread(s)"
    processes = known.get("processes", 1)  # absent in records from before it was kept
    return what if processes == 1 else f"{what}, {processes} processes"


def epochs_from_log(log_history: list[dict]) -> list[dict]:
    """Sum up the ``log_history`` of a transformers ``TrainerState`` per evaluation.

    Returns:
        One dict per evaluation: ``epoch``, ``step``; ``loss`` and ``cross_entropy``, the means in nats of the training
        entries since the evaluation before (None without any); ``gd_beta``, the last one logged; and every ``eval_*``
        metric but those of speed. A run that never evaluates has one dict per training entry instead.
    """
    evaluates = any(_is_evaluation(entry) for entry in log_history)
    epochs, training, beta = [], [], None
    for entry in log_history:
        if "loss" in entry:
            training.append(entry)
            beta = entry.get("gd_beta", beta)
        if _is_evaluation(entry) if evaluates else "loss" in entry:
            epochs.append(
                {
                    "epoch": entry.get("epoch"),
                    "step": entry.get("step"),
                    "loss": _mean(training, "loss"),
                    "cross_entropy": _mean(training, "cross_entropy"),
                    "gd_beta": beta,
                    **{k: v for k, v in entry.items() if k.startswith("eval_") and not k.endswith(_SPEED)},
                }
            )
            training = []
    return epochs


def family(record: dict) -> str:
    """What a record's loss is: ``"fixed beta"``, ``"warm-up"``, or ``"other loss"``, label smoothing among these."""
    if record.get("loss", "gd") != "gd" or record["config"].get("label_smoothing_factor"):
        return "other loss"
    return "fixed beta" if record["gd"]["beta_start"] is None else "warm-up"


def publishable_words(argv: list[str]) -> list[str]:
    """A record travels: the value of any flag for a token stays at home, and so do the folders of this machine."""
    words, hide = [], False
    for word in argv:
        flag, equals, value = word.partition("=")
        is_token = flag.startswith("--") and _SECRET.search(flag) is not None
        if hide:
            words.append("***")
        elif word.startswith("--") and equals:
            words.append(f"{flag}={'***' if is_token else publishable(value)}")
        else:
            words.append(publishable(word))
        hide = is_token and not equals
    return words


def publishable(value: Any) -> Any:
    """An absolute path by its last part, also behind a reader of timm (hfds//data/cifar10); anything else as it is."""
    if not isinstance(value, str):
        return value
    reader, _, path = value.partition("/")
    if reader.isalnum() and path.startswith("/"):
        return f"{reader}/{publishable(path)}"
    return (Path(value).name or value) if value.startswith("~") or Path(value).is_absolute() else value


def read_record(path: str | os.PathLike, also: tuple[str, ...] = ()) -> dict:
    """Read a record and check that it is one.

    Args:
        also: what the caller needs of it and not every record has: ``"gd"``, ``"dataset.name"``.

    Raises:
        ValueError: not a record, or one of another format; one line that names the file and the remedy.
        OSError: the file cannot be read.
    """
    try:
        record = load_json(Path(path).read_bytes())
    except ValueError as error:  # also text that is not UTF-8
        raise ValueError(f"{path}: not JSON ({error}); repeat the run that wrote it, or give another record") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a record but a JSON {type(record).__name__}; give one run's record per file")
    if "format" not in record:
        raise ValueError(f"{path}: not a record, it has no 'format'; give the record that a training run wrote")
    if record["format"] != RECORD_FORMAT or isinstance(record["format"], bool):
        raise ValueError(
            f"{path}: record of format {record['format']!r}, this version reads {RECORD_FORMAT}; "
            "repeat the run with this version, or read it with the version that wrote it"
        )
    wrong = shape.problem(record, shape.RECORD)
    if wrong:
        raise ValueError(f"{path}: not a record as a run writes it: {wrong}; repeat the run")
    missing = [key for key in _REQUIRED if key not in record]
    missing = missing or [key for key in also if not _has(record, key)]
    if missing:
        raise ValueError(f"{path}: the record lacks {', '.join(missing)}; it was edited or cut short, repeat the run")
    return record


def _has(record: dict, key: str) -> bool:
    part, _, rest = key.partition(".")
    return part in record and (not rest or _has(record[part], rest))


def _finite(obj):
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def versions() -> dict[str, str]:
    """Of this package and of those that results depend on, as far as they are installed."""
    versions = {"gd_plugin": __version__}  # also where it is not installed but run from a checkout
    for name in _PACKAGES:
        try:
            # What is loaded, which may lie beside a script, before what is installed.
            loaded = getattr(sys.modules.get(name), "__version__", None)
            versions[name] = loaded or importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def commit(package: Path = Path(__file__).parent) -> str | None:
    """HEAD of the checkout that tracks ``package``, with "+dirty" if a file has changed; None if there is none."""
    # A package installed somewhere below an unrelated checkout is not tracked by it.
    if not _git(package, "ls-files", "__init__.py"):
        return None
    head = _git(package, "rev-parse", "--verify", "HEAD")
    dirty = _git(package, "status", "--porcelain", "--untracked-files=no") or _git(
        package, "ls-files", "--others", "--exclude-standard"
    )
    return f"{head}{'+dirty' if dirty else ''}" if head else None


def _git(folder: Path, *arguments: str) -> str:
    """Standard output of a git command; empty if it fails, or if there is no git."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that names no model
        return platform.processor() or platform.machine()


def _is_evaluation(entry: dict) -> bool:
    return any(key.startswith("eval_") for key in entry)


def _mean(entries: list[dict], key: str) -> float | None:
    values = [entry[key] for entry in entries if key in entry]
    return sum(values) / len(values) if values else None
