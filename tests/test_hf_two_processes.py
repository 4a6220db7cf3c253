"""Two processes with half of every batch each make the updates of one process with all of it."""

import subprocess
import sys
from pathlib import Path

import hf_two_processes
import pytest
import torch
from hf_models import distance


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The same trainings in one process (this one) and in two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched = subprocess.Popen(
        [*launcher, hf_two_processes.__file__, str(two)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent,
    )
    hf_two_processes.main(one)
    output, _ = launched.communicate(timeout=180)
    assert launched.returncode == 0, output[-4000:]
    return torch.load(one / "results.pt"), torch.load(two / "results.pt")


@pytest.mark.parametrize("scenario", hf_two_processes.SCENARIOS)
def test_two_processes_are_one(scenario, results):
    one, two = (r[scenario, "ours"] for r in results)
    assert distance(two["end"], one["end"], one["start"]) < 1e-6
    torch.testing.assert_close(torch.tensor(two["logs"]), torch.tensor(one["logs"]), rtol=1e-6, atol=1e-6)
    assert two["logs"][0][1] > 1  # the plain cross-entropy of an untrained model


@pytest.mark.parametrize("scenario", hf_two_processes.SCENARIOS)
def test_the_mean_of_the_processes_means_is_something_else(scenario, results):
    wrong, right = results[1][scenario, "mean of means"], results[0][scenario, "ours"]
    assert distance(wrong["end"], right["end"], right["start"]) > 1e-3


@pytest.mark.parametrize("scenario", [s for s in hf_two_processes.SCENARIOS if s.startswith(("tokens", "bert"))])
def test_metrics_count_every_sample_once(scenario, results):
    """21 samples in two processes: the last batch is filled up, and what fills it must not count.

    (In the Trainer's own mean, ``eval_loss``, it does.)
    """
    one, two = (r[scenario, "ours"]["metrics"] for r in results)
    assert len(one) == 8
    assert two == pytest.approx(one, rel=1e-5, abs=1e-6)
    other = results[1][scenario, "mean of means"]["metrics"]
    assert other != pytest.approx(one, rel=1e-5, abs=1e-6)
