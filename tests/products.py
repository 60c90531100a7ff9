"""All that a layer computes, for the tests of kernels: by a backend, or by torch on the dense
weight.
"""

import torch.nn.functional as F

from xzoo import ops

NAMES = ("y", "dx", "dw", "db")


def results(case, backend, dtype):
    """(y, dx, dw, db) of a case, by a backend, or by torch on the dense weight (None)."""
    x, weight, rows, bias, grad, geometry = case
    x, weight = (t.to(dtype).detach().clone().requires_grad_() for t in (x, weight))
    bias = None if bias is None else bias.to(dtype, copy=True).requires_grad_()
    if backend is None:
        dense = ops.dense.scatter(weight, rows, x.shape[1])
        y = F.conv2d(x, dense, bias, *geometry) if geometry else F.linear(x, dense, bias)
    else:
        with ops.backend(backend):
            y = (
                ops.conv2d(x, weight, rows, bias, *geometry)
                if geometry
                else ops.linear(x, weight, rows, bias)
            )
    y.backward(grad.to(dtype))
    return y.detach(), x.grad, weight.grad, None if bias is None else bias.grad
