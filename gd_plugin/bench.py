"""``python -m gd_plugin.bench``: what the loss costs beside its peers, in one run on this machine.

Times are forward and backward, interleaved: in every round each route has its turn, so that what else the machine does
meanwhile meets all of them. Peak memory is measured in a fresh process per route. Needs the extra ``bench``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from .functional import gradient_decay_cross_entropy
from .linear import linear_gradient_decay_cross_entropy
from .parser import Parser
from .plots import COLOURS, save
from .record import environment, json_text, write_json
from .terminal import Console

__all__ = ["main"]

BETA, SMOOTHING, MARGIN = 5.0, 0.1, 0.35
SHAPES = ((128, 10), (1024, 1000), (4096, 1000), (2048, 50257))
GPU_SHAPES = (*SHAPES, (8192, 128256))
LINEAR = (2048, 256, 50257)
CLASSES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
ROWS = 32  # of the logits of so many classes
SHORTEST = 5e-3  # seconds: what is faster is repeated within a measurement
PARTS = ("logits", "smoothing", "linear", "classes", "step")

Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One comparison: its routes in a table, the first of them the baseline."""

    part: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @property
    def name(self) -> str:
        return f"{self.part} {' x '.join(map(str, self.shape))}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def routes(self) -> dict[str, Callable[[Case], Step]]:
        if self.part == "classes":
            return {name: _ROUTES["logits"][name] for name in _DRAWN}
        return _ROUTES[self.part]

    @property
    def bytes_moved(self) -> int:
        """The least there is to move: the logits read once, their gradient written once."""
        return 2 * self.shape[0] * self.shape[-1] * self.dtype.itemsize

    def logits(self) -> tuple[Tensor, Tensor]:
        rows, classes = self.shape
        generator = torch.Generator(self.device).manual_seed(0)
        logits = torch.randn(rows, classes, generator=generator, device=self.device).to(self.dtype)
        target = torch.randint(classes, (rows,), generator=generator, device=self.device)
        return logits.requires_grad_(), target

    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, width, classes = self.shape
        generator = torch.Generator(self.device).manual_seed(0)
        input = torch.randn(rows, width, generator=generator, device=self.device).to(self.dtype)
        weight = (torch.randn(classes, width, generator=generator, device=self.device) / 16).to(self.dtype)
        target = torch.randint(classes, (rows,), generator=generator, device=self.device)
        return input.requires_grad_(), weight.requires_grad_(), target


# Routes: a case in, what is timed out. What cannot be had raises ImportError or RuntimeError, one line.


def _of_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Case], Step]:
    def prepare(case: Case) -> Step:
        logits, target = case.logits()

        def step() -> None:
            logits.grad = None
            loss(logits, target).backward()

        return step

    return prepare


def _compiled(loss: Callable[..., Tensor]) -> Callable[[Case], Step]:
    return lambda case: _of_logits(torch.compile(loss, dynamic=False))(case)


def _ours(logits: Tensor, target: Tensor) -> Tensor:
    return gradient_decay_cross_entropy(logits, target, BETA)


def _ours_smoothed(logits: Tensor, target: Tensor) -> Tensor:
    return gradient_decay_cross_entropy(logits, target, BETA, label_smoothing=SMOOTHING)


def _smoothed(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=SMOOTHING)


def _margin_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    """As users write it: the margin log(beta) added to a clone of the logits."""
    shifted = logits.clone()
    rows = torch.arange(len(target), device=target.device)
    shifted[rows, target] = shifted[rows, target] + torch.log(torch.tensor(BETA))
    return F.cross_entropy(shifted, target)


def _textbook(logits: Tensor, target: Tensor) -> Tensor:
    """As the paper has it, with one-hot vectors and exponentials."""
    onehot = F.one_hot(target, logits.shape[1])
    exp = (logits - logits.amax(1, keepdim=True)).exp()
    of_target = (exp * onehot).sum(1)
    return -(of_target / (exp.sum(1) + (BETA - 1) * of_target)).log().mean()


