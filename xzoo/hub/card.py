"""Model cards, written from what a folder holds: config.json, metrics.json and the registry.

Not by hand: `xzoo card FOLDER` writes README.md anew, and `hub.check` fails where it is stale,
which it also is when recipes/results.csv has got further runs of its recipe, or of its rivals.
"""

import json
import shlex
import statistics
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from .. import files, weights
from ..datasets import DATASETS, DataSet
from ..deploy import deploy
from ..errors import XzooError
from ..files import write_text
from ..machine import hardware
from ..models import create_model
from ..names import code, encoded, escaped, markdown, shown
from ..ops.tune import alternate
from ..profile import profile
from ..results.runs import Row, read

CARD, METRICS = "README.md", "metrics.json"
ORG = "xzoo"  # whose repositories hold the zoo
LICENSE = "other"

_BODY = """# Model card for {name}

{description} {trained}

An X-Net (Deep Expander Network): most layers read only some of the channels before them, \
which ones was drawn as an
expander graph before training. It is built by xzoo in timm's registry: without `import xzoo` \
timm does not know it.

## Model details

- **Accuracy:** {accuracy}
- **Image size:** {size}
- **Graphs:** {graphs}
- **Trained by:** {recipe}
- **Paper:** Deep Expander Networks: Efficient Deep Networks from Graph Theory, \
https://arxiv.org/abs/1711.08757

| | weights | MACs | file | top-1, % |
| --- | ---: | ---: | ---: | ---: |
{table}

Weights are parameters of two or more dimensions, MACs those of convolutions and linear \
layers for one image.
{latency}{picture}{curves}
## Use

```python
{classify}
```

Feature maps:

```python
{features}
```

Fine-tuning:

```python
{finetune}
```

On a folder of images: {command}. {verified}

## Intended use and limits

For research on sparse networks, for teaching, and as a start for fine-tuning. It knows \
{classes} classes and takes any
image for one of them; its probabilities are not calibrated. It was judged on {judged} alone: \
not on other
cameras, other image sizes, corrupted images or images that were made to deceive it. \
It has the biases of its
training images. Not for decisions about people, nor where a mistake does harm.

## Licence

{licence} The code of xzoo is Apache-2.0.

## Citation

```bibtex
@inproceedings{{prabhu2018deep,
  title = {{Deep Expander Networks: Efficient Deep Networks from Graph Theory}},
  author = {{Prabhu, Ameya and Varma, Girish and Namboodiri, Anoop}},
  booktitle = {{European Conference on Computer Vision (ECCV)}},
  year = {{2018}}
}}
```
"""
_CLASSIFY = """import xzoo
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

model = xzoo.create_model("{model}", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model), is_training=False)
image = Image.new("RGB", (64, 64), "skyblue")  # or Image.open("photo.jpg").convert("RGB")
with torch.no_grad():
    chances = model(transform(image)[None]).softmax(1)[0]
for chance, i in zip(*chances.topk({top})):
    print(f"{{model.pretrained_cfg['label_names'][i]}}: {{chance:.1%}}")"""
_FEATURES = """import xzoo
import torch

model = xzoo.create_model("{model}", pretrained=True, features_only=True).eval()
with torch.no_grad():
    for features in model(torch.rand(1, {size})):
        print(tuple(features.shape))"""
_FINETUNE = """import xzoo
import torch

model = xzoo.create_model("{model}", pretrained=True, num_classes=3)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
images, labels = torch.rand(8, {size}), torch.randint(3, (8,))  # yours, prepared as above
loss = torch.nn.functional.cross_entropy(model(images), labels)
loss.backward()
optimizer.step()"""


def write(folder: Path | str, repo: str | None = None) -> bool:
    """Write a folder's README.md anew, and what metrics.json says of other runs; returns whether
    anything has changed.

    Raises: XzooError where it cannot.
    """
    folder = Path(folder)
    measured = _read(folder / METRICS)
    changed = _put(
        folder / METRICS, json.dumps(measured | runs_and_rivals(measured), indent=2) + "\n"
    )
    return _put(folder / CARD, text(folder, repo)) or changed


