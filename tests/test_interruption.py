"""`gd-plugin train` is killed, again and again, and the disk fills up: nothing is lost, and a resumed run comes out bit
for bit as if nothing had happened."""

import contextlib
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from gd_plugin.cli import recipes_folder
from gd_plugin.record import read_record
from gd_plugin.train import prepare

# 24 updates an epoch, 72 in all, a checkpoint after every third; dropout makes the state of the random numbers matter.
WORDS = [
    *("--dataset", "digits", "--gd_beta", "5", "--gd_beta_start", "0.01", "--gd_warmup_steps", "60"),
    *("--max_train_samples", "96", "--per_device_train_batch_size", "4", "--num_train_epochs", "3"),
    *("--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "2"),
    *("--model_args", '{"drop_rate": 0.3}'),
]


def outcome(folder):
    """What must be the same: weights, betas and curves, metrics and the bins of the reliability diagram."""
    record = read_record(folder / "record.json")
    parts = {key: record[key] for key in ("epochs", "log", "final", "reliability", "calibrated", "gd", "config")}
    return load_file(folder / "model.safetensors"), parts


def assert_same(one, other):
    (weights, record), (expected, wanted) = outcome(one), outcome(other)
    assert weights.keys() == expected.keys() and len(weights) > 20
    assert [name for name, weight in weights.items() if not torch.equal(weight, expected[name])] == []
    assert record == wanted
    assert [entry["step"] for entry in record["log"]] == list(range(1, len(record["log"]) + 1))


@pytest.fixture(scope="module")
def uninterrupted(train, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    train(*small, *WORDS, output_dir=folder)
    return folder


@pytest.fixture
def kills(request):
    return 20 if request.config.getoption("--full") else 3


@pytest.mark.slow
def test_kills_at_random_moments(start, train, small, uninterrupted, tmp_path, kills, figure):
    """Before the first update, inside updates, inside saves, between epochs: wherever it is. Whenever a run comes to
    its end in spite of them, the next one begins."""
    moments, places, cut_short = random.Random(0), [], 0
    runs = (tmp_path / f"run-{i}" for i in itertools.count())
    folder = next(runs)
    for kill in range(kills):
        words = ["train", *small, *WORDS, "--output_dir", folder]
        process = start([*words, "--resume"] if (folder / "args.yaml").exists() else words, tmp_path / f"err-{kill}")
        before = steps(folder)
        # When it has gone on by a checkpoint and a bit; every fifth after some seconds, wherever it is by then.
        wait_until(lambda before=before, at=folder: steps(at) > before, process, 3 if kill % 5 == 0 else 120)
        time.sleep(moments.uniform(0, 0.15))
        with contextlib.suppress(ProcessLookupError):  # it has just come to its end
            os.killpg(process.pid, signal.SIGKILL)
        process.join(60)
        places.append((folder.name, steps(folder)))
        cut_short += any(not (path / "trainer_state.json").exists() for path in folder.glob("checkpoint-*"))
        if (folder / "record.json").exists():
            assert_same(folder, uninterrupted)
            folder = next(runs)
    assert len(set(places)) > kills / 2
    assert cut_short or kills < 20
    figure("kills of a training", f"{kills}, {cut_short} of them in the middle of a checkpoint")
    train(*small, *WORDS, *(["--resume"] if folder.exists() else []), output_dir=folder)
    assert_same(folder, uninterrupted)


def test_a_checkpoint_that_is_cut_short_is_named(train, small, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "out")
    (folder / "record.json").unlink()
    last = folder / f"checkpoint-{steps(folder)}"
    (last / "trainer_state.json").unlink()
    (last / "model.safetensors").write_bytes(b"half")
    out = train(*small, *WORDS, "--resume", output_dir=folder)
    before = folder / f"checkpoint-{steps(uninterrupted) - 3}"
    assert f"{last} was cut short and is left out; going on from {before}\n" in out
    assert_same(folder, uninterrupted)


def steps(folder):
    """Of the last checkpoint that is whole."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if path.stat().st_size]
    return max((int(path.name.split("-")[1]) for path in whole), default=0)


def wait_until(true, process, seconds):
    end = time.monotonic() + seconds
    while not true() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.01)


def test_another_schedule_is_found(train, small, uninterrupted, tmp_path):
    """Or the comparison would show nothing."""
    train(*small, *WORDS, "--gd_warmup_steps", "59", output_dir=tmp_path / "out")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "out", uninterrupted)


def test_a_checkpoint_is_whole_when_all_processes_have_written_to_it(train, small, tmp_path, monkeypatch):
    """The state, which is looked for, is written after a barrier behind every process's random numbers."""
    seen = []
    real = Accelerator.wait_for_everyone

    def wait(self):
        paths = (tmp_path / "out").glob("checkpoint-*")
        seen.extend(((p / "rng_state.pth").exists(), (p / "trainer_state.json").exists()) for p in paths)
        real(self)

    monkeypatch.setattr(Accelerator, "wait_for_everyone", wait)
    train(*small, *WORDS, "--num_train_epochs", "1", "--gd_warmup_steps", "9", output_dir=tmp_path / "out")
    assert (True, False) in seen


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_are_killed(small, tmp_path, kills, figure):
    """Both at once, as a machine that goes down does it; one of them alone, which ends the other; and by a Ctrl-C that
    they see at different times."""
    words = [*small, *WORDS, "--gd_warmup_steps", "30", "--augmentation", "crop_flip"]  # of 36: an update takes two
    torchrun(words, tmp_path / "whole")
    folder = tmp_path / "out"
    which = ("both", "one", "both", "ctrl-c") if kills > 3 else ("ctrl-c",)
    for kill, how in enumerate(which):
        log = tmp_path / f"{kill}"
        process = popen([*words, "--resume"] if (folder / "args.yaml").exists() else words, folder, log)
        workers = []
        try:
            before = steps(folder)
            wait_until(lambda before=before: steps(folder) > before, _Alive(process), 240)
            assert process.poll() is None, log.read_text()
            workers = [int(pid) for pid in children(process)]
            assert len(workers) == 2
            if how == "ctrl-c":
                os.kill(workers[0], signal.SIGINT)
                time.sleep(0.3)
                os.kill(workers[1], signal.SIGINT)
                assert process.wait(120) != 0
                assert log.read_text().count("gd-plugin: stopped after update") == 1
                assert steps(folder) % 10 == 0  # where they agree
            elif how == "one":
                os.kill(workers[1], signal.SIGKILL)
                assert process.wait(120) != 0  # torchrun ends the rest
        finally:
            for pid in (process.pid, *workers):  # each worker has a group of its own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(60)
    with pytest.raises(ValueError, match=r"checkpoint-\d+ was left by 2 process\(es\), not 1"):
        prepare([*words, "--resume", "--output_dir", str(folder)], recipes_folder())
    torchrun([*words, "--resume"], folder)
    assert_same(folder, tmp_path / "whole")
    figure("interruptions of a training with two processes", len(which))


class _Alive:
    def __init__(self, process):
        self.is_alive = lambda: process.poll() is None


def children(process):
    return [pid for path in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in path.read_text().split()]


def popen(words, folder, log):
    argv = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "gd_plugin", "train"]
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, *argv, *map(str, words), "--output_dir", folder],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        )


