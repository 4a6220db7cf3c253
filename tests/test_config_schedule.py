"""The configuration's checks and files, and beta as a function of training progress."""

import dataclasses
import itertools
import json
import math
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gd_plugin import GradientDecayConfig, beta_at
from gd_plugin.config import SCHEDULES

WARMUP = {"beta": 1.0, "beta_start": 0.01, "warmup_ratio": 0.5}
POSITIVE = "must be greater than 0, got {}; 1 is cross-entropy, 0.01 a small value"


def exactly(message):
    return f"^{re.escape(message)}$"


# ----------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0}, f"beta {POSITIVE.format(0)}"),
        ({"beta": -2.0}, f"beta {POSITIVE.format(-2.0)}"),
        ({"beta": math.nan}, "beta must be finite, got nan"),
        ({"beta": math.inf}, "beta must be finite, got inf"),
        ({"beta": True}, "beta must be a number, got True"),
        ({"beta": None}, "beta must be a number, got None"),
        ({"beta": "1e-3"}, "beta must be a number, got the text '1e-3' (YAML reads 1e-3 as text: write 1.0e-3)"),
        ({"beta": []}, "beta is an empty list; give one number, or one number per class"),
        ({"beta": [1.0, 0.0]}, f"beta {POSITIVE.format(0.0)}"),
        ({"beta": [1.0, math.nan]}, "beta must be finite, got nan"),
        ({**WARMUP, "beta_start": 0.0}, f"beta_start {POSITIVE.format(0.0)}"),
        ({**WARMUP, "beta_start": math.nan}, "beta_start must be finite, got nan"),
        (
            {**WARMUP, "beta": [1.0, 2.0], "beta_start": [1.0, 2.0, 3.0]},
            "beta_start has 3 values for 2 classes; give one number, or one number per class",
        ),
        ({"schedule": "exp"}, "schedule must be one of constant, linear, geometric, cosine, got 'exp'"),
        ({"schedule": None}, "schedule must be one of constant, linear, geometric, cosine, got None"),
        *(
            ({**WARMUP, "warmup_ratio": 0, name: -1}, f"{name} must not be negative, got -1; 0 means no warm-up")
            for name in ("warmup_ratio", "warmup_steps", "warmup_epochs")
        ),
        ({**WARMUP, "warmup_ratio": math.nan}, "warmup_ratio must be finite, got nan"),
        (
            {**WARMUP, "warmup_ratio": 1.5},
            "warmup_ratio must be in [0, 1], got 1.5: the warm-up would be longer than training; use warmup_steps or "
            "warmup_epochs for a length in updates or epochs",
        ),
        (
            {**WARMUP, "warmup_ratio": 0, "warmup_steps": 2.5},
            "warmup_steps must be a whole number of updates, got 2.5",
        ),
        (
            {**WARMUP, "warmup_steps": 10},
            "warmup_steps and warmup_ratio both set the warm-up's length; keep one of them",
        ),
        (
            {"warmup_epochs": 2},
            "warmup_epochs is 2 but beta_start is not set; set beta_start (for example 0.01), or remove warmup_epochs "
            "for a constant beta",
        ),
        (
            {**WARMUP, "schedule": "constant"},
            "schedule is 'constant' but beta_start is set; choose linear, geometric or cosine",
        ),
        (
            {"beta_start": 0.01},
            "beta_start is 0.01 but the warm-up has no length; set warmup_ratio (for example 0.5), warmup_steps or "
            "warmup_epochs",
        ),
        ({"class_weights": 2.0}, "class_weights must be a list of one number per class, got 2.0"),
        ({"class_weights": []}, "class_weights must be a list of one number per class, got []"),
        ({"class_weights": [1.0, -1.0]}, "class_weights must not be negative, got -1.0"),
        (
            {"class_weights": [0.0, 0.0]},
            "class_weights are all 0: no class would count; give at least one a positive weight",
        ),
    ],
)
def test_errors(values, message):
    with pytest.raises(ValueError, match=exactly(message)):
        GradientDecayConfig(**values)


