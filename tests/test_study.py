"""`gd-plugin study` from the words of the command line to its records, and on from what a stopped study left."""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gd_plugin.arguments import parse
from gd_plugin.cli import recipes_folder
from gd_plugin.metrics import METRICS
from gd_plugin.record import read_record
from gd_plugin.study import prepare

METHODS = {"ce": {"gd_beta": 1}, "five": {"gd_beta": 5}}
RUNS = [(seed, name) for seed in (0, 1) for name in METHODS]
VOLATILE = ("created", "command", "commit", "wall_time_s", "energy_kwh")  # when and how fast, not what came out
REPORT = {".md", ".csv", ".html", ".png"}


def words(small, folder, methods=METHODS, jobs=1):
    assert small[-2] == "--seed"
    flags = ["--dataset", "digits", *small[:-2], "--study", json.dumps(methods), "--seeds", 2, "--jobs", jobs]
    return [str(word) for word in (*flags, "--output_dir", folder)]


@pytest.fixture(scope="module")
def study(command, small):
    """A study of two methods and two seeds, in this process but for its workers."""

    def run(folder, *more, methods=METHODS, jobs=1):
        with pytest.MonkeyPatch.context() as patch:
            # Every worker has one thread then, on every machine: more of them add up in another order.
            patch.setattr(os, "cpu_count", lambda: jobs)
            return command("study", *words(small, folder, methods, jobs), *more)

    return run


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """The folder of a finished study, what was printed, and where its workers had their temporary files."""
    folder, temporary = tmp_path_factory.mktemp("study") / "out", tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        outcome = study(folder)
    assert (outcome.code, outcome.err) == (0, "")
    return folder, outcome.out, temporary


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "out")


def path_of(folder, seed, name):
    return folder / f"seed-{seed}" / f"{name}.json"


def result(folder, seed, name):
    record = read_record(path_of(folder, seed, name))
    return {key: value for key, value in record.items() if key not in VOLATILE}


def state(folder):
    """Everything but what a report writes anew."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in REPORT
    }


# A finished study -----------------------------------------------------------------------------------------------------


def test_a_record_for_every_method_and_seed(finished, small):
    folder, out, _ = finished
    asked = json.loads((folder / "study.json").read_text())
    assert (asked["methods"], asked["seeds"], asked["dataset"]) == (["ce", "five"], [0, 1], "digits")
    assert shlex.split(asked["command"]) == ["gd-plugin", "study", *words(small, folder.name)]
    for seed, name in RUNS:
        record = read_record(path_of(folder, seed, name))
        beta = METHODS[name]["gd_beta"]
        assert (record["name"], record["seed"], record["gd"]["beta"], record["loss"]) == (name, seed, beta, "gd")
        assert (record["config"]["seed"], record["config"].get("gd_beta", [1.0])) == (seed, [beta])
        assert (record["config"]["learning_rate"], record["config"]["max_train_samples"]) == (0.01, 128)
        assert record["command"] == asked["command"]
        assert record["hardware"]["torch_threads"] == 1
        assert [(epoch["epoch"], epoch["step"]) for epoch in record["epochs"]] == [(1, 4)]
        assert [entry["step"] for entry in record["log"]] == [1, 2, 3, 4]
        assert {*METRICS, "loss"} == record["final"].keys()
        assert f"seed {seed}, {name}: accuracy {100 * record['final']['accuracy']:.2f} %, NLL" in out


@pytest.mark.parametrize(("seed", "name"), RUNS)
def test_the_calibrated_metrics(finished, seed, name):
    record = result(finished[0], seed, name)
    final, calibrated = record["final"], record["calibrated"]
    assert calibrated.keys() == {"temperature", "vector"}
    assert calibrated["temperature"].keys() == {*METRICS, "temperature"}
    assert calibrated["vector"].keys() == {*METRICS}
    assert 0 < calibrated["temperature"]["temperature"] < math.inf
    # One temperature for all logits leaves the classes in their order.
    assert calibrated["temperature"]["accuracy"] == final["accuracy"]
    for metrics in calibrated.values():
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["nll"] != pytest.approx(final["nll"], rel=1e-6)


def test_neither_models_nor_temporary_files_are_left(finished):
    folder, _, temporary = finished
    assert {str(path) for path in state(folder)} == {"study.json"} | {f"seed-{s}/{n}.json" for s, n in RUNS}
    assert {path.name for path in folder.rglob("*") if path.is_dir()} == {"seed-0", "seed-1"}
    assert list(temporary.iterdir()) == []


def test_nothing_private_is_written(finished):
    folder, _, _ = finished
    for path in state(folder):
        text = (folder / path).read_text()
        for private in (str(folder), str(folder.parent), str(Path.home()) + "/", socket.gethostname(), os.getcwd()):
            assert private not in text


def test_seeds_and_methods_give_different_results(finished):
    """Or the comparisons below would show nothing."""
    results = [result(finished[0], *run) for run in RUNS]
    for numbers in ([r["final"]["nll"] for r in results], [r["log"][-1]["cross_entropy"] for r in results]):
        for i, number in enumerate(numbers):
            assert all(number != pytest.approx(other, rel=1e-5) for other in numbers[:i])


def test_the_same_command_again_trains_nothing(study, copy):
    before = state(copy)
    outcome = study(copy)
    assert (outcome.code, outcome.err) == (0, "")
    assert "4 of 4 runs are complete already" in outcome.out and "commit" not in outcome.out.replace("one commit", "")
    after = state(copy)
    del before[Path("study.json")], after[Path("study.json")]
    assert after == before


# A study that was stopped ---------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys
from gd_plugin.cli import main

if __name__ == "__main__":
    os.cpu_count = lambda: 1
    sys.exit(main())
"""


