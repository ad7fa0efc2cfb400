"""The weights of a model folder, as the headers of its safetensors files tell them; nothing else is ever read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Shapes = dict[str, tuple[int, ...]]


class AbsentError(ValueError):
    """Files of the weights are not in the folder."""


def read_shapes(folder: Path) -> Shapes:
    """Shape of every tensor by name, without reading any.

    Raises:
        AbsentError: a file is missing, or all there is would have to be unpickled; names the file.
        ValueError: a file is broken; names it.
    """
    shapes: Shapes = {}
    for name in weight_files(folder):
        try:
            with safe_open(folder / name, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise AbsentError(f"{name} is missing") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} is no whole safetensors file: {error}") from error
    return shapes


def weight_files(folder: Path) -> list[str]:
    """Names of the files that a model is loaded from, and none of what else lies beside them.

    Raises:
        AbsentError: there are none. Those that an index names may still be missing.
        ValueError: an index cannot be read, or names files elsewhere.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        why = f"; {', '.join(pickled)} would have to be unpickled, which can run any code" if pickled else ""
        raise AbsentError(f"it holds neither {SINGLE} nor {INDEX}{why}")
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} has no weight_map ({error})") from error
    outside = sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name)
    if outside or not names:
        raise ValueError(f"{INDEX} names a file outside its folder: {', '.join(outside)}")
    return sorted(names)


def misfit(shapes: Mapping[str, tuple[int, ...]], model: nn.Module, prefix: str) -> str | None:
    """Why weights are not those of a model (which may be on the meta device); None when they may be.

    Args:
        shapes: of the weights by name.
        model: with its parameters and buffers.
        prefix: that names may have or lack, ``model`` or ``bert``.
    """
    # Some architectures store tensors under other names than they use; only common names can be compared.
    wanted = {name.removeprefix(f"{prefix}."): tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name.removeprefix(f"{prefix}."): shape for name, shape in shapes.items()}
    common = sorted(wanted.keys() & found.keys())
    if not common:
        return f"none of its {len(found)} tensors belongs to {type(model).__name__}"
    for name in common:
        if wanted[name] != found[name]:
            return f"{name} is {found[name]}, {type(model).__name__} with this config has {wanted[name]}"
    return None


def absent(shapes: Mapping[str, tuple[int, ...]], model: PreTrainedModel, prefix: str) -> list[str]:
    """Names of the weights of a model that are not there; none where that cannot be told from names.

    Args:
        shapes: of the weights by name.
        model: may be on the meta device.
        prefix: that names may have or lack.
    """
    wanted = {name.removeprefix(f"{prefix}."): name for name in model.state_dict()}
    found = {name.removeprefix(f"{prefix}.") for name in shapes}
    if found - wanted.keys():
        return []  # some of what is there may be renamed when it is loaded
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return sorted(name for short, name in wanted.items() if short not in found and name not in tied)
