"""The output folder of a run: what is in it, and what may be done to it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from pathlib import Path

from .arguments import Run
from .reading import load_yaml
from .record import TRACE_FILE, read_record

__all__ = ["SETTINGS_FILE", "check_folder", "check_writable", "last_whole_checkpoint", "remove_run"]

SETTINGS_FILE = "args.yaml"  # what the run was asked for, itself a recipe


def check_writable(folder: Path) -> None:
    """Raise ``ValueError`` unless ``folder``, which need not exist, can be made and written to."""
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        os.fspath(folder).encode()
        if "\0" in os.fspath(folder):
            raise ValueError("embedded null byte")
    except (OSError, ValueError) as error:  # a name that no file system takes
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"--output_dir {str(folder)[:80]}: {reason}; give another name") from None
    if not existing.is_dir():
        raise ValueError(f"--output_dir {folder}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--output_dir {folder}: {existing} may not be written to; give another folder")


def check_folder(run: Run, options: argparse.Namespace) -> None:
    """Refuse a folder that cannot be written to, and to mix two runs in one folder."""
    folder = run.folder
    check_writable(folder)
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and path not in _checkpoints(folder):
            raise ValueError(f"{path} is no checkpoint of the Trainer, which would remove it all the same; rename it")
    settings_path, record_path = folder / SETTINGS_FILE, folder / "record.json"
    if options.overwrite or not (_checkpoints(folder) or settings_path.exists() or record_path.exists()):
        return
    if not options.resume:
        raise ValueError(
            f"{folder} already holds a run; go on with it with --resume, replace it with --overwrite, or choose "
            "another --output_dir"
        )
    if record_path.exists():
        read_record(record_path)
    try:
        before = load_yaml(settings_path.read_bytes())
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{settings_path} is missing or damaged, so the run cannot be resumed; use --overwrite")
    _check_processes(folder, run.args.world_size)
    for key in sorted({*before, *run.settings}, key=str):
        if before.get(key) != run.settings.get(key):
            raise ValueError(
                f"{folder} holds a run with {key} {before.get(key)}, not {run.settings.get(key)}; resume it with the "
                "same settings, use --overwrite, or choose another --output_dir"
            )


def _check_processes(folder: Path, processes: int) -> None:
    """Each leaves the state of its random numbers in a checkpoint, here where all are on one machine."""
    checkpoint, _ = last_whole_checkpoint(folder)
    if checkpoint is None or os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
        return
    before = len(list(checkpoint.glob("rng_state*.pth")))
    if before and before != processes:
        raise ValueError(
            f"{checkpoint} was left by {before} process(es), not {processes}, which would make other batches; start as "
            "many, use --overwrite, or choose another --output_dir"
        )


def _checkpoints(folder: Path) -> list[Path]:
    """The Trainer's checkpoints, oldest first; not a `checkpoint-best` or `checkpoint-3.zip` of the user's."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The checkpoint to go on from, and later ones that a crash cut short: the Trainer writes its state last."""
    whole, cut_short = None, []
    for path in _checkpoints(folder):
        if _is_json(path / "trainer_state.json"):
            whole, cut_short = path, []
        else:
            cut_short.append(path)
    return whole, cut_short


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def remove_run(folder: Path) -> None:
    """What makes a folder hold a run. The model files are left until the new ones replace them, since they may be what
    this run starts from; nothing that a run did not write is touched."""
    (folder / "record.json").unlink(missing_ok=True)
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)
    for name in (SETTINGS_FILE, TRACE_FILE, "curves.png", "reliability.png"):
        (folder / name).unlink(missing_ok=True)
