"""The public names of xzoo. Importing them registers the models with timm.

A module of its own, because the `xzoo` command imports it only when it needs it: see __init__.py.
"""

from . import graphs, ops, theory
from .convert import expand, to_dense
from .deploy import deploy
from .errors import DataError, GraphError, ModelError, XzooError
from .layers import ExpanderConv2d, ExpanderLinear
from .models import create_model, list_models
from .norms import fuse
from .profile import profile

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
    "fuse",
    "graphs",
    "list_models",
    "ops",
    "profile",
    "theory",
    "to_dense",
]
