"""`gd-plugin push`: a finished run to the Hub, with the card and the record that its numbers come from.

One commit: the Hub has all of it or nothing. What was uploaded before an interruption is not uploaded again.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or its successor, whichever it uses
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from rich.table import Table
from safetensors.torch import load_file, save_file

from .card import LICENSE_HELP, is_ours, write_run_card
from .parser import Parser
from .record import STUDY_FILE, read_record, write_json
from .report import draw
from .terminal import Console

__all__ = ["PushError", "check_token", "hub_errors", "main", "push"]

# What a model needs to be loaded, and what its card shows. No pickle, no checkpoint, no file of the user's own.
_TIMM_CHECKPOINT = "last.pth.tar"  # of the last epoch, as the final metrics
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_FILES = (
    "README.md", "config.json", *_WEIGHTS, "model-*.safetensors", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.jinja",
    "adapter_config.json", "adapter_model.safetensors",
    "record.json", "curves.png", "curves.svg", "reliability.png", "reliability.svg",
)  # fmt: skip
_LAYERS = ("classifier", "first_conv", "fixed_input_size")  # what timm needs to load other classes or channels
_MEANING = {
    400: "it does not take the content; check --license and the card",
    401: "it does not know the token; make one that may write, and give it with `hf auth login` or as HF_TOKEN",
    403: "the token may not write there; make one that may, or choose another --repo_id",
    404: "there is no such user or organisation, or the token may not see it; check --repo_id",
    409: "something else was pushed there at the same time, or is there under the same name; give the command again",
    413: "a file is larger than it takes",
    429: "it is asked too often; wait some minutes and give the command again",
}


class PushError(Exception):
    """The Hub did not take it. One line; what is in the folder is as it was."""


def main(argv: list[str]) -> int:
    """Run ``gd-plugin push`` with the words after the command, and return its exit code.

    Raises:
        ValueError: no run, no model, no token, or a name that the Hub does not allow; one line.
        PushError: the Hub refuses, or cannot be reached; one line.
    """
    parser = Parser(
        prog="gd-plugin push",
        description="Uploads the model of a finished run of gd-plugin train or timm to the Hub, in one commit: "
        "weights, configuration, processor, model card, pictures and record. The token is that of `hf auth login`, or "
        "HF_TOKEN. An interrupted push is continued by giving the command again.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("--repo_id", "--repo-id", required=True, metavar="USER/NAME", help="made if it does not exist")
    parser.add_argument("--private", action="store_true", help="if it is made, for its owner alone")
    parser.add_argument("--license", help="for the card, an identifier of the Hub; default: " + LICENSE_HELP)
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="upload nothing, show which files would go")
    options = parser.parse_args(argv)
    _check_name(options.repo_id)
    card = options.folder / "README.md"
    if options.license is not None and card.is_file() and not is_ours(card):
        raise ValueError(f"--license {options.license}: {card} is not one of gd-plugin's; set the license in it")
    if not card.is_file() or is_ours(card):
        record = _check_run(options.folder)
        if not any((options.folder / f"curves.{suffix}").is_file() for suffix in ("png", "svg")):
            draw([record], options.folder, Console(quiet=True))
        write_run_card(options.folder, options.license)
    if options.dry_run:
        with _prepared(options.folder) as folder:
            _show(folder, options.repo_id)
    else:
        print(push(options.folder, options.repo_id, options.private))
    return 0


def push(run: Path, repo_id: str, private: bool | None = None) -> str:
    """Upload a run's model, card, pictures and record in one commit; returns the address of the repository.

    Args:
        run: folder of a finished run of `gd-plugin train` or `gd-plugin timm`, and its ``README.md``.
        repo_id: ``USER/NAME``, or ``NAME`` under the token's user; made if it does not exist.
        private: whether a repository that is made is for its owner alone; default: as the owner has set it.

    A timm model goes in timm's format: ``timm.create_model("hf_hub:USER/NAME", pretrained=True)`` loads it, and so does
    ``AutoModelForImageClassification``.

    Raises:
        ValueError: no run, no model, no token, or a name that the Hub does not allow; one line.
        PushError: the Hub refuses, or cannot be reached; one line.
    """
    _check_name(repo_id)
    check_token()
    with _prepared(run) as folder, hub_errors(repo_id):
        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message="Upload the model, its card and its record",
            allow_patterns=[path.name for path in _chosen(folder)],  # a * of theirs would look into folders
        )
    return str(url)


def check_token() -> None:
    """Raise ``ValueError`` unless there is a token to push with."""
    if not get_token():
        raise ValueError(
            "there is no token for the Hub: make one that may write in your settings there, then run `hf auth login`, "
            "or set HF_TOKEN"
        )


@contextlib.contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """What the Hub and the way to it can say, as a `PushError` of one line."""
    try:
        try:
            yield
        except RuntimeError as error:  # what an upload by several threads makes of any of these
            if isinstance(error.__cause__, HTTPError | ConnectionError):
                raise error.__cause__ from error
            raise
    except HfHubHTTPError as error:
        said = " ".join((error.server_message or "").split())[:300]
        raise _answered(error.response.status_code, repo_id, said) from error
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise PushError(" ".join(str(error).split())[:300]) from error
    except json.JSONDecodeError as error:
        raise PushError("the Hub's answer cannot be read; nothing is lost, give the command again later") from error
    except (HTTPError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        status = re.search(r"\b(401|403|413|429) [A-Z][a-z]+", reason)
        if status:  # of hf_xet, which knows no other error
            raise _answered(int(status[1]), repo_id, "") from error
        raise PushError(
            f"the connection to the Hub failed ({reason}); nothing is lost, give the command again and it goes on"
        ) from error


def _answered(status: int, repo_id: str, said: str) -> PushError:
    meaning = _MEANING.get(status, "nothing is lost; wait, and give the command again")
    return PushError(f"the Hub answers {status} for {repo_id}: {meaning}" + (f" ({said})" if said else ""))


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--repo_id {repo_id}: {error}") from None


def _check_run(run: Path) -> dict:
    """The record of a run that has a model."""
    if (run / STUDY_FILE).is_file():
        raise ValueError(f"{run} is a study, which keeps no models; train one with gd-plugin train and push that")
    if not (run / "record.json").is_file():
        raise ValueError(f"{run} holds no record.json; give the folder of one finished run")
    record = read_record(run / "record.json")
    whole = (run / "config.json").is_file() and any((run / name).is_file() for name in _WEIGHTS)
    adapter = (run / "adapter_config.json").is_file() and (run / "adapter_model.safetensors").is_file()
    if not whole and not adapter and not (run / _TIMM_CHECKPOINT).is_file():
        raise ValueError(
            f"{run} holds no model (config.json with model.safetensors, or timm's {_TIMM_CHECKPOINT}); let the run end"
        )
    done, of = (record["epochs"] or [{}])[-1].get("epoch") or 0, record["config"].get("epochs")
    if not whole and not adapter and isinstance(of, int) and done < of:
        raise ValueError(f"{run} stopped after epoch {done} of {of}; let it end (timm's --resume), and push it then")
    if record["config"].get("split_bn"):
        raise ValueError(f"{run} was trained with --split-bn, whose second normalisation no loader of a model knows")
    return record


@contextlib.contextmanager
def _prepared(run: Path) -> Iterator[Path]:
    """The folder to upload: a run's own, or for a timm model one made of it."""
    record = _check_run(run)
    trained_by_timm, config = (run / _TIMM_CHECKPOINT).is_file(), {}
    if (run / "config.json").is_file() and (run / "model.safetensors").is_file():  # of several files timm loads none
        config = json.loads((run / "config.json").read_bytes())
    if not trained_by_timm and config.get("model_type") != "timm_wrapper":
        yield run
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in _chosen(run):
            if path.name != "model.safetensors":
                shutil.copy(path, folder / path.name)
        if trained_by_timm:
            _save_timm_model(run, record, folder)
        else:
            # The wrapper's names of the weights; transformers reads timm's as well.
            weights = load_file(run / "model.safetensors")
            weights = {key.removeprefix("timm_model."): value for key, value in weights.items()}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            config["pretrained_cfg"] = _layers(config["architecture"]) | (config.get("pretrained_cfg") or {})
            write_json(folder / "config.json", config)
        yield folder


