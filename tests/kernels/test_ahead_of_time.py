"""Kernels compiled ahead of their first run."""

import pytest
import torch

from utils.kernels import ahead_of_time, operations
from utils.kernels.ahead_of_time import compile_ahead


def table_of(gradient: torch.Tensor):
    """The gradient as the kernels take it."""
    table = operations.gradient_table([gradient.numel()], gradient.dtype, gradient.device)
    table.set_addresses([gradient])
    table.holds = gradient  # it has the address alone
    return table


@pytest.mark.gpu
class TestOnAGpu:
    def test_no_kernel_runs_in_a_rehearsal_and_all_run_after_it(self):
        grad = table_of(torch.ones(1 << 16, device="cuda", dtype=torch.float16))
        out = torch.full((1,), -1.0, device="cuda")
        image = torch.randn(2, 64, 8, 8, device="cuda", dtype=torch.float16, requires_grad=True)
        weight, bias = torch.ones(64, device="cuda", dtype=torch.float16), torch.zeros(64, device="cuda").half()
        compiled = []

        def launch_forwards_and_backwards():
            operations.grad_norm_(grad, out)
            y = operations.group_norm(image, weight, bias, 32, 1e-5, True)
            y.sum().backward()
            compiled.append(y.shape)

        assert compile_ahead(launch_forwards_and_backwards) is None
        assert compiled == [(2, 64, 8, 8)] and out.item() == -1.0
        image.grad = None
        launch_forwards_and_backwards()
        assert out.item() == 256.0
        expected = torch.autograd.grad(
            torch.nn.functional.silu(torch.nn.functional.group_norm(image.float(), 32)).sum(), image
        )[0]
        torch.testing.assert_close(image.grad, expected, rtol=2e-2, atol=2e-3)

    def test_a_failed_rehearsal_is_a_line_and_leaves_launches_as_they_were(self):
        def fails():
            raise RuntimeError("first line\nsecond line")

        assert compile_ahead(fails) == "RuntimeError: first line"
        out = torch.zeros(1, device="cuda")
        operations.grad_norm_(table_of(torch.ones(4096, device="cuda")), out)
        assert out.item() == 64.0

    def test_after_a_rehearsal_a_launch_is_only_a_launch(self, monkeypatch):
        from triton.runtime import driver

        grad = table_of(torch.full((1 << 12,), 0.5, device="cuda", dtype=torch.bfloat16))
        out = torch.zeros(1, device="cuda")
        assert compile_ahead(lambda: operations.grad_norm_(grad, out)) is None
        monkeypatch.setattr(driver.active, "launcher_cls", lambda *args: pytest.fail("a launcher is made"))
        operations.grad_norm_(grad, out)
        assert out.item() == 32.0


def test_a_compiled_kernel_is_made_ready_and_what_fails_there_waits_for_the_launch():
    class Kernel:
        readied = 0

        @property
        def run(self):
            Kernel.readied += 1
            raise RuntimeError("out of shared memory")

    assert isinstance(ahead_of_time._make_ready(Kernel), Kernel) and Kernel.readied == 1


def test_without_triton_nothing_is_rehearsed(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "AsyncCompileMode", None)
    assert compile_ahead(lambda: pytest.fail("must not be called")) is None