@pytest.mark.parametrize("field", ["beta", "beta_start"])
def test_a_list_in_a_list_is_refused(field):
    with pytest.raises(ValueError, match=f"^{field} "):
        GradientDecayConfig(**{**WARMUP, field: [[1.0, 2.0], [3.0]]})


@pytest.mark.parametrize("field", ["beta", "beta_start", "class_weights"])
def test_number_of_classes(field):
    config = GradientDecayConfig(**{**WARMUP, field: [1.0, 2.0, 3.0]})
    config.check_num_classes(3)
    one = "" if field == "class_weights" else "one number, or "
    message = f"{field} has 3 values for 10 classes; give {one}one number per class"
    with pytest.raises(ValueError, match=exactly(message)):
        config.check_num_classes(10)


def test_one_number_fits_any_number_of_classes():
    GradientDecayConfig(**WARMUP).check_num_classes(10)


def test_it_is_frozen_plain_and_comparable():
    config = GradientDecayConfig(beta=[1, 2], class_weights=[1, 0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 2.0
    assert config.beta == (1.0, 2.0) and config.class_weights == (1.0, 0.0)
    assert config == GradientDecayConfig(beta=(1.0, 2.0), class_weights=(1.0, 0.0))
    assert hash(config) == hash(GradientDecayConfig(beta=(1.0, 2.0), class_weights=(1.0, 0.0)))
    assert config != GradientDecayConfig(beta=(1.0, 3.0), class_weights=(1.0, 0.0))


# ------------------------------------------------------------------------------------------------------------ files

CONFIGS = [
    GradientDecayConfig(),
    GradientDecayConfig(beta=0.1),
    GradientDecayConfig(beta=[0.5, 2.0], class_weights=[1.0, 3.0]),
    GradientDecayConfig(beta=5, beta_start=1e-3, schedule="geometric", warmup_steps=100),
    GradientDecayConfig(beta=[1.0, 2.0], beta_start=[1e-6, 0.1], schedule="cosine", warmup_epochs=2.5),
    GradientDecayConfig(**WARMUP),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["gd.json", "gd.yaml", "gd.YML"])
def test_round_trips(config, name, tmp_path):
    assert GradientDecayConfig.from_dict(config.to_dict()) == config
    path = tmp_path / name
    config.save(path)
    assert GradientDecayConfig.load(path) == GradientDecayConfig.load(str(path)) == config
    (yaml.safe_load if name != "gd.json" else json.loads)(path.read_text())  # readable by others, as what it says
    assert (path.read_text()[0] == "{") == (name == "gd.json")
    dataclasses.replace(config, class_weights=(7.0, 8.0)).save(path)
    assert GradientDecayConfig.load(path) != config


def test_to_dict_is_plain_json():
    values = CONFIGS[4].to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["beta"] == [1.0, 2.0] and list(values) == [f.name for f in dataclasses.fields(GradientDecayConfig)]


FIELDS = "beta, beta_start, schedule, warmup_ratio, warmup_steps, warmup_epochs, class_weights"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bata": 1}, "bata is not a field of GradientDecayConfig; did you mean beta?"),
        ({"warmup_step": 1}, "warmup_step is not a field of GradientDecayConfig; did you mean warmup_steps?"),
        ({"lr": 1}, f"lr is not a field of GradientDecayConfig; the fields are {FIELDS}"),
        ({3: 1}, f"3 is not a field of GradientDecayConfig; the fields are {FIELDS}"),
        ([1], "a configuration must be a mapping of names to values, got list"),
        (None, "a configuration must be a mapping of names to values, got NoneType"),
    ],
)
def test_errors_of_from_dict(values, message):
    with pytest.raises(ValueError, match=exactly(message)):
        GradientDecayConfig.from_dict(values)


