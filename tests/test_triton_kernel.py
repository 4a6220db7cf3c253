"""The Triton kernels: in Triton's interpreter, compiled for GPUs that are not here, and on one."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gd_plugin
from gd_plugin import by_hand, gradient_decay_cross_entropy

ROOT = Path(gd_plugin.__file__).parents[1]


def run(*argv, **environment):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env)


def test_in_the_interpreter():
    """`triton_checks`, in a process of its own: Triton reads the variable when a kernel is defined."""
    pytest.importorskip("triton")
    checks = Path(__file__).with_name("triton_checks.py")
    done = run("-m", "pytest", "-p", "no:cacheprovider", str(checks), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_kernels_compile(dtype, target, tmp_path, monkeypatch):
    """Without a GPU: what the interpreter takes the compiler may not."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gd_plugin import triton_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    logits, per_row = f"*{dtype}", {"top": "*fp32", "total": "*fp32"}
    start = {"logits": logits, "row_stride": "i64", "target": "*i64"}
    forward = start | {"of_target": logits, "gap": "*fp64"} | per_row | {"num_classes": "i32"}
    backward = start | {"grad": "*fp64"} | per_row | {"out": logits, "out_stride": "i64", "num_classes": "i32"}
    shared = start | {"target_stride": "i64", "weight": "*fp32", "beta_less_one": "*fp32", "keep": "fp32"}
    shared |= {"spread": "fp32", "of_top": "*i64", "numbers": "*fp32", "numbers_stride": "i64"}
    own = {"a_of_top": "*fp32", "grad": "*fp32", "out": logits, "out_stride": "i64"}
    flags = {"SOFT": False, "WEIGHTED": True, "PER_CLASS": True}
    soft = {"SOFT": True, "WEIGHTED": False, "PER_CLASS": False}
    kernels = [(triton_kernel._forward, forward, {}), (triton_kernel._backward, backward, {})]
    for constants in (flags, soft):
        types = shared | {"target": logits if constants["SOFT"] else "*i64"}
        kernels += [
            (triton_kernel._forward_probabilities, types | {"num_classes": "i32"}, constants),
            (triton_kernel._backward_probabilities, types | own | {"num_classes": "i32"}, constants),
        ]
    for kernel, types, constants in kernels:
        constants = constants | {"BLOCK": 4096}
        order = kernel.arg_names
        source = ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in order},
            constexprs={(order.index(name),): value for name, value in constants.items()},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton, of its own defaults
            compiled = triton.compile(source, target=GPUTarget(*target), options={"num_warps": 8})
        assert compiled.asm["cubin" if target[0] == "cuda" else "hsaco"]
        if kernel is triton_kernel._backward and dtype != "fp32" and target[0] == "cuda":
            # The interpreter cuts bf16 off instead of rounding it to the nearest.
            assert f"cvt.rn.{dtype.replace('fp', 'f')}" in compiled.asm["ptx"]


def test_triton_is_not_imported_where_it_is_not_used():
    code = "import sys, torch, gd_plugin; z = torch.zeros(2, 3, requires_grad=True); {}; print('triton' in sys.modules)"
    call = "gd_plugin.gradient_decay_cross_entropy(z, torch.tensor([0, 1])).backward()"
    assert run("-c", code.format(call), TRITON_INTERPRET="0").stdout == "False\n"
    control = run("-c", code.format(call), TRITON_INTERPRET="1")  # where it is used it is
    assert control.stdout == "True\n", control.stderr


def test_without_triton_the_plain_way(monkeypatch):
    by_hand._kernels.cache_clear()
    monkeypatch.setattr(by_hand, "_KERNELS_ON_CPU", True)
    monkeypatch.delitem(sys.modules, "gd_plugin.triton_kernel", raising=False)
    monkeypatch.delattr(gd_plugin, "triton_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    try:
        logits, target = torch.randn(4, 5), torch.arange(4)
        torch.testing.assert_close(gradient_decay_cross_entropy(logits, target), F.cross_entropy(logits, target))
        assert by_hand._kernels() is None
    finally:
        by_hand._kernels.cache_clear()


def test_where_it_does_not_compile_the_plain_way_and_a_warning(monkeypatch):
    triton_kernel = pytest.importorskip("gd_plugin.triton_kernel")
    by_hand._kernels.cache_clear()
    triton_kernel._works.cache_clear()

    def broken(*args):
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(by_hand, "_KERNELS_ON_CPU", True)
    monkeypatch.setattr(triton_kernel, "_launch", broken)
    logits, target = torch.randn(4, 5), torch.arange(4)
    try:
        with pytest.warns(UserWarning, match="without its Triton kernel: RuntimeError: no C compiler$"):
            loss = gradient_decay_cross_entropy(logits, target)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(gradient_decay_cross_entropy(logits, target), loss)  # said once
        torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    finally:
        triton_kernel._works.cache_clear()


# ------------------------------------------------------------------------------------------------------- on a GPU


def forward_and_backward(loss, logits, target):
    """The loss, the gradient, and the most memory besides what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = loss(logits, target)
    (grad,) = torch.autograd.grad(value, logits)
    return value.detach(), grad, torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
def test_a_vocabulary_on_a_gpu():
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(8192, 128_256, device="cuda", dtype=torch.bfloat16, generator=generator).mul_(4)
    logits.requires_grad_()
    target = torch.randint(128_256, (8192,), device="cuda", generator=generator)
    target[::7] = -100
    assert by_hand._rows_for_kernel(logits) is not None

    def ours(z, c):
        return gradient_decay_cross_entropy(z, c, 0.1)

    ours(logits[:8], target[:8]).backward()  # compiles
    value, grad, memory = forward_and_backward(ours, logits, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(logits, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    logits.grad = None
    few = slice(0, 256)  # the plain way in fp64 of a few rows, which is 256 MiB a tensor
    twin = logits.detach()[few].double().requires_grad_()
    kept = (target != -100).sum()
    plain = gradient_decay_cross_entropy(twin, target[few], 0.1, reduction="sum") / kept
    (wanted,) = torch.autograd.grad(plain, twin)
    error = (grad[few].double() - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)
    assert error.max() <= torch.finfo(torch.bfloat16).eps
    assert value.isfinite() and grad[target == -100].eq(0).all()
    del grad, twin, wanted, plain

    _, _, usual = forward_and_backward(F.cross_entropy, logits, target)
    assert memory <= usual / 2


@pytest.mark.gpu
@pytest.mark.parametrize("beta", [1e-6, 0.1, 1.0, 10.0, 1e6])
@pytest.mark.parametrize("num_classes", [2, 10, 1000, 4097, 50_257])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_fp32_on_a_gpu(num_classes, beta, smoothing):
    logits = (4 * torch.randn(64, num_classes)).cuda().requires_grad_()
    target = torch.randint(num_classes, (64,)).cuda()
    loss = gradient_decay_cross_entropy(logits, target, beta, reduction="none", label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    twin = logits.detach().double().requires_grad_()  # fp64 has no kernel
    plain = gradient_decay_cross_entropy(twin, target, beta, reduction="none", label_smoothing=smoothing)
    (wanted,) = torch.autograd.grad(plain.sum(), twin)
    torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=1e-6)
    assert ((grad - wanted).norm(dim=1) <= 1e-6 * wanted.norm(dim=1) + 1e-37).all()
