"""xzoo: a model zoo of Deep Expander Networks.

    import xzoo

    model = xzoo.create_model("x_resnet50", num_classes=10)     # timm's interface; x_* is known to timm too
    report = xzoo.expand(any_model, compression=4)              # or convert a model of your own
    print(xzoo.profile(model, (3, 224, 224)).macs)

Layers: ExpanderConv2d, ExpanderLinear. Graphs and their theory: xzoo.graphs, xzoo.theory. Training:
xzoo.train, on images of xzoo.data; what came of it: xzoo.results. The stair of imports is in
tests/test_package.py.
"""

from . import machine

machine.wait_briefly()  # before anything imports torch

from . import graphs, ops
from .convert import expand, to_dense
from .deploy import deploy
from .errors import DataError, GraphError, ModelError, XzooError
from .layers import ExpanderConv2d, ExpanderLinear
from .models import create_model, list_models
from .profile import profile

__version__ = "0.1.0"

__all__ = [
    "DataError",
    "ExpanderConv2d",
    "ExpanderLinear",
    "GraphError",
    "ModelError",
    "XzooError",
    "create_model",
    "deploy",
    "expand",
    "graphs",
    "list_models",
    "ops",
    "profile",
    "to_dense",
]
