"""The two operations of an X-layer, differentiable, and the choice of a backend: their only door.

    conv2d(x [B, C_in, H, W], weight [C_out, degree, kh, kw], neighbours [C_out / share, degree])
    linear(x [..., in],       weight [out, degree],           neighbours [out / share, degree])

operations.py has them.
"""

from . import dense as dense
from . import gather as gather
from . import group as group
from . import native as native
from . import triton as triton
from .backends import available
from .operations import backend, conv2d, linear

__all__ = ["available", "backend", "conv2d", "linear"]
