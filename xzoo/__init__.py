"""xzoo: a model zoo of Deep Expander Networks.

    import xzoo

    model = xzoo.create_model("x_resnet50", num_classes=10)  # timm's interface; timm knows x_* too
    report = xzoo.expand(my_model, compression=4)            # converts your own model, in place
    print(xzoo.profile(model, (3, 224, 224)).macs)

Layers: ExpanderConv2d, ExpanderLinear. Graphs and their theory: xzoo.graphs, xzoo.theory. Training:
xzoo.train, on images from xzoo.data; results: xzoo.results. tests/test_package.py says which module
may import which.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import machine

machine.wait_briefly()  # before anything imports torch

__version__ = "0.1.0"

# `import xzoo` registers the models with timm, so it imports torch and timm, which takes seconds.
# Only the xzoo command puts that off until it runs something: --help and the answer to a misspelled
# command come at once.
if TYPE_CHECKING or not machine.is_command():
    from .public import *  # noqa: F403
    from .public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """A module or a public name of xzoo, imported when it is first used."""
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if find_spec(f".{name}", __name__) is not None:
            return import_module(f".{name}", __name__)
        return getattr(import_module(".public", __name__), name)