def torchrun(words, folder):
    log = folder.with_suffix(".log")
    process = popen(words, folder, log)
    try:
        assert process.wait(300) == 0, log.read_text()
    finally:
        process.terminate()  # it ends what it has started


# The disk -------------------------------------------------------------------------------------------------------------


def in_a_namespace(script, tmp_path):
    """Run shell lines where file systems can be mounted that nobody else sees."""
    (tmp_path / "mount").mkdir()
    probe = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "mount")]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system of their own")
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def test_a_full_disk(train, small, uninterrupted, tmp_path):
    words = shlex.join([sys.executable, "-m", "gd_plugin", "train", *small, *WORDS, "--output_dir", "mount/out"])
    done = in_a_namespace(
        f"mount -t tmpfs -o size=3m tmpfs mount && {words}; code=$?; cp -r mount/out kept; exit $code", tmp_path
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith(
        "gd-plugin: error: no space left for mount/out; make some, and go on with --resume\n"
    ), done.stderr
    assert "Traceback" not in done.stderr
    whole = steps(tmp_path / "kept")
    assert whole > 0 and json.loads((tmp_path / f"kept/checkpoint-{whole}/trainer_state.json").read_text())
    train(*small, *WORDS, "--resume", output_dir=tmp_path / "kept")
    assert_same(tmp_path / "kept", uninterrupted)


def test_a_folder_that_is_read_only(small, tmp_path):
    words = shlex.join([sys.executable, "-m", "gd_plugin", "train", *small, *WORDS, "--output_dir", "mount/out"])
    done = in_a_namespace(f"mount -t tmpfs -o ro tmpfs mount && {words}", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "gd-plugin: error: --output_dir mount/out: mount may not be written to; give another folder\n"
    )
