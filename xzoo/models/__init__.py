"""The zoo's architectures in timm's registry; importing this registers them.

A name fixes an architecture's compression and graph; every model also takes compression=, share=,
spatial_share=, graph= and seed=. compression=1 is the dense twin, graph="group" or "shuffle" a
rival.
"""

# into the registry
from . import x_air, x_alexnet, x_densenet, x_mobilenet, x_resnet, x_timm, x_vgg  # noqa: F401
from .registry import create_model, list_models

__all__ = ["create_model", "list_models"]