def _liger(case: Case) -> Step:
    _needs_gpu(case, "Triton")
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss()
    return _of_logits(lambda logits, target: loss(logits.clone(), target))(case)  # it overwrites what it is given


def _poly(case: Case) -> Step:
    from timm.loss import PolyCrossEntropy  # from timm 1.0.31 on

    return _of_logits(PolyCrossEntropy())(case)


def _timm_smoothing(case: Case) -> Step:
    from timm.loss import LabelSmoothingCrossEntropy

    return _of_logits(LabelSmoothingCrossEntropy(SMOOTHING))(case)


def _of_head(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Case], Step]:
    def prepare(case: Case) -> Step:
        input, weight, target = case.head()

        def step() -> None:
            input.grad = weight.grad = None
            loss(input, weight, target).backward()

        return step

    return prepare


def _torch_linear(**options) -> Callable[[Case], Step]:
    def prepare(case: Case) -> Step:
        if not hasattr(F, "linear_cross_entropy"):
            raise ImportError("needs torch >= 2.15")
        if options:
            from torch.nn import LinearCrossEntropyOptions

            more = {"options": LinearCrossEntropyOptions(**options)}
        else:
            more = {}
        return _of_head(lambda input, weight, target: F.linear_cross_entropy(input, weight, target, **more))(case)

    return prepare


def _liger_linear(case: Case) -> Step:
    _needs_gpu(case, "Triton")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return _of_head(lambda input, weight, target: loss(weight, input, target))(case)


def _cut(case: Case) -> Step:
    _needs_gpu(case, "Triton")
    from cut_cross_entropy import linear_cross_entropy

    return _of_head(lambda input, weight, target: linear_cross_entropy(input, weight, target, filter_eps=None))(case)


def _metric_learning(case: Case) -> Step:
    from pytorch_metric_learning.losses import CosFaceLoss

    _, width, classes = case.shape
    input, weight, target = case.head()
    loss = CosFaceLoss(num_classes=classes, embedding_size=width, margin=MARGIN)
    loss.W = torch.nn.Parameter(weight.detach().t().contiguous())

    def step() -> None:
        input.grad = loss.W.grad = None
        loss(input, target).backward()

    return step


def _needs_gpu(case: Case, what: str) -> None:
    if case.device == "cpu":
        raise RuntimeError(f"{what}: a GPU")


_OURS = "gradient-decay"
_DRAWN = ("F.cross_entropy", _OURS, "by hand: one-hot")  # against the number of classes
_ROUTES: dict[str, dict[str, Callable[[Case], Step]]] = {
    "logits": {
        "F.cross_entropy": _of_logits(F.cross_entropy),
        _OURS: _of_logits(_ours),
        "F.cross_entropy, compiled": _compiled(F.cross_entropy),
        f"{_OURS}, compiled": _compiled(_ours),
        "Liger cross-entropy": _liger,
        "timm PolyCrossEntropy": _poly,
        "by hand: margin on a clone": _of_logits(_margin_by_hand),
        "by hand: one-hot": _of_logits(_textbook),
    },
    "smoothing": {
        "F.cross_entropy, smoothing 0.1": _of_logits(_smoothed),
        f"{_OURS}, smoothing 0.1": _of_logits(_ours_smoothed),
        f"{_OURS}, smoothing 0.1, compiled": _compiled(_ours_smoothed),
        "timm LabelSmoothingCrossEntropy": _timm_smoothing,
    },
    "linear": {
        "F.linear + F.cross_entropy": _of_head(lambda i, w, t: F.cross_entropy(F.linear(i, w), t)),
        f"{_OURS}, linear": _of_head(lambda i, w, t: linear_gradient_decay_cross_entropy(i, w, t, BETA)),
        f"F.linear + {_OURS}": _of_head(lambda i, w, t: _ours(F.linear(i, w), t)),
        "F.linear_cross_entropy": _torch_linear(),
        "F.linear_cross_entropy, 512 rows": _torch_linear(batch_chunk_size=512, chunking_method=None),
        "Liger fused linear": _liger_linear,
        "cut-cross-entropy": _cut,
        "pytorch-metric-learning CosFace": _metric_learning,
    },
}


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
    # A first step of a few rows brings in the code and the threads, which are no memory of the loss.
    small = Case(case.part, (min(16, case.shape[0]), *case.shape[1:-1], min(100, case.shape[-1])), case.dtype, "cpu")
    case.routes[route](small)()
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


