"""A model as a program that needs no xzoo to run: ONNX, or torch's own .pt2; with any number of
images at a time.

The .pt2 keeps X-layers as xzoo's operations (import xzoo to load it) and computes what the model
does. ONNX has no such operations: there every X-layer is a dense one, with as many weights and MACs
as its dense twin.
"""

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import files
from ..convert import to_dense
from ..errors import XzooError
from ..theory import graphs_of
from .folder import golden_input

ENDINGS = (".onnx", ".pt2")


@torch.no_grad()
def write(model: nn.Module, file: Path | str) -> str:
    """Write the program, run it on another number of images than it was made with, and compare;
    returns what to know.

    Args:
        file: ends in .onnx or .pt2; replaced only by what has given the model's own outputs.
    Raises: XzooError for another ending, without onnxruntime, or where outputs differ or the file
    cannot be written.
    """
    file = Path(file)
    if file.suffix not in ENDINGS:
        raise XzooError(f"{file}: the ending says which program to write, {' or '.join(ENDINGS)}")
    files.check_file(file)
    needed = ("onnx", "onnxruntime") if file.suffix == ".onnx" else ()
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        raise XzooError(f"{missing[0]} is not installed; `pip install 'xzoo[export]'`")
    net = cast(Any, model).cpu().eval()
    images = golden_input(net.pretrained_cfg["input_size"], 3)
    with files.atomic(file) as draft:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts of torch that its exporters call
            found = (
                _onnx(net, images, draft) if file.suffix == ".onnx" else _pt2(net, images, draft)
            )
        wanted = net(images)
        error = float((found - wanted).abs().max())
        if found.shape != wanted.shape or not error <= 1e-4 * max(1.0, float(wanted.abs().max())):
            raise XzooError(
                f"{file} is not written: its outputs differ from the model's by {error:.1e}"
            )
        size = draft.stat().st_size
    form = "no X-layers"
    if layers := len(graphs_of(net)):
        dense = "are dense here, with the weights and MACs of the dense twin"
        sparse = "stay sparse; `import xzoo` before loading it"
        form = f"the {layers} X-layers {dense if file.suffix == '.onnx' else sparse}"
    return (
        f"{size / 1e6:.2f} MB, any number of images, outputs within {error:.0e} of the model's; "
        f"{form}"
    )


def _onnx(net: nn.Module, images: Tensor, file: Path) -> Tensor:
    import onnx
    import onnxruntime

    to_dense(net := copy.deepcopy(net))
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    names["dynamic_axes"] = {"images": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(net, (images[:2],), str(file), dynamo=False, **names)
    onnx.checker.check_model(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(logits)


def _pt2(net: nn.Module, images: Tensor, file: Path) -> Tensor:
    program = torch.export.export(
        net, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    with open(file, "wb") as new:  # a name would have to end in .pt2
        torch.export.save(program, new)
    with open(file, "rb") as written:
        return torch.export.load(written).module()(images)
