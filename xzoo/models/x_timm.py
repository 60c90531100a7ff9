"""Any timm model by name, expanded: so that what `xzoo finetune --expand` trains can be saved and
built again.

    timm.create_model("x_timm", base="convnext_atto", compression=4, pretrained=True)

builds the dense model with its pretrained weights and expands it (xzoo.expand, its rules and its
defaults).
"""

import dataclasses
from typing import Any

import timm
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ..convert import expand
from ..errors import ModelError
from ._build import cfg

__all__: list[str] = []

default_cfgs = generate_default_cfgs({"x_timm.untrained": cfg(first_conv="conv1", classifier="fc")})

BASE = "resnet18"


@register_model
def x_timm(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    base: str = BASE,
    compression: int = 4,
    share: int = 4,
    spatial_share: int = 1,
    graph: str = "biregular",
    seed: int = 0,
    **kwargs: Any,
) -> nn.Module:
    """The timm model `base`, expanded; pretrained=True takes the dense weights of `base` for what
    stays connected.
    """
    check_base(base)
    # Of a folder timm hands over what its config.json says; a name alone has the configuration of
    # the base.
    own = vars(pretrained_cfg) if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    sources = (own if isinstance(own, dict) else {}) | (pretrained_cfg_overlay or {})
    own_weights = any(sources.get(key) for key in ("url", "file", "hf_hub_id", "state_dict"))
    graph_arguments: dict[str, Any] = {
        "share": share,
        "spatial_share": spatial_share,
        "graph": graph,
        "seed": seed,
    }
    if not isinstance(own, dict):
        base_cfg = timm.get_pretrained_cfg(base) or PretrainedCfg()
        pretrained_cfg = dataclasses.replace(
            base_cfg, url=None, file=None, hf_hub_id=None, architecture="x_timm"
        )

    def construct(**arguments: Any) -> nn.Module:
        model: Any = timm.create_model(base, pretrained=pretrained and not own_weights, **arguments)
        expand(model, compression, **graph_arguments)
        model._model_args = {"base": base, "compression": compression, **graph_arguments}
        return model

    return build_model_with_cfg(
        construct,
        "x_timm",
        pretrained and own_weights,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        # the last three: every family has them
        feature_cfg={"feature_cls": "getter", "out_indices": 3},
        **kwargs,
    )


def check_base(base: Any) -> None:
    """Raise ModelError unless `base` names a dense model of timm."""
    if not isinstance(base, str) or base.startswith("x_") or not timm.is_model(base):
        raise ModelError(
            f"base={base!r} is not the name of a dense timm model; timm.list_models() has them"
        )