def growth(points: list[dict], route: str = _OURS) -> float:
    """The exponent with which time grows with the number of classes, fitted from 10,000 on: 1 is linear."""
    large = [point for point in points if point["classes"] >= 10_000]
    x = np.log([point["classes"] for point in large])
    y = np.log([statistics.median(point["routes"][route]["seconds"]) for point in large])
    return float(np.polyfit(x, y, 1)[0])


def peak_in_mib(name: str, route: dict) -> str:
    """Empty where it is not known: the compiler's own memory is part of what was measured for a compiled route."""
    return "" if route.get("peak") is None or "compiled" in name else f"{route['peak'] / 2**20:.0f}"


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
        mib = peak_in_mib(name, route)
        rows.append([name, f"{median:.2f} ({low:.2f} to {high:.2f})", f"{1e3 * seconds:.3g}", mib or "-", share])
    return ["route", f"time / {base}", "ms", "peak MiB", "of copy bandwidth"], rows


def plot_classes(result: dict, path: Path) -> None:
    """Time and peak memory against the number of classes."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    points = result["classes"]
    for colour, name in zip(COLOURS, _DRAWN, strict=False):
        x = [point["classes"] for point in points]
        panels[0].loglog(
            x, [1e3 * statistics.median(p["routes"][name]["seconds"]) for p in points], "o-", color=colour, label=name
        )
        known = [(p["classes"], p["routes"][name]["peak"] / 2**20) for p in points if p["routes"][name].get("peak")]
        if known:
            panels[1].loglog(*zip(*known, strict=True), "o-", color=colour, label=name)
    panels[0].set(xlabel="classes", ylabel="ms, forward and backward", title=f"Time of {ROWS} rows")
    panels[1].set(xlabel="classes", ylabel="MiB beyond the logits", title="Peak memory")
    panels[0].legend()
    for panel in panels:
        panel.grid(alpha=0.3)
    save(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Run ``python -m gd_plugin.bench`` and return its exit code."""
    parser = Parser(
        prog="python -m gd_plugin.bench",
        description="Times the loss beside its peers, interleaved in one run; prints ratios, writes bench.json and "
        "classes.png. About half an hour on two CPU cores.",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("bench"), help="default: bench")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all of them")
    parser.add_argument("--rounds", type=int, default=20, help="of every comparison; default: 20")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    parser.add_argument("--largest", type=int, help="leave out logits of more numbers than this")
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
    run(options, Console(emoji=False))
    return 0


def run(options, console: Console) -> dict:
    """Measure what is asked for, and write it after every comparison."""
    device = options.device
    dtype = getattr(torch, options.dtype or ("float32" if device == "cpu" else "bfloat16"))
    cases = [
        Case(part, shape, dtype, device)
        for part, shapes in (
            ("logits", SHAPES if device == "cpu" else GPU_SHAPES),
            ("smoothing", SHAPES[2:3]),
            ("linear", (LINEAR,)),
            ("classes", tuple((ROWS, classes) for classes in CLASSES)),
        )
        if part in options.parts
        for shape in shapes
        if options.largest is None or shape[0] * shape[-1] <= options.largest
    ]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / "bench.json"
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
            routes = measure(case, options.rounds, tick)
            for name, route in routes.items():
                if "seconds" in route:
                    route["peak"] = _peak_of_fresh_process(case, name)
                tick()
            known = {"name": case.name, "bytes_moved": case.bytes_moved if case.part != "linear" else 0,
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
            powers = ", ".join(f"{name} {growth(result['classes'], name):.2f}" for name in _DRAWN)
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
