"""What a model's name stands for: a folder or Cria, and the formats that its weights are rounded to."""

from pathlib import Path
from typing import NamedTuple

from herd.checkpoint.cria import cria_path
from herd.formats import GROUP, Format, Weights, parse


class Found(NamedTuple):
    """What a model's name stands for: its folder, and the formats that its weights are rounded to, if they are."""

    folder: Path
    weights: Weights | None


def find_model(path_or_name: str | Path) -> Found:
    """What a name stands for. A folder of exactly this name wins over what else the name may mean.

    ConfigError if what follows the last @ is no format of weights.
    """
    name, weights = str(path_or_name), None
    asked = "@" in Path(name).name and not Path(name).exists()
    if asked:
        name, _, form = name.rpartition("@")
        weights = parse(form)
    ours = name == "cria" and not Path(name).exists()
    if ours and not asked:
        weights = Weights.all(Format("int8", GROUP))
    return Found(cria_path() if ours else Path(name), None if weights == Weights() else weights)
