"""Tensors of a file and those that a model wants: brought together by their names, however these begin."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from diffkd.errors import UserError

PREFIXES = ("module.", "model.", "_orig_mod.", "student.", "backbone.", "net.", "encoder.")
_COUNTERS = re.compile(r"(^|\.)(total_ops|total_params)$")  # that a tool for costs leaves in a model


def bare(
    found: dict[str, Tensor], wanted: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by the model's names, whatever stands before them, and what else the file holds.

    Prefixes that training scripts are known to add go first, where all names share them. Then the beginning
    of names goes, or is added, with which most of them are the model's; what begins otherwise is left out.

    Args:
        found: by their names in the file.
        wanted: the model's.
        source: what errors call the file.

    Raises:
        UserError: two models in it fit alike.
    """
    found = _without_known({k: v for k, v in found.items() if not _COUNTERS.search(k)}, wanted)
    cut = _beginnings(found, wanted)
    put = _beginnings(wanted, found)
    here = len(wanted.keys() & found.keys())
    if put and put[0][1] > max(here, cut[0][1] if cut else 0):
        return {put[0][0] + key: value for key, value in found.items()}, []
    if not cut or cut[0][1] <= here:
        return found, []
    if len(cut) > 1 and cut[1][1] == cut[0][1]:
        both = " and ".join(f"'{prefix}'" for prefix, _ in cut[:2])
        part = f"{{k[{len(cut[0][0])}:]: v for k, v in x.items() if k.startswith('{cut[0][0]}')}}"
        raise UserError(f"'{source}' holds several models that fit, in {both}{several_way(source, part)}")
    prefix = cut[0][0]
    others = sorted({_part(key) for key in found if not key.startswith(prefix)})
    return {key.removeprefix(prefix): v for key, v in found.items() if key.startswith(prefix)}, others


def several_way(source: str, part: str) -> str:
    """How to save one of several models in a file, as the end of an error.

    Args:
        source: the file, as it is called.
        part: the expression for the first of them, of the file's content `x`.
    """
    return (
        f"; save the one that is meant: import torch; x = torch.load('{source}', weights_only=True); "
        f"x = x.get('state_dict', x); torch.save({part}, 'one.pth')"
    )


def _beginnings(long: Mapping[str, Tensor], short: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """What stands before names of `short` in those of `long`, and how often, the most frequent first."""
    counts: Counter[str] = Counter()
    for key in long:
        place = key.find(".")
        while place >= 0:
            if key[place + 1 :] in short:
                counts[key[: place + 1]] += 1
            place = key.find(".", place + 1)
    return counts.most_common()


def _without_known(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without prefixes that all keys share and the model's do not."""
    stripped = bool(found)
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if all(k.startswith(prefix) for k in found) and not any(k.startswith(prefix) for k in wanted):
                found, stripped = {k.removeprefix(prefix): v for k, v in found.items()}, True
    return found


def other_head(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], num_classes: int | None
) -> list[str]:
    """Keys of a classifier of another size: all else alike, and as many outputs as there are classes.

    A detector has so many of its classes and the ground, for every anchor and every side of a box.
    """
    keys = [k for k in found if k in wanted and found[k].shape != wanted[k].shape]
    if num_classes is None or any(
        not wanted[k].dim() or found[k].shape[1:] != wanted[k].shape[1:] for k in keys
    ):
        return []
    sizes = {(len(found[k]), len(wanted[k])) for k in keys}
    if len(sizes) == 1 and all(ours == num_classes for _, ours in sizes):
        return keys
    ground = num_classes + 1
    whole = all(ours % ground == 0 for _, ours in sizes)
    classes = {Fraction(theirs * ground, ours) for theirs, ours in sizes}
    return keys if whole and len(classes) == 1 and min(classes).denominator == 1 else []


def lacking_head(missing: Sequence[str], wanted: Mapping[str, Tensor], num_classes: int | None) -> bool:
    """Whether all that is missing is a classifier: weight and bias of one layer, as many as classes."""
    layers = {key.rpartition(".")[0] for key in missing}
    return (
        num_classes is not None
        and len(missing) < len(wanted)
        and len(layers) == 1
        and all(wanted[key].dim() and len(wanted[key]) == num_classes for key in missing)
    )


def without_auxiliary(
    found: dict[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Without heads that only help to train, where the model was built without them; and their names."""
    extra = sorted({_part(k) for k in found if k not in wanted})
    heads = [
        name
        for name in extra
        if _AUXILIARY.fullmatch(name) and not any(k.startswith(f"{name}.") for k in wanted)
    ]
    return {k: v for k, v in found.items() if _part(k) not in heads}, heads


def _part(key: str) -> str:
    """The part of a model that a weight belongs to; of a detector's heads for regions, which one."""
    first, _, rest = key.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "roi_heads" else first


_AUXILIARY = re.compile(
    r"aux\d*|aux_?logits\d*|aux(iliary)?_?(head|classifier|output)s?\d*|roi_heads\.mask_(head|predictor)",
    re.IGNORECASE,
)


def in_order(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors under the model's names, where order and shapes agree; None where they do not."""
    ours = {k: v for k, v in wanted.items() if not k.endswith("num_batches_tracked")}
    theirs = [v for k, v in found.items() if not k.endswith("num_batches_tracked")]
    if [v.shape for v in ours.values()] != [v.shape for v in theirs]:
        return None
    return dict(zip(ours, theirs, strict=True))