def test_a_killed_study_goes_on_to_the_same_records(study, finished, small, tmp_path):
    """On in two processes, where there was one: how many there are changes no result either."""
    folder, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(SCRIPT)
    with open(tmp_path / "said", "w") as said:
        argv = [sys.executable, script, "study", *words(small, folder)]
        process = subprocess.Popen(argv, stdout=said, stderr=said, start_new_session=True)
    end = time.monotonic() + 300
    while not list(folder.glob("seed-*/*.json")):
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "said").read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # its workers too
    assert process.wait() == -signal.SIGKILL

    before = state(folder)
    assert before.pop(Path("study.json"))[0] == (folder / "study.json").read_bytes()
    assert json.loads((folder / "study.json").read_text())["seeds"] == [0, 1]
    assert 1 <= len(before) < 4
    for path in before:
        assert (folder / path) in [path_of(folder, *run) for run in RUNS]
        read_record(folder / path)
    # As if it had been killed a little later, while it wrote the next one.
    (folder / "seed-0" / ".0123.tmp").write_text('{"format": 1')

    outcome = study(folder, jobs=2)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{len(before)} of 4 runs are complete already" in outcome.out
    after = state(folder)
    assert {path: after[path] for path in before} == before
    for run in RUNS:
        assert result(folder, *run) == result(finished[0], *run)


