"""``python -m gd_plugin.bench``: what the loss costs beside its peers, in one run on this machine.

Times are forward and backward, interleaved: in every round each route has its turn, so that what else the machine does
meanwhile meets all of them. Peak memory is measured in a fresh process per route. Needs the extra ``bench``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .bench_routes import BETA, DRAWN, OURS, ROUTES, Case, Step
from .parser import Parser
from .plots import COLOURS, save
from .record import environment, json_text, write_json
from .terminal import Console

__all__ = ["main"]

SHAPES = ((128, 10), (1024, 1000), (4096, 1000), (2048, 50257))
GPU_SHAPES = (*SHAPES, (8192, 128256))
LINEAR = (2048, 256, 50257)
MODEL = (1024, 256, 128256)  # tokens, width and vocabulary of a language model
CLASSES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
ROWS = 32  # of the logits of so many classes
SHORTEST = 5e-3  # seconds: what is faster is repeated within a measurement
PARTS = ("logits", "smoothing", "linear", "model", "classes", "step")


# Measuring ------------------------------------------------------------------------------------------------------------


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _seconds(step: Step, repeats: int, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def measure(case: Case, rounds: int, tick: Callable[[], None]) -> dict[str, dict]:
    """Seconds of every route in every round; in place of them the reason where there is none."""
    steps, found = {}, {}
    for name, prepare in case.routes.items():
        try:
            step = prepare(case)
            step()  # imports, compiles, allocates
            repeats = max(1, round(SHORTEST / _seconds(step, 1, case.device)))
            steps[name] = (step, repeats)
            found[name] = {"seconds": []}
        except (ImportError, RuntimeError) as error:
            found[name] = {"absent": str(error).strip().splitlines()[0]}
        tick()
    turns = list(steps)
    for _ in range(rounds):
        for name in turns:
            step, repeats = steps[name]
            found[name]["seconds"].append(_seconds(step, repeats, case.device))
        turns.append(turns.pop(0))  # nobody always comes after the same neighbour
        tick()
    return found


def peak(case: Case, route: str) -> int | None:
    """Bytes that a step takes at most beyond its inputs, in this process; None where that cannot be known."""
    case.routes[route](case)()  # compiles, and brings in the code and the threads, which are no memory of the loss
    step = case.routes[route](case)
    if case.device != "cpu":
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    gc.collect()
    # What the first step has freed is given back, or its pages would not count.
    getattr(ctypes.CDLL(None), "malloc_trim", id)(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _kib(status, "VmRSS")
    step()
    return 1024 * (_kib(status, "VmHWM") - before)


def _kib(status: Path, key: str) -> int:
    return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(f"{key}:")))


def _peak_of_fresh_process(case: Case, route: str) -> int | None:
    words = ["--peak", json.dumps([case.part, case.shape, str(case.dtype).removeprefix("torch."), case.device, route])]
    done = subprocess.run([sys.executable, "-m", "gd_plugin.bench", *words], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def bandwidth(device: str) -> float:
    """Bytes per second that a copy reads and writes on this machine; the median of twenty."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * len(source) / statistics.median(_seconds(lambda: target.copy_(source), 1, device) for _ in range(20))


# Results --------------------------------------------------------------------------------------------------------------


def summary(routes: dict[str, dict], base: str) -> dict[str, tuple[float, float, float]]:
    """Smallest, median and largest ratio to the baseline, round by round."""
    of_base = routes[base]["seconds"]
    ratios = {
        name: sorted(a / b for a, b in zip(route["seconds"], of_base, strict=True))
        for name, route in routes.items()
        if "seconds" in route
    }
    return {name: (values[0], statistics.median(values), values[-1]) for name, values in ratios.items()}


def growth(points: list[dict], route: str = OURS) -> float:
    """The exponent with which time grows with the number of classes, fitted from 10,000 on: 1 is linear."""
    large = [point for point in points if point["classes"] >= 10_000]
    x = np.log([point["classes"] for point in large])
    y = np.log([statistics.median(point["routes"][route]["seconds"]) for point in large])
    return float(np.polyfit(x, y, 1)[0])


def peak_in_mib(route: dict) -> str:
    """Empty where it is not known."""
    return "" if route.get("peak") is None else f"{route['peak'] / 2**20:.0f}"