def _put(place: Path, new: str) -> bool:
    try:
        if place.is_file() and place.read_text(encoding="utf-8") == new:
            return False
    except OSError as error:
        raise XzooError(f"cannot read {place}: {files.reason(error)}") from error
    write_text(place, new)
    return True


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise XzooError(
            f"{file.parent} is not an exported model: {type(error).__name__}: {error}"
        ) from error


def text(folder: Path | str, repo: str | None = None, place: Path | None = None) -> str:
    """The card of an exported folder.

    Args:
        repo: the repository that it is for; by default the zoo's of the folder's name.
        place: where the folder will be, if not where it is.
    Raises: XzooError for a folder that is none.
    """
    folder = Path(folder)
    place = (place or folder).resolve()
    config, measured = _read(folder / weights.CONFIG), _read(folder / METRICS)
    try:
        repo = repo or f"{ORG}/{place.name}"
        pictures = [name for name in ("spectrum.png", "curves.png") if (folder / name).is_file()]
        return _text(config, measured, place, repo, pictures)
    except (KeyError, TypeError, ValueError) as error:
        raise XzooError(
            f"{folder} is not an exported model: {type(error).__name__}: {error}"
        ) from error


def metrics(
    model: nn.Module, config: dict[str, Any], result: dict[str, Any], timed: bool
) -> dict[str, Any]:
    """What metrics.json says: the result of a run, without places of its machine, and what is
    counted and measured.
    """
    net, counts = cast(Any, model), profile(model)
    known = result | {"model": config["architecture"]} | runs_and_rivals(result)
    if net.num_classes <= 5:  # fine-tuning runs of before wrote it for these, too
        known["top5"] = None
    known |= {"weights": counts.weights, "params": counts.params, "macs": counts.macs}
    arguments = config.get("model_args", {}) | {"num_classes": config["num_classes"]}
    dense = None
    if "compression" in arguments:
        dense = create_model(config["architecture"], **arguments | {"compression": 1})
        twin = profile(dense, tuple(net.pretrained_cfg["input_size"]))
        known["dense"] = {"weights": twin.weights, "params": twin.params, "macs": twin.macs}
    return known | ({"latency": _latency(net, dense)} if timed else {})


def runs_and_rivals(measured: dict[str, Any]) -> dict[str, Any]:
    """What recipes/results.csv has of the same recipe ("runs") and of its rivals, which have other
    graphs or none.

    Rivals are of the same architecture, data, images, epochs and batch. Each has top1 (the mean),
    sd (None of one run) and n, its graph, and what it is in size. Of a recipe that is not in the
    table: the one run, and nobody.
    """
    shape = ("graph", "compression", "share", "spatial_share")
    same = ("model", "dataset", "split", "n_val", "img_size", "epochs", "global_batch")
    runs: dict[str, list[Row]] = {}
    for row in _results():
        runs.setdefault(row.recipe_sha, []).append(row)
    own = runs.get(measured.get("recipe_sha") or "", [])
    if not own:
        return {"runs": {"top1": measured["top1"], "sd": None, "n": 1}, "rivals": []}
    of_task, of_graph = attrgetter(*same), attrgetter(*shape)
    rivals = []
    for rows in runs.values():
        row = rows[0]
        if of_task(row) == of_task(own[0]) and of_graph(row) != of_graph(own[0]):
            counts = {
                "graph": row.graph,
                "weights": row.weights,
                "params": row.params,
                "macs": row.macs,
            }
            rivals.append(_mean(rows) | counts)
    return {"runs": _mean(own), "rivals": sorted(rivals, key=lambda rival: rival["graph"])}


def _results() -> list[Row]:
    for place in weights.homes():
        file = place.parent / "recipes" / "results.csv"
        if file.is_file():
            return read(file)
    return []


