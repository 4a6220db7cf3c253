"""``python -m gd_plugin.bench``: it measures, writes what it measured, and sums it up rightly."""

import json

import pytest
import torch

from gd_plugin import bench, bench_routes
from gd_plugin.bench import growth, main, peak, step_ratio, summary, table
from gd_plugin.bench_routes import Case


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    words = ["--parts", "logits", "classes", "step", "--largest", "32000", "--rounds", "2", "--device", "cpu"]
    assert main([*words, "--output_dir", str(folder)]) == 0
    return folder, json.loads((folder / "bench.json").read_bytes())


@pytest.mark.slow
def test_what_is_measured_is_written(measured):
    folder, result = measured
    (case,) = result["cases"]
    assert case["name"] == "logits 128 x 10, float32" and [p["classes"] for p in result["classes"]] == [10, 100, 1000]
    for routes in (case["routes"], *(point["routes"] for point in result["classes"])):
        for name in ("F.cross_entropy", "gradient-decay", "by hand: one-hot"):
            assert len(routes[name]["seconds"]) == 2 and min(routes[name]["seconds"]) > 0
            assert routes[name]["peak"] >= 0
    assert case["routes"]["Liger cross-entropy"] == {"absent": "Triton: a GPU"}
    assert result["bandwidth"] > 1e8 and result["versions"]["torch"] and result["hardware"]["cpu"]
    assert (folder / "classes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_trainings_take_turns(measured):
    _, result = measured
    assert [step["model"] for step in result["step"]] == ["ResNet", "BERT"]
    for step in result["step"]:
        assert len(step["trainer"]) == len(step["gradient-decay"]) == 2
        assert 0.1 < step_ratio(step)[1] < 10


@pytest.mark.parametrize("part", ["logits", "smoothing", "linear", "model"])
def test_every_route_is_a_loss_with_a_gradient(part):
    """Those that can run here; the compiled ones are torch's."""
    case = Case(part, (6, 8, 12) if part in ("linear", "model") else (6, 12), torch.float32, "cpu")
    ran = []
    for name, prepare in case.routes.items():
        if "compiled" in name:
            continue
        try:
            prepare(case)()
        except (ImportError, RuntimeError) as error:
            assert "a GPU" in str(error) or "torch >= 2.15" in str(error) or "No module" in str(error), name
        else:
            ran.append(name)
    assert len(ran) >= 3


def test_the_routes_by_hand_are_the_same_loss():
    logits, target = Case("logits", (6, 12), torch.float32, "cpu").logits()
    expected = bench_routes._ours(logits, target)
    for loss in (
        bench_routes._textbook,
        lambda *args: bench_routes._margin_by_hand(*args) + torch.tensor(bench_routes.BETA).log(),
    ):
        torch.testing.assert_close(loss(logits, target), expected)
    assert abs(torch.nn.functional.cross_entropy(logits, target) - expected) > 1e-2


def test_peak_memory_is_that_of_what_is_allocated():
    case = Case("logits", (2048, 5000), torch.float32, "cpu")
    found, size = peak(case, "by hand: one-hot"), 2048 * 5000 * 4
    assert found is None or 1.5 * size < found < 20 * size


def test_ratios_are_of_the_same_round():
    routes = {"base": {"seconds": [1.0, 2.0, 4.0]}, "other": {"seconds": [2.0, 2.0, 2.0]}, "no": {"absent": "a GPU"}}
    assert summary(routes, "base") == {"base": (1.0, 1.0, 1.0), "other": (0.5, 1.0, 2.0)}
    _, rows = table({"routes": routes, "bytes_moved": 100, "bandwidth": 100.0})
    assert rows[1] == ["other", "1.00 (0.50 to 2.00)", "2e+03", "-", "50 %"] and rows[2][1] == "a GPU"


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_growth(power):
    points = [{"classes": n, "routes": {"gradient-decay": {"seconds": [3.0 * n**power]}}} for n in bench.CLASSES]
    assert growth(points) == pytest.approx(power)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--parts", "all"], "argument --parts: invalid choice"),
    ],
)
def test_bad_input(words, message, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"python -m gd_plugin.bench: error: {message}") and err.count("\n") == 1


def test_routes_can_be_chosen(tmp_path, capsys):
    words = [
        "--parts",
        "logits",
        "--largest",
        "2000",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path),
    ]
    assert main([*words, "--routes", "gradient-decay"]) == 0
    (case,) = json.loads((tmp_path / "bench.json").read_bytes())["cases"]
    assert list(case["routes"]) == ["F.cross_entropy", "gradient-decay"]
    assert "measuring logits 128 x 10, float32: 2 routes" in capsys.readouterr().out
    assert main([*words, "--routes", "gradient-decoy"]) == 2
    assert "invalid choice: 'gradient-decoy'" in capsys.readouterr().err


def test_nothing_to_measure_is_refused(tmp_path, capsys):
    assert main(["--parts", "linear", "--largest", "100", "--output_dir", str(tmp_path / "new")]) == 2
    assert "--largest 100 leaves nothing of these --parts to measure" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