def table(case: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a case: ratios to its first route."""
    base = next(iter(case["routes"]))
    found = summary(case["routes"], base)
    rows = []
    for name, route in case["routes"].items():
        if name not in found:
            rows.append([name, route["absent"], "", "", ""])
            continue
        low, median, high = found[name]
        seconds = statistics.median(route["seconds"])
        share = f"{100 * case['bytes_moved'] / seconds / case['bandwidth']:.0f} %" if case["bytes_moved"] else "-"
        mib = peak_in_mib(route)
        rows.append([name, f"{median:.2f} ({low:.2f} to {high:.2f})", f"{1e3 * seconds:.3g}", mib or "-", share])
    return ["route", f"time / {base}", "ms", "peak MiB", "of copy bandwidth"], rows


def plot_classes(result: dict, path: Path) -> None:
    """Time and peak memory against the number of classes."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    points = result["classes"]
    for colour, name in zip(COLOURS, DRAWN, strict=False):
        x = [point["classes"] for point in points]
        panels[0].loglog(
            x, [1e3 * statistics.median(p["routes"][name]["seconds"]) for p in points], "o-", color=colour, label=name
        )
        known = [(p["classes"], p["routes"][name]["peak"] / 2**20) for p in points if p["routes"][name].get("peak")]
        if known:
            panels[1].loglog(*zip(*known, strict=True), "o-", color=colour, label=name)
    panels[0].set(xlabel="classes", ylabel="ms, forward and backward", title=f"Time of {ROWS} rows")
    panels[1].set(xlabel="classes", ylabel="MiB beyond the logits", title=f"Peak memory of {ROWS} rows (no point: 0)")
    panels[0].legend()
    for panel in panels:
        panel.grid(alpha=0.3)
    save(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Run ``python -m gd_plugin.bench`` and return its exit code."""
    parser = Parser(
        prog="python -m gd_plugin.bench",
        description="Times the loss beside its peers, interleaved in one run; prints a table of ratios after every "
        "comparison, and writes bench.json (seconds of every round, bytes) and classes.png. About 20 minutes on two "
        "CPU cores.",
    )
    names = list(dict.fromkeys(name for routes in ROUTES.values() for name in routes))
    parser.add_argument("--output_dir", type=Path, default=Path("bench"), help="default: bench")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="default: all of them. logits: of "
        f"{', '.join('x'.join(map(str, shape)) for shape in SHAPES)} numbers (8 minutes); smoothing: with "
        "label smoothing (1); linear: from a head's input (2); model: a step of a Llama with 128,256 "
        "tokens (2); classes: from 10 to a million (4); step: training steps of a ResNet and a BERT (4)",
    )
    parser.add_argument(
        "--routes",
        nargs="+",
        choices=names,
        metavar="ROUTE",
        default=(),
        help=f"of the tables, besides their baselines; default: all of them, {', '.join(map(repr, names))}",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="of every comparison; default: 20. With few "
        "of them most of the time goes into compiling and into a fresh process per route, for its memory",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    parser.add_argument("--largest", type=int, help="leave out logits of more numbers than this, rows times classes")
    parser.add_argument("--peak", help="for the command itself: the peak memory of one route, in this process")
    try:
        options = parser.parse_args(argv)
        if options.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: there is no GPU here; leave it out")
    except ValueError as error:
        print(f"python -m gd_plugin.bench: error: {error}", file=sys.stderr)
        return 2
    if options.peak:
        part, shape, dtype, device, route = json.loads(options.peak)
        print(json.dumps(peak(Case(part, tuple(shape), getattr(torch, dtype), device), route)))
        return 0
    try:
        run(options, Console(emoji=False))
    except ValueError as error:
        print(f"python -m gd_plugin.bench: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options, console: Console) -> dict:
    """Measure what is asked for, and write it after every comparison."""
    device = options.device
    dtype = getattr(torch, options.dtype or ("float32" if device == "cpu" else "bfloat16"))
    cases = [
        Case(part, shape, dtype, device, tuple(options.routes))
        for part, shapes in (
            ("logits", SHAPES if device == "cpu" else GPU_SHAPES),
            ("smoothing", SHAPES[2:3]),
            ("linear", (LINEAR,)),
            ("model", (MODEL,)),
            ("classes", tuple((ROWS, classes) for classes in CLASSES)),
        )
        if part in options.parts
        for shape in shapes
        if options.largest is None or shape[0] * shape[-1] <= options.largest
    ]
    file = options.output_dir / "bench.json"
    if not cases and "step" not in options.parts:
        raise ValueError(f"--largest {options.largest} leaves nothing of these --parts to measure; give a larger one")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "format": 1,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "beta": BETA,
        "rounds": options.rounds,
        **environment(),
        "bandwidth": bandwidth(device),
        "cases": [],
        "classes": [],
        "step": [],
    }
    steps = ()
    if "step" in options.parts:
        from .bench_step import STEPS, measure_step  # and with it transformers, which a route's process can do without

        steps = STEPS
    total = sum(2 * len(case.routes) + options.rounds for case in cases) + len(steps)
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=total)

        def tick() -> None:
            progress.advance(bar)

        for case in cases:
            if not console.is_terminal:  # where there is no bar
                console.print(f"measuring {case.name}: {len(case.routes)} routes", markup=False)
            routes = measure(case, options.rounds, tick)
            for name, route in routes.items():
                if "seconds" in route:
                    route["peak"] = _peak_of_fresh_process(case, name)
                tick()
            known = {"name": case.name, "bytes_moved": 0 if case.part in ("linear", "model") else case.bytes_moved,
                     "bandwidth": result["bandwidth"], "routes": routes}  # fmt: skip
            if case.part == "classes":
                result["classes"].append({**known, "classes": case.shape[1]})
            else:
                result["cases"].append(known)
                _print(known, console)
            write_json(file, result)
        for model in steps:
            result["step"].append(measure_step(model, options.rounds, device))
            write_json(file, result)
            tick()
    if result["classes"]:
        plot_classes(result, options.output_dir / "classes.png")
        if max(point["classes"] for point in result["classes"]) > 10_000:
            powers = ", ".join(f"{name} {growth(result['classes'], name):.2f}" for name in DRAWN)
            console.print(
                f"time grows with the number of classes to the power of: {powers}", soft_wrap=True, markup=False
            )
    for step in result["step"]:
        low, median, high = step_ratio(step)
        console.print(
            f"a training step of {step['model']}: {median:.3f} ({low:.3f} to {high:.3f}) of the Trainer's", markup=False
        )
    console.print(f"All times: {file}", soft_wrap=True, markup=False)
    return json.loads(json_text(result))


def step_ratio(step: dict) -> tuple[float, float, float]:
    """Quartiles of the ratio of a step to the Trainer's, block by block."""
    ratios = [ours / plain for ours, plain in zip(step["gradient-decay"], step["trainer"], strict=True)]
    low, median, high = np.percentile(ratios, (25, 50, 75))
    return float(low), float(median), float(high)


def _print(case: dict, console: Console) -> None:
    head, rows = table(case)
    shown = Table(title=case["name"])
    for i, title in enumerate(head):
        shown.add_column(title, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


if __name__ == "__main__":
    sys.exit(main())
