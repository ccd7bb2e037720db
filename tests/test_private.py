"""The private names of torch that the package relies on: there, and meaning what we take them for.

A torch release that moves one fails here by name, and not as a wrong gradient somewhere else.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastdistill import _torch_private


def test_the_names_are_there():
    assert _torch_private._transform_active is not None
    assert _torch_private._level is not None
    assert _torch_private._keep_graph is not None
    assert _torch_private._batched is not None
    assert _torch_private._fake is not None
    assert _torch_private._dispatch_mode is not None
    assert hasattr(_torch_private._mode_keys, "PROXY")
    assert hasattr(torch.autograd.forward_ad, "_current_level")


def test_transforms_are_seen():
    seen = []

    def look(x):
        seen.append(_torch_private.transforms_active())
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    with torch.autograd.forward_ad.dual_level():
        look(torch.ones(2))
    look(torch.ones(2))
    assert seen == [False, True, True, True, True, False]


def test_a_graph_that_may_run_again_is_seen():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(_torch_private.may_overwrite(grad))
            return grad

    y = Look.apply(torch.ones(2, requires_grad=True)).sum()
    y.backward(retain_graph=True)
    y.backward()
    x = torch.ones(2, requires_grad=True)
    y = Look.apply(x)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [False, True, False]


def test_tensors_without_values_are_seen():
    assert _torch_private.has_values(torch.ones(2))
    with FakeTensorMode():
        assert not _torch_private.has_values(torch.ones(2))
    assert not _torch_private.has_values(torch.ones(2, device="meta"))
    seen = []
    torch.func.vmap(lambda x: (seen.append(_torch_private.has_values(x)), x)[1])(torch.ones(2))
    make_fx(lambda x: (seen.append(_torch_private.has_values(x)), x)[1])(torch.ones(2))
    assert seen == [False, False] and _torch_private.has_values(torch.ones(2))


def test_a_product_of_bfloat16_matrices_in_float32():
    """C += A' B, and nothing is rounded to bfloat16."""
    gemm = _torch_private.gemm_bf16bf16f32()
    assert gemm is not None or not torch.backends.mkl.is_available()
    if gemm is None:
        return
    a, b, c = torch.randn(50, 7).bfloat16(), torch.randn(50, 9).bfloat16(), torch.ones(7, 9)
    arguments = (a.data_ptr(), 7, b.data_ptr(), 9, 1.0, c.data_ptr(), 9)
    gemm(101, 112, 111, 7, 9, 50, 1.0, *arguments)
    want = 1 + a.double().t() @ b.double()
    torch.testing.assert_close(c.double(), want, rtol=1e-5, atol=1e-5)
