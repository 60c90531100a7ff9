"""Learning from a trained network's logits (Hinton, Vinyals and Dean 2015, arXiv 1503.02531)."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from ..models import create_model


def distilled(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """How far the student's logits are from the teacher's, both [B, classes].

    Returns: mean over images of T^2 * KL(teacher / T, student / T); the factor keeps gradients of
    one size over T.
    """
    student, teacher = ((x.float() / temperature).log_softmax(1) for x in (logits, targets))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class Teacher:
    """A trained network that is shown a student's images in its own size and normalization.

    Not a module, so that it is not part of the student's.

    Its logits are taken by the names of the classes; where it has as many classes as the student
    and none of the same name, as they are.

    Args:
        name: of a trained model (local-dir:FOLDER and hf-hub:NAME too).
        class_names: of the student, in the order of its logits.
        mean, std: by which the student's images are normalized, in 0 to 1.
    Raises: ModelError where it does not know all of the student's classes.
    """

    def __init__(
        self, name: str, class_names: Sequence[str], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        net = create_model(name, pretrained=True)
        self.net: nn.Module = net.eval().requires_grad_(False)
        config = resolve_model_data_config(net)
        self.size: tuple[int, int] = config["input_size"][1:]
        own_mean, own_std, mean_, std_ = (
            torch.tensor(values).view(3, 1, 1)
            for values in (config["mean"], config["std"], mean, std)
        )
        self.scale, self.offset = std_ / own_std, (mean_ - own_mean) / own_std
        self.classes = _classes(name, net, class_names)

    def to(self, device: torch.device) -> "Teacher":
        self.net.to(device)
        self.scale, self.offset = self.scale.to(device), self.offset.to(device)
        if self.classes is not None:
            self.classes = self.classes.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, classes of the student] of images [B, 3, H, W] that are normalized for the
        student.
        """
        images = images * self.scale + self.offset
        if images.shape[2:] != self.size:
            images = F.interpolate(
                images, self.size, mode="bilinear", antialias=True, align_corners=False
            )
        logits = self.net(images)
        return logits if self.classes is None else logits[:, self.classes]


def _classes(name: str, net: Any, class_names: Sequence[str]) -> Tensor | None:
    """Which of the teacher's logits are the student's, int64 [classes]; None for all of them as
    they are.
    """
    known = net.pretrained_cfg.get("label_names")
    subset = infer_imagenet_subset(net)
    if known is None and subset is not None:
        known = ImageNetInfo(subset).label_names()
    if known is not None and list(known) == list(class_names):  # names may occur twice
        return None
    index = {label: number for number, label in enumerate(known or ())}
    lacking = [label for label in class_names if label not in index]
    if not lacking:
        return torch.tensor([index[label] for label in class_names])
    if net.num_classes == len(class_names) == len(lacking):
        return None
    raise ModelError(
        f"teacher={name} knows {net.num_classes} classes, the data have {len(class_names)}, and "
        f"{lacking[0]!r} is none of the teacher's names; use one that was trained on these classes"
    )
