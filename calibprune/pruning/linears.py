"""Which linears are pruned and which are left dense, by regular expressions over their names."""

import re
from collections.abc import Mapping, Sequence

import torch

from calibprune.config.prune import PruneSettings
from calibprune.errors import UserError
from calibprune.gang import Gang
from calibprune.model import Skeleton


def chosen_linears(skeleton: Skeleton, settings: PruneSettings) -> list[tuple[str, ...]]:
    """For every layer the paths, inside it, of the linears to prune.

    Raises UserError for an expression that matches nothing, when nothing is left to prune, and for experts in one
    fused tensor, which cannot be pruned, unless `keep` names them.
    """
    layers = [f"{skeleton.layers_path}.{index}" for index in range(len(skeleton.layers))]
    picked = [settings.layers is None or bool(re.search(settings.layers, path)) for path in layers]
    if not any(picked):
        raise UserError(
            f"prune.layers {settings.layers!r} matches none of {layers[0]} ... {layers[-1]}"
        )
    used: set[str] = set()

    def kept(name: str) -> bool:
        matching = {expression for expression in settings.keep if re.search(expression, name)}
        used.update(matching)
        return bool(matching)

    chosen = []
    for index, path in enumerate(layers):
        linears = [n for n in skeleton.linears(index) if not kept(f"{path}.{n}") and picked[index]]
        chosen.append(tuple(linears))
        for name in skeleton.fused(index):
            if not kept(f"{path}.{name}") and picked[index]:
                raise UserError(
                    f"layer {index} holds its experts as one fused tensor ({name}), which cannot be pruned: "
                    f"mixture-of-experts models of this kind are not supported; to leave the experts dense and "
                    f"prune the rest, set prune.keep='[{name.rsplit('.', 1)[0]}]'"
                )
    unused = [expression for expression in settings.keep if expression not in used]
    if unused:
        raise UserError(
            f"prune.keep: {unused[0]!r} matches no linear, such as "
            f"{layers[0]}.{next(iter(skeleton.linears(0)))}"
        )
    if not any(chosen):
        raise UserError("prune.layers and prune.keep leave no linear to prune")
    return chosen


def numbers_of_all(
    chosen: Sequence[Sequence[str]], mine: Mapping[tuple[int, str], float], gang: Gang
) -> list[dict[str, float]]:
    """A number for every layer's chosen linears, each known to one worker, on all of them. Collective."""
    places = [(index, path) for index, paths in enumerate(chosen) for path in paths]
    values = torch.zeros(len(places), dtype=torch.float64)
    known = [place for place, key in enumerate(places) if key in mine]
    values[known] = torch.tensor([mine[places[place]] for place in known], dtype=torch.float64)
    numbers: list[dict[str, float]] = [{} for _ in chosen]
    for (index, path), value in zip(places, gang.collect(values, known).tolist(), strict=True):
        numbers[index][path] = value
    return numbers