def _save_timm_model(run: Path, record: dict, folder: Path) -> None:
    """The last epoch's weights of a run of timm's train.py, those that its record measures, as timm saves them."""
    import timm
    from timm.data import resolve_data_config
    from timm.models import load_checkpoint, save_for_hf

    settings = record["config"]
    options = dict(settings.get("model_kwargs") or {})
    names = (("global_pool", "gp"), ("in_chans", "in_chans"), ("bn_eps", "bn_eps"), ("bn_momentum", "bn_momentum"))
    options |= {option: settings[name] for option, name in names if settings.get(name) is not None}
    if settings.get("input_size"):  # as train.py
        options.setdefault("in_chans", settings["input_size"][0])
    model = timm.create_model(settings["model"], num_classes=settings["num_classes"], **options)
    # Averaged on the CPU they are not what timm validates, and the record measures.
    averaged = bool(settings.get("model_ema")) and not settings.get("model_ema_force_cpu")
    load_checkpoint(model, str(run / _TIMM_CHECKPOINT), use_ema=averaged)
    data = resolve_data_config(settings, model=model)
    save_for_hf(
        model,
        str(folder),
        # Not the rest of pretrained_cfg, which says where the architecture's own weights are.
        model_config={"num_classes": settings["num_classes"], "pretrained_cfg": data | _layers(settings["model"])},
        safe_serialization=True,
    )
    config = json.loads((folder / "config.json").read_bytes())
    config["pretrained_cfg"].pop("tag", None)  # of weights that these are not
    names = record["dataset"].get("label_names")
    if names and len(names) == settings["num_classes"]:
        config["label_names"] = names
    # Without the number of classes, which timm 1.0.31 puts there too: transformers would pass it on twice.
    write_json(folder / "config.json", config | {"model_args": options})


def _layers(architecture: str) -> dict:
    """Of timm's own description of an architecture, what does not depend on weights or on a size of images."""
    import timm

    described = timm.get_pretrained_cfg(architecture)
    found = {key: getattr(described, key, None) for key in _LAYERS}
    return {key: value for key, value in found.items() if value is not None}


def _show(folder: Path, repo_id: str) -> None:
    console = Console(emoji=False, markup=False)
    console.print(f"would go to {repo_id}, in one commit:", soft_wrap=True)
    table = Table()
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    for path in _chosen(folder):
        table.add_row(path.name, f"{path.stat().st_size:,}")
    console.print(table)


def _chosen(folder: Path) -> list[Path]:
    return sorted({path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()})