def test_workers_end_with_a_study_that_is_killed_alone(small, tmp_path):
    """As the kernel kills it where memory runs out: nobody waits for what they train."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    argv = [sys.executable, script, "study", *words(small, tmp_path / "out"), "--num_train_epochs", "500"]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(argv, stdout=said, stderr=said, start_new_session=True)
    try:
        children, end = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 300

        def alive():
            found = [Path(f"/proc/{pid}/stat") for pid in pids]
            return [stat for stat in found if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"]

        while len(pids := children.read_text().split()) < 2:  # the resource tracker and a worker
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "said").read_text()
            time.sleep(0.05)
        assert alive()  # negative control
        process.kill()
        process.wait()
        while alive():
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_method_that_is_renamed_in_its_case_is_another(study, copy):
    before = state(copy)
    code, _, err = study(copy, methods={"CE": {"gd_beta": 1}, "five": {"gd_beta": 5}})
    assert (code, err.count("\n")) == (2, 1)
    assert "seed-0/ce.json is of the method 'ce', not 'CE'; choose another --output_dir" in err
    assert state(copy) == before


def test_an_infinity_is_the_same_the_second_time(study, tmp_path):
    methods = {"ce": {"gd_beta": 1, "max_grad_norm": "inf"}}
    assert study(tmp_path, "--seeds", 1, methods=methods).code == 0
    outcome = study(tmp_path, "--seeds", 1, methods=methods)
    assert (outcome.code, outcome.err) == (0, "") and "1 of 1 runs are complete already" in outcome.out


def test_a_study_of_ones_own_takes_the_place_of_the_recipes_methods():
    own = '{"mine": {"gd_beta": 3}}'
    runs, _ = parse(["mnist_mlp", "--study", own], recipes_folder(), "study")
    assert [run.name for run in runs] == ["mine"]
    assert len(parse(["mnist_mlp"], recipes_folder(), "study")[0]) > 5
    with pytest.raises(ValueError, match="--methods 'other': the study has no such method"):
        parse(["mnist_mlp", "--study", own, "--methods", "other"], recipes_folder(), "study")


def test_an_output_folder_that_is_a_file(study, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = study(tmp_path / "file")
    assert (code, err) == (
        2,
        f"gd-plugin: error: --output_dir {tmp_path}/file: {tmp_path}/file is a file; give a folder\n",
    )


def test_a_corrupt_record_is_set_aside_and_trained_again(study, finished, copy):
    half = path_of(copy, 0, "ce").read_text()[:500]
    path_of(copy, 0, "ce").write_text(half)
    path_of(copy, 0, "five").write_text('{"format": 1}')
    (copy / "seed-0" / "five.corrupt-0").write_text("of an earlier time")
    outcome = study(copy)
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"ce\.json: not JSON \(.*\); .* set aside as ce\.corrupt-0\n", outcome.out)
    assert re.search(r"five\.json: the record lacks name, .* set aside as five\.corrupt-1\n", outcome.out)
    assert "2 of 4 runs are complete already" in outcome.out
    kept = {path.name: path.read_text() for path in (copy / "seed-0").glob("*.corrupt-*")}
    assert kept == {"ce.corrupt-0": half, "five.corrupt-0": "of an earlier time", "five.corrupt-1": '{"format": 1}'}
    for name in METHODS:
        assert result(copy, 0, name) == result(finished[0], 0, name)


def test_a_record_of_another_format_stops_the_study(study, copy):
    path = path_of(copy, 1, "five")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 7}))
    before = state(copy)
    code, _, err = study(copy)
    assert (code, err.count("\n")) == (2, 1)
    assert re.match(r"gd-plugin: error: \S+/seed-1/five\.json: record of format 7, this version reads 1; ", err)
    assert state(copy) == before


@pytest.mark.parametrize(
    ("more", "five", "message"),
    [
        (["--max_train_samples", 64], 5, "ce.json is of other data: train was 128 and is 64"),
        (["--learning_rate", 0.02], 5, "ce.json is of another study: learning_rate is 0.01 there and 0.02 here"),
        (["--weight_decay", 0.1], 5, "ce.json is of another study: weight_decay is not set there and 0.1 here"),
        (["--augmentation", "crop"], 5, "ce.json is of another study: augmentation is not set there and crop here"),
        ([], 6, "five.json is of another study: gd_beta is [5.0] there and [6.0] here"),
    ],
)
def test_records_of_another_study_stop_it(study, copy, more, five, message):
    before = state(copy)
    code, _, err = study(copy, *more, methods={"ce": {"gd_beta": 1}, "five": {"gd_beta": five}})
    assert (code, err.count("\n")) == (2, 1)
    assert f"seed-0/{message}; choose another --output_dir, or train it again with --overwrite\n" in err
    assert state(copy) == before


@pytest.mark.parametrize(
    ("part", "larger"), [(["--seeds", "1"], "seed 1"), (["--methods", "ce"], "five")], ids=["seeds", "methods"]
)
def test_a_part_of_a_study_does_not_take_its_place(study, copy, part, larger):
    before = state(copy)
    code, _, err = study(copy, *part)
    assert (code, state(copy)) == (2, before)
    assert err == (
        f"gd-plugin: error: {copy} holds a study that is larger, by {larger}: gd-plugin report {copy} shows it; give "
        "another --output_dir, or as many --methods and --seeds, or --overwrite\n"
    )


def test_where_the_data_lie_does_not_make_it_another_study(study, copy):
    more = ["--label_column", "label", "--dataloader_num_workers", 1, "--classes", *"9876543210"]
    assert study(copy, *more).code == 0


def test_records_of_other_versions_stop_a_study(study, copy):
    path = path_of(copy, 1, "five")
    record = json.loads(path.read_text())
    now = record["versions"]
    path.write_text(json.dumps(record | {"versions": now | {"timm": "0.9.0", "numpy": "1.0"}}))
    assert study(copy).code == 0  # nothing is left to train: the report notes it
    path_of(copy, 0, "ce").unlink()
    before = state(copy)
    code, _, err = study(copy)
    assert (code, state(copy)) == (2, before)
    assert err.endswith(
        f"seed-1/five.json is of other versions: timm was 0.9.0 and is {now['timm']}, numpy was 1.0 and is "
        f"{now['numpy']}; install those, choose another --output_dir, or train it again with --overwrite\n"
    )


def test_records_of_another_commit_are_pointed_out(study, copy):
    path = path_of(copy, 1, "five")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"commit": "0123456789abcdef+dirty"}))
    outcome = study(copy)
    assert outcome.code == 0 and "Complete runs are of commit" not in outcome.out  # and none is to come
    path_of(copy, 0, "five").unlink()
    outcome = study(copy)
    assert outcome.code == 0
    now = record["commit"] or "unknown"
    assert f"Complete runs are of commit 0123456789abcdef+dirty, and those to come of commit {now}: " in outcome.out
    assert "The runs are not all of one commit" in outcome.out


def test_records_from_before_a_version_was_kept(study, copy):
    path = path_of(copy, 1, "five")
    record = json.loads(path.read_text())
    del record["versions"], record["commit"]
    record["config"]["num_classes"] = 10  # a flag of that time
    path.write_text(json.dumps(record))
    path_of(copy, 0, "ce").unlink()
    assert study(copy).code == 0 and json.loads(path.read_text()) == record


# Runs that are trained again, and runs that go wrong ------------------------------------------------------------------

WORSE = {
    "diverged": {"weight_decay": 1e30},
    "broken": {"neftune_noise_alpha": 5},  # for embeddings, which the Trainer looks for when training begins
    **METHODS,
}


@pytest.fixture(scope="module")
def again(study, finished, tmp_path_factory):
    """The finished study with --overwrite and two more methods, but one seed: its folder and what was printed."""
    folder = shutil.copytree(finished[0], tmp_path_factory.mktemp("again") / "out")
    for run in RUNS:  # damaged, but not to be looked at
        path_of(folder, *run).write_text(path_of(folder, *run).read_text().replace('"format": 1', '"format": 7'))
    shutil.copy(path_of(finished[0], 0, "ce"), path_of(folder, 0, "broken"))
    outcome = study(folder, "--overwrite", "--seeds", 1, methods=WORSE)
    assert (outcome.code, outcome.err) == (1, "")
    return folder, outcome.out


def test_overwrite_trains_again(again, finished):
    folder, out = again
    assert "are complete already" not in out
    for name in METHODS:
        assert result(folder, 0, name) == result(finished[0], 0, name)
        assert json.loads(path_of(folder, 1, name).read_text())["format"] == 7  # nobody asked for this seed


def test_what_fails_stops_no_other_run(again):
    folder, out = again
    assert re.search(r"^failed: seed 0, broken: \w+Error: .*$", out, re.MULTILINE)
    assert out.count("failed: ") == 1
    found = sorted(path.name for path in (folder / "seed-0").iterdir())
    assert found == ["ce.json", "diverged.json", "five.json"]  # an old record does not pass for that of a failed run


def test_what_diverges_is_complete(again, study, tmp_path):
    folder = shutil.copytree(again[0], tmp_path / "out")
    (folder / "study.json").unlink()  # which has a method more
    record = result(folder, 0, "diverged")
    assert (record["final"]["nll"], record["calibrated"]) == (None, None)
    # Also as what the others are compared with.
    outcome = study(folder, "--seeds", 1, "--methods", "diverged", "ce", "five", methods=WORSE)
    assert (outcome.code, outcome.err) == (0, "")
    assert "3 of 3 runs are complete already" in outcome.out


# Ray ------------------------------------------------------------------------------------------------------------------


def test_on_a_real_local_ray_cluster(study, finished, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 1}')
    try:
        # The second job waits for the place of the first.
        outcome = study(tmp_path, "--executor", "ray", "--methods", "five", "--jobs", 2)
        assert ray.cluster_resources()["CPU"] == 1
    finally:
        ray.shutdown()
    assert outcome.code == 0 and "failed: " not in outcome.out
    for seed in (0, 1):
        assert result(tmp_path, seed, "five") == result(finished[0], seed, "five")


def test_without_ray(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    message = "gd-plugin: error: --executor ray needs Ray: pip install 'gd_plugin[ray]'\n"
    assert study(tmp_path / "out", "--executor", "ray") == (2, "", message)
    assert list(tmp_path.iterdir()) == []


# The command line -----------------------------------------------------------------------------------------------------


def test_nothing_is_written_before_it_runs(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["digits", *small[:-2], "--seeds", "3", "--jobs", "2", "--methods", "beta 5", "cross-entropy"]
    job = prepare(argv, recipes_folder())
    assert (job.folder, job.jobs, job.seeds) == (Path("studies/digits"), 2, 3)
    # In the order of the recipe, whose first method is the baseline, and all methods of a seed before the next one.
    names = [(task.seed, task.run.name) for task in job.tasks]
    assert names == [(seed, name) for seed in range(3) for name in ("cross-entropy", "beta 5")]
    assert job.tasks[3].path(job.folder) == Path("studies/digits/seed-1/beta-5.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["digits", "--help"]])
def test_help(command, words):
    code, out, err = command("study", *words)
    assert (code, err) == (0, "")
    for flag in ("--seeds N", "--jobs N", "--executor ray", "--output_dir FOLDER", "--overwrite"):
        assert flag in out


MODEL = "--model timm:test_efficientnet --image_size 32"
TWO = '--study {"ce":{"gd_beta":1},"five":{"gd_beta":5}}'
STUDY = f"--dataset digits {MODEL} {TWO}"
FOR_TRAIN = r"--seed, --resume and --runs are for gd-plugin train; a study has --seeds, goes on by itself"
BASELINE = "--loss focal knows neither the gd_ flags nor label_smoothing_factor; remove them, or use --loss gd"
# Words are split at spaces; {T} is a folder of texts, {B} a model for them. Then a regular expression for the message.
BAD = [
    (f"{STUDY} --seeds 0", r"--seeds must be at least 1, got 0"),
    (f"{STUDY} --seeds -1", r"--seeds must be at least 1, got -1"),
    (f"{STUDY} --seeds two", r"argument --seeds: invalid int value: 'two' \(gd-plugin study --help\)"),
    (f"{STUDY} --jobs 0", r"--jobs must be at least 1, got 0"),
    (f"{STUDY} --executor slurm", r"argument --executor: invalid choice: 'slurm' \(choose .*\) \(gd-.* --help\)"),
    (f"{STUDY} --seed 3", FOR_TRAIN),
    (f"{STUDY} --seed=3", FOR_TRAIN),
    (f"{STUDY} --resume", FOR_TRAIN),
    (f"{STUDY} --runs {{}}", FOR_TRAIN),
    (f"{STUDY} --gd_betta 5", r"--gd_betta is not a flag of gd-plugin \w+; did you mean gd_beta\?"),
    (f"{STUDY} --xyzzy", r"--xyzzy is not a flag of gd-plugin \w+; --help lists them"),
    ("nope", r"there is no recipe nope; give a YAML file, or one of those that come with the package: .*\bdigits\b.*"),
    (f"--dataset digits {MODEL}", r"no methods to compare: give a recipe with `study`, or --study '.*'"),
    (f"--dataset digits {MODEL} --study {{}}", r"--study is empty: name at least one, such as .*"),
    (f"--dataset digits {MODEL} --study [1]", r"--study must be a JSON object.*, got \[1\]"),
    (f"--dataset digits {MODEL} --study {{", r"--study is not JSON \(.*\): \{"),
    (f"{STUDY} --jbs 2", r"--jbs is not a flag of gd-plugin study; did you mean jobs\?"),
    (f"{STUDY} --methods fve", r"--methods 'fve': the study has no such method; did you mean 'five'\?"),
    (f"{STUDY} --methods ce zzz", r"--methods 'zzz': the study has no such method; they are ce, five"),
    (f"{STUDY} --methods", r"argument --methods: expected at least one argument"),
    (
        f'--dataset digits {MODEL} --study {{"a":{{}},"b":{{"dataset":"digits"}}}}',
        r"study: b sets dataset, which all runs share; give it beside study",
    ),
    (
        f'--dataset digits {MODEL} --study {{"a":{{}},"b":{{"seed":7}}}}',
        r"study: b sets seed, which --seeds sets; remove it",
    ),
    (f'--dataset digits {MODEL} --study {{"a":3}}', r"study: a must map flags to values, got 3"),
    (
        f'--dataset digits {MODEL} --study {{"a-b":{{}},"A.b":{{}},"A_B":{{}}}}',
        r"study: two runs would share the folder \S+/out/a-b; give them other names",
    ),
    (f"{STUDY} --gd_beta 2", r"--gd_beta is set by the run 'ce' of the recipe; leave it out, or give --study"),
    (f'--dataset digits {MODEL} --study {{"a":{{"gd_beta":-1}}}}', r"study: a: gd_beta must be greater than 0, got .*"),
    (f"{STUDY} --loss focal", rf"study: five: {BASELINE}"),
    (f'--dataset digits {MODEL} --study {{"a":{{}},"b":{{"loss":"focal","gd_beta":5}}}}', rf"study: b: {BASELINE}"),
    (
        f'--dataset digits {MODEL} --loss focal --study {{"b":{{"label_smoothing_factor":0.1}}}}',
        rf"study: b: {BASELINE}",
    ),
    (f"{STUDY} --loss focus", r"argument --loss: invalid choice: 'focus' \(choose from .*\)"),
    (f"{STUDY} --augmentation flip", r"argument --augmentation: invalid choice: 'flip' \(choose from .*\)"),
    (f"--dataset {{T}} --model {{B}} {TWO} --augmentation crop", r"--augmentation crop is for images, \S+ holds text"),
    (
        f"{STUDY} --classes 0 1 2",
        r"digits holds other data than the recipe is for, by its classes: it has '3', '4', '5' and 4 more and lacks "
        r"none\. If they are the same under other names, give those as --classes",
    ),
    (f"{STUDY} --classes 9 8 7 6 5 4 3 2 1 ten", r"digits holds .* by its classes: it has '0' and lacks 'ten'\. If .*"),
    (f"{STUDY} --data_dir {{T}}/nowhere", r"--data_dir \S+/nowhere: there is no such folder; .* that holds digits"),
    (
        f'--dataset digits {MODEL} --study {{"a":{{"gd_beta_start":0.1,"gd_warmup_steps":99}}}} --max_train_samples 64',
        r"gd_warmup_steps is 99, 99 updates, but training has only 24; lower gd_warmup_steps or train longer",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.csv").write_text("text,label\n" + "good film,1\nbad film,0\n" * 10)
    return folder


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[argv.replace(STUDY, "") for argv, _ in BAD])
def test_bad_input(command, texts, bert, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    argv = [word.replace("{T}", str(texts)).replace("{B}", str(bert)) for word in argv.split()]
    code, _, err = command("study", *argv, "--output_dir", tmp_path / "out")
    assert code == 2
    assert re.fullmatch(f"gd-plugin: error: {message}\n", err), err
    assert list(tmp_path.iterdir()) == []