def _mean(rows: list[Row]) -> dict[str, Any]:
    top1 = [row.top1 for row in rows]
    sd = round(statistics.stdev(top1), 3) if len(top1) > 1 else None
    return {"top1": round(statistics.mean(top1), 3), "sd": sd, "n": len(top1)}


@torch.inference_mode()
def _latency(net: Any, dense: nn.Module | None, pairs: int = 25) -> dict[str, Any]:
    """Milliseconds for one image, and how many times as long the dense twin takes; both deployed,
    in turns.
    """
    x = torch.rand(1, *net.pretrained_cfg["input_size"])
    forms = {
        name: deploy(model, x)
        for name, model in (("ours", net), ("dense", dense))
        if model is not None
    }
    times = alternate({name: partial(model, x) for name, model in forms.items()}, pairs)
    ours = times["ours"].seconds
    found = {
        "ms": round(1000 * statistics.median(ours), 2),
        "batch": 1,
        "on": hardware(torch.device("cpu")),
    }
    if dense is None:
        return found
    ratios = [theirs / mine for mine, theirs in zip(ours, times["dense"].seconds, strict=True)]
    return found | {"dense_times": round(statistics.median(ratios), 2)}


def _text(
    config: dict[str, Any], measured: dict[str, Any], place: Path, repo: str, pictures: list[str]
) -> str:
    name, size = place.name, config["pretrained_cfg"]["input_size"]
    registered = place.parent in [home.resolve() for home in weights.homes()]
    facts = DATASETS.get(measured.get("dataset") or "")
    title = facts.title if facts else None
    judged = f"{measured['n_val']:,} {measured['split']} images of {title or 'its own data set'}"
    model = name if registered else f"hf-hub:{repo}"
    literal = escaped(model).replace('"', '\\"')  # between double quotes, in Python
    snippets = {
        "top": min(5, config["num_classes"]),
        "model": literal,
        "size": ", ".join(map(str, size)),
    }
    curves = "![loss and accuracy during training](curves.png)\n"
    licence = "Weights: as the publisher of the training images allows."
    if facts:
        licence = f"{facts.title} {facts.license}."
    body = _BODY.format(
        **{"name": markdown(name), "judged": judged, "classes": config["num_classes"]},
        command=code(f"xzoo finetune photos --model {shlex.quote(shown(model))}"),
        description=_description(config),
        trained=f"Trained on {title or 'images of its publisher'}.",
        accuracy=_accuracy(measured, judged),
        size=" x ".join(map(str, size[1:])),
        graphs=_graphs(config),
        recipe=_recipe(measured),
        table=_table(name, measured),
        latency=_speed(measured),
        picture="\n![singular values of its graphs against the bounds](spectrum.png)\n"
        if "spectrum.png" in pictures
        else "\n",
        curves=curves if "curves.png" in pictures else "",
        classify=_CLASSIFY.format(**snippets),
        features=_FEATURES.format(**snippets),
        finetune=_FINETUNE.format(**snippets),
        verified=_verified(registered, repo),
        licence=licence,
    )
    card = ModelCard(f"---\n{_head(measured, name, repo, facts).to_yaml()}\n---\n\n{body}")
    return str(card)


def _head(measured: dict[str, Any], name: str, repo: str, facts: DataSet | None) -> ModelCardData:
    result: dict[str, Any] = {"task_type": "image-classification", "metric_type": "accuracy"}
    result |= {
        "dataset_name": facts.title if facts else "own images",
        "dataset_type": facts.hub if facts else "images",
    }
    result |= {"dataset_split": measured["split"]}
    figures = [("top-1", measured["top1"]), ("top-5", measured.get("top5"))]
    rows = [
        EvalResult(**result, metric_name=k, metric_value=round(v, 4))
        for k, v in figures
        if v is not None
    ]
    kept: dict[str, Any] = {"datasets": [facts.hub]} if facts else {}
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=LICENSE,
        license_name="as-the-training-images-allow",
        license_link=f"https://huggingface.co/{quote(encoded(repo))}/blob/main/README.md#licence",
        tags=["timm", "image-classification", "xzoo", "sparse", "expander-graph"],
        metrics=["accuracy"],
        model_name=shown(name),
        eval_results=rows,
        **kept,
    )


