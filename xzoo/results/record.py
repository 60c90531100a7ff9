"""result.json: what a finished run came to. `xzoo fit` and `xzoo finetune` write the same keys: the
columns of results.csv (`runs.Row` says what each means), and the loss.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import XzooError, first_line
from ..files import write_text

RESULT = "result.json"  # written last: a run folder that has it is finished


@dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        run: its folder; the model is in `run / "model"`.
        facts: all of result.json.
        top1: per cent of the validation images whose class has the largest logit.
        top5: per cent whose class is among the five largest; None for five classes or fewer.
        loss: mean cross entropy of the validation images, in nats.
        n_val: number of validation images.
        epochs: how many the run took.
        seconds: time that training took, over all starts of the run.
    """

    run: Path
    facts: dict[str, Any]

    @property
    def top1(self) -> float:
        return float(self.facts["top1"])

    @property
    def top5(self) -> float | None:
        return self.facts["top5"]

    @property
    def loss(self) -> float:
        return float(self.facts["loss"])

    @property
    def n_val(self) -> int:
        return int(self.facts["n_val"])

    @property
    def epochs(self) -> int:
        return int(self.facts["epoch_reported"])

    @property
    def seconds(self) -> float:
        return float(self.facts["wall_s"])

    def __str__(self) -> str:
        return f"{self.top1:.2f} % of {self.n_val:,} {self.facts['split']} images"


def read(run: Path) -> Result:
    """The result of a finished run. Raises: XzooError if result.json is missing or damaged."""
    try:
        facts = json.loads((run / RESULT).read_text(encoding="utf-8"))
        if "accuracy" in facts:
            facts = _of_before(facts)
        figures = {"top1": float(facts["top1"]), "n_val": int(facts["n_val"])}
        return Result(run, facts | figures)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise XzooError(
            f"{run / RESULT} cannot be read ({first_line(error)}); remove it, and repeat the "
            "command that started the run"
        ) from error


def write(result: Result) -> None:
    """Write result.json, which ends the run."""
    write_text(result.run / RESULT, json.dumps(result.facts, indent=2) + "\n")


def _of_before(facts: dict[str, Any]) -> dict[str, Any]:
    """The same in today's keys: `xzoo finetune` had keys of its own before 0.1.0 was released."""
    old = ("run", "model", "accuracy", "accuracy5", "images", "epochs", "seconds")
    return {key: value for key, value in facts.items() if key not in old} | {
        "dataset": None,
        "split": "val",
        "n_val": facts["images"],
        "top1": 100 * facts["accuracy"],
        "top5": 100 * facts["accuracy5"],
        "epoch_reported": facts["epochs"],
        "wall_s": facts["seconds"],
    }