def test_yaml_reads_an_exponent_without_a_point_as_text(tmp_path):
    path = tmp_path / "gd.yaml"
    path.write_text("beta: 1e-3\n")
    message = f"{path}: beta must be a number, got the text '1e-3' (YAML reads 1e-3 as text: write 1.0e-3)"
    with pytest.raises(ValueError, match=exactly(message)):
        GradientDecayConfig.load(path)
    path.write_text("beta: 1.0e-3\n")
    assert GradientDecayConfig.load(path).beta == 1e-3


def test_yaml_runs_no_code(tmp_path):
    path, trace = tmp_path / "gd.yaml", tmp_path / "trace"
    path.write_text(f"beta: !!python/object/apply:os.mkdir ['{trace}']\n")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: could not determine a constructor"):
        GradientDecayConfig.load(path)
    assert not trace.exists()
    yaml.unsafe_load(path.read_text())  # control: the file is a working attack
    assert trace.exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gd.json", '{"beta": NaN}', "beta must be finite, got nan"),
        ("gd.json", '{"beta": ', "Expecting value"),
        ("gd.json", "beta: 1.0\n", "Expecting value"),
        ("gd.yaml", "beta: [1.0\n", "while parsing"),
        ("gd.yaml", "", "a configuration must be a mapping of names to values, got NoneType"),
        ("gd.yaml", "beta_strat: 1.0\n", "beta_strat is not a field of GradientDecayConfig; did you mean beta_start?"),
    ],
)
def test_errors_of_load_name_the_file_in_one_line(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}") as caught:
        GradientDecayConfig.load(path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- resolve


@pytest.mark.parametrize(
    ("length", "arguments", "ratio"),
    [
        ({"warmup_steps": 30}, (120,), 0.25),
        ({"warmup_steps": 120}, (120,), 1.0),
        ({"warmup_epochs": 1.5}, (120, 20), 0.25),
        ({"warmup_epochs": 6}, (120, 20), 1.0),
        ({"warmup_ratio": 0.3}, (120,), 0.3),
        ({"warmup_ratio": 0.3}, (120, 20), 0.3),
    ],
)
def test_resolve(length, arguments, ratio):
    config = GradientDecayConfig(beta=1.0, beta_start=0.01, schedule="cosine", **length)
    expected = GradientDecayConfig(beta=1.0, beta_start=0.01, schedule="cosine", warmup_ratio=ratio)
    resolved = config.resolve(*arguments)
    assert resolved == expected
    assert resolved.resolve(7) == expected  # nothing is left to resolve
    assert config == GradientDecayConfig(beta=1.0, beta_start=0.01, schedule="cosine", **length)


@pytest.mark.parametrize(
    ("length", "arguments", "message"),
    [
        (
            {"warmup_steps": 121},
            (120, 20),
            "warmup_steps is 121, 121 updates, but training has only 120; lower warmup_steps or train longer",
        ),
        (
            {"warmup_epochs": 6.5},
            (120, 20),
            "warmup_epochs is 6.5, 130 updates, but training has only 120; lower warmup_epochs or train longer",
        ),
        (
            {"warmup_epochs": 2},
            (120,),
            "warmup_epochs is 2 but the length of an epoch is unknown; use warmup_ratio or warmup_steps",
        ),
    ],
)
def test_errors_of_resolve(length, arguments, message):
    with pytest.raises(ValueError, match=exactly(message)):
        GradientDecayConfig(beta=1.0, beta_start=0.01, **length).resolve(*arguments)


@pytest.mark.parametrize(("epochs", "per_epoch", "total"), [(0.28, 25, 7), (0.55, 100, 55), (2.2, 15, 33)])
def test_a_warmup_of_the_whole_training_is_not_too_long(epochs, per_epoch, total):
    # 0.28 * 25 is 7.000000000000001 in floating point, and is 7 updates of 7.
    assert epochs * per_epoch >= total
    config = GradientDecayConfig(beta=1.0, beta_start=0.01, warmup_epochs=epochs)
    assert config.resolve(total, per_epoch).warmup_ratio == 1.0


# ---------------------------------------------------------------------------------------------------------- beta_at

MOVING = [name for name in SCHEDULES if name != "constant"]
betas = st.floats(1e-6, 1e6)


@pytest.mark.parametrize(
    ("schedule", "way", "expected"),
    [
        ("linear", 0.25, 0.75 * 0.01 + 0.25 * 4),
        ("linear", 0.5, 2.005),
        ("geometric", 0.25, 0.01**0.75 * 4**0.25),
        ("geometric", 0.5, 0.2),
        ("cosine", 0.25, 0.01 + 3.99 * (1 - math.sqrt(0.5)) / 2),
        ("cosine", 0.5, 2.005),
    ],
)
def test_shapes_of_the_schedules(schedule, way, expected):
    config = GradientDecayConfig(beta=4.0, beta_start=0.01, schedule=schedule, warmup_ratio=0.4)
    assert beta_at(config, 0.4 * way) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_start_beta_is_constant(schedule):
    config = GradientDecayConfig(beta=0.3, schedule=schedule)
    assert [beta_at(config, progress) for progress in (0, 0.5, 1, 3)] == [0.3] * 4


@st.composite
def warmups(draw):
    schedule, start, end = draw(st.sampled_from(MOVING)), draw(betas), draw(betas)
    total = draw(st.integers(1, 100_000))
    steps = draw(st.integers(1, total))
    return GradientDecayConfig(beta=end, beta_start=start, schedule=schedule, warmup_steps=steps), total


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(warmups(), st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_properties_of_a_warmup(warmup, ways):
    config, total = warmup
    steps, resolved = config.warmup_steps, config.resolve(total)
    low, high = sorted((config.beta_start, config.beta))

    assert beta_at(resolved, 0.0) == config.beta_start
    assert beta_at(resolved, steps / total) == config.beta  # the update after the last of the warm-up, exactly
    assert [beta_at(resolved, progress) for progress in (1.0, 1.5, 1e6, math.inf)] == [config.beta] * 4
    if steps > 1 and high > 1.01 * low:
        before = beta_at(resolved, (steps - 1) / total)
        assert abs(before - config.beta) < abs(config.beta_start - config.beta)

    values = [beta_at(resolved, way * steps / total) for way in sorted(ways)]
    assert values == [beta_at(resolved, way * steps / total) for way in sorted(ways)]  # pure: no memory of the calls
    rounding = 1e-12
    assert all(low * (1 - rounding) <= value <= high * (1 + rounding) for value in values)
    rising = config.beta >= config.beta_start
    for first, second in itertools.pairwise(values):
        assert second >= first * (1 - rounding) if rising else second <= first * (1 + rounding)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(MOVING), betas, st.lists(betas, min_size=1, max_size=5), st.floats(0, 2), st.booleans())
def test_per_class_is_each_class_by_itself(schedule, one, many, progress, start_is_per_class):
    def config(beta_start, beta):
        return GradientDecayConfig(beta=beta, beta_start=beta_start, schedule=schedule, warmup_ratio=0.5)

    pairs = [(b, one) if start_is_per_class else (one, b) for b in many]
    expected = tuple(beta_at(config(*pair), progress) for pair in pairs)
    assert beta_at(config(*((many, one) if start_is_per_class else (one, many))), progress) == (
        expected if not start_is_per_class or progress < 0.5 else one
    )
    both = config([s for s, _ in pairs], [e for _, e in pairs])
    assert beta_at(both, progress) == expected


@pytest.mark.parametrize("progress", [-0.1, math.nan])
def test_progress_that_is_no_progress(progress):
    message = f"progress must be a fraction of training >= 0, got {progress}"
    with pytest.raises(ValueError, match=exactly(message)):
        beta_at(GradientDecayConfig(**WARMUP), progress)


@pytest.mark.parametrize("length", [{"warmup_steps": 10}, {"warmup_epochs": 1.5}])
def test_a_length_that_is_not_resolved(length):
    message = "beta_at needs the warm-up as a fraction: call config.resolve(total_updates) first"
    with pytest.raises(ValueError, match=exactly(message)):
        beta_at(GradientDecayConfig(beta=1.0, beta_start=0.1, **length), 0.5)
