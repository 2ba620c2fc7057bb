"""Chooses the linears to prune, by regular expressions over their names; the others stay dense."""

from collections.abc import Collection, Mapping, Sequence

import torch

from calibprune.config.prune import PruneSettings
from calibprune.errors import UserError
from calibprune.gang import Gang
from calibprune.model import Skeleton
from calibprune.untrusted import matching


def chosen_linears(skeleton: Skeleton, settings: PruneSettings) -> list[tuple[str, ...]]:
    """Lists for every layer the paths, inside it, of the linears to prune.

    Raises UserError for an expression that matches nothing or takes too long, when nothing is left to prune, and for
    experts in one fused tensor, which cannot be pruned, unless `keep` names them.
    """
    layers = tuple(f"{skeleton.layers_path}.{index}" for index in range(len(skeleton.layers)))
    picked: Collection[str] = layers
    if settings.layers is not None:
        picked = matching("prune.layers", settings.layers, layers)
    if not picked:
        raise UserError(
            f"prune.layers {settings.layers!r} matches none of {layers[0]} ... {layers[-1]}"
        )
    names = tuple(
        f"{path}.{name}"
        for index, path in enumerate(layers)
        for name in (*skeleton.linears(index), *skeleton.fused(index))
    )
    found = [matching("prune.keep", expression, names) for expression in settings.keep]
    kept = frozenset[str]().union(*found)
    chosen = []
    for index, path in enumerate(layers):
        dense = kept if path in picked else frozenset(names)
        chosen.append(tuple(n for n in skeleton.linears(index) if f"{path}.{n}" not in dense))
        for name in skeleton.fused(index):
            if f"{path}.{name}" not in dense:
                raise UserError(
                    f"layer {index} holds its experts as one fused tensor ({name}), which cannot be pruned: "
                    f"mixture-of-experts models of this kind are not supported; to leave the experts dense and "
                    f"prune the rest, set prune.keep='[{name.rsplit('.', 1)[0]}]'"
                )
    for expression, of_expression in zip(settings.keep, found, strict=True):
        if not of_expression:
            raise UserError(
                f"prune.keep: {expression!r} matches no linear, such as "
                f"{layers[0]}.{next(iter(skeleton.linears(0)))}"
            )
    if not any(chosen):
        raise UserError("prune.layers and prune.keep leave no linear to prune")
    return chosen


def numbers_of_all(
    chosen: Sequence[Sequence[str]], mine: Mapping[tuple[int, str], float], gang: Gang
) -> list[dict[str, float]]:
    """Gives all workers the numbers of the chosen linears, each of which one worker knows. Collective."""
    places = [(index, path) for index, paths in enumerate(chosen) for path in paths]
    values = torch.zeros(len(places), dtype=torch.float64)
    known = [place for place, key in enumerate(places) if key in mine]
    values[known] = torch.tensor([mine[places[place]] for place in known], dtype=torch.float64)
    numbers: list[dict[str, float]] = [{} for _ in chosen]
    for (index, path), value in zip(places, gang.collect(values, known).tolist(), strict=True):
        numbers[index][path] = value
    return numbers