def _description(config: dict[str, Any]) -> str:
    docstring = (
        timm.models.model_entrypoint(config["architecture"]).__doc__ or config["architecture"]
    )
    first = " ".join(docstring.strip().split("\n\n")[0].split())
    base = config.get("model_args", {}).get("base")
    return f"{first} Here `base` is {base}." if base else first


def _accuracy(measured: dict[str, Any], judged: str) -> str:
    top5 = f", top-5 {measured['top5']:.2f} %" if measured.get("top5") is not None else ""
    runs = measured["runs"]
    mean = f"{_top1(runs)} % is the mean of {runs['n']} runs" if runs["n"] > 1 else "one run"
    return (
        f"top-1 {measured['top1']:.2f} %{top5} of {judged}; {mean}, the last epoch, whatever the "
        "others had"
    )


def _top1(runs: dict[str, Any]) -> str:
    return f"{runs['top1']:.2f}" + (f" \u00b1 {runs['sd']:.2f}" if runs["sd"] is not None else "")


def _graphs(config: dict[str, Any]) -> str:
    block = config.get("xzoo", {})
    if "graph" not in block:
        return "none; it is dense"
    compression = block.get("compression")
    how = (
        "degrees of each layer in config.json"
        if isinstance(compression, dict)
        else f"compression {compression}"
    )
    shares = f"share {block.get('share')}, {block.get('spatial_share')} for larger kernels"
    print_ = block.get("fingerprint", "")[:16]
    return f"{block['graph']}, {how}, {shares}, seed {block.get('seed')}; fingerprint {print_}"


def _recipe(measured: dict[str, Any]) -> str:
    named = (
        f"{markdown(measured['recipe'])} ({measured['recipe_sha']})"
        if measured.get("recipe")
        else "recipe.yaml"
    )
    parts = [named]
    for key, text in (
        ("epoch_reported", "{} epochs"),
        ("seed", "seed {}"),
        ("device", "on {}"),
        ("commit", "xzoo {}"),
    ):
        if measured.get(key) is not None:
            parts.append(text.format(markdown(measured[key])))
    return ", ".join(parts)


def _table(name: str, measured: dict[str, Any]) -> str:
    def line(title: str, counts: dict[str, Any], size: int, runs: dict[str, Any] | None) -> str:
        millions = f"{counts['weights'] / 1e6:,.2f} M | {counts['macs'] / 1e6:,.2f} M"
        top1 = f"{_top1(runs)} (n = {runs['n']})" if runs else "not trained"
        return f"| {title} | {millions} | {size / 1e6:.2f} MB | {top1} |"

    rivals = {rival["graph"]: rival for rival in measured["rivals"]}
    lines = [line(markdown(name), measured, measured["bytes"], measured["runs"])]
    if dense := measured.get("dense"):
        lines.append(line("its dense twin", dense, 4 * dense["params"], rivals.pop("dense", None)))
    for graph, rival in rivals.items():
        lines.append(line(f"with graphs of kind {graph}", rival, 4 * rival["params"], rival))
    return "\n".join(lines)


def _speed(measured: dict[str, Any]) -> str:
    found = measured.get("latency")
    if not found:
        return ""
    twin = (
        f"; its dense twin takes {found['dense_times']} times as long"
        if "dense_times" in found
        else ""
    )
    return f"One image takes {found['ms']} ms ({found['on']}; batch norms folded){twin}.\n"


def _verified(registered: bool, repo: str) -> str:
    pin = code(f"timm.create_model({f'hf-hub:{repo}@COMMIT'!r}, pretrained=True)")
    if registered:
        return (
            f"By this name every file is verified before it is used; by {pin} nothing is, so name "
            "the commit."
        )
    return f"This route verifies nothing: name the commit ({pin}), and trust the publisher."
