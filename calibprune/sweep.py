"""The paused forward: every micro-batch runs through the model's own forward as a coroutine, all at the same stop.

Each coroutine is a greenlet that is switched out from inside a forward pre-hook, so that the model's code runs
unmodified. Knows nothing of pruning, storage or devices: the caller puts weights in place at each stop. A greenlet
belongs to the thread that made it: run a whole sweep on one thread.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from calibprune.offload import Parking


@dataclass
class LayerStop:
    """Every micro-batch is about to enter this decoder layer: put its weights in place now."""

    layer: int
    hidden: list[Tensor]
    """Hidden states, one per micro-batch, [sequences, tokens, hidden]. Emptied when the forwards continue."""
    pause_at_groups: bool = True
    """Whether to stop at this layer's linears; the caller may set it to False to run through the layer."""


@dataclass(frozen=True)
class GroupStop:
    """Every micro-batch is about to enter linears that share one input, all of which is available now."""

    layer: int
    linears: tuple[str, ...]
    """Paths inside the layer, in the order in which the forward calls them."""
    inputs: list[Tensor]
    """Inputs of the linears, one per micro-batch, [sequences, tokens, in]. Emptied when the forwards continue."""


class Sweep:
    """One forward of every micro-batch, to be iterated over from stop to stop.

    `results` holds what the forwards returned once the iteration has ended. Leaving the iteration early abandons
    the forwards where they are.
    """

    def __init__(
        self,
        forward: Callable[[Any], Any],
        layers: Sequence[nn.Module],
        micro_batches: Sequence[Any],
        *,
        outer_modules: Mapping[str, nn.Module] | None = None,
        enter_outer: Callable[[str], None] | None = None,
        leave_outer: Callable[[str], None] | None = None,
        first: int = 0,
        hidden: Callable[[int], Tensor] | None = None,
        parking: Parking | None = None,
    ) -> None:
        """The layers before `first` are skipped, and `first` is entered with `hidden(micro-batch index)`. `parking`
        takes what a forward holds while it is paused.

        `enter_outer(name)` is called before a module outside the layers is first used, `leave_outer(name)` when the
        decoder layers have been reached and it may be freed; if it is used again, it is entered again."""
        self._forward = forward
        self._layers = layers
        self._micro_batches = micro_batches
        self._outer_modules = outer_modules or {}
        self._enter_outer = enter_outer or (lambda name: None)
        self._leave_outer = leave_outer or (lambda name: None)
        self._entered: set[str] = set()
        self._groups: dict[tuple, list[tuple[str, ...]]] = {}
        self._first, self._hidden, self._parking = first, hidden, parking
        self.results: list[Any] = []

    def __iter__(self) -> Iterator[LayerStop | GroupStop]:
        forwards = [greenlet(self._run) for _ in self._micro_batches]
        pause = partial(self._pausing_hook, getcurrent(), forwards)
        handles, group_handles = [], []
        try:
            for name, module in self._outer_modules.items():
                handles.append(module.register_forward_pre_hook(self._entering_hook(name)))
            for index, layer in enumerate(self._layers):
                if index < self._first:
                    layer.forward = _pass_on
                else:
                    hook = pause(index)
                    handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            stops = [
                forward.switch(batch)
                for forward, batch in zip(forwards, self._micro_batches, strict=True)
            ]
            while not forwards[0].dead:
                key, args, kwargs = stops[0]
                _require_same_stop(key, forwards, stops)
                if isinstance(key, int):
                    for handle in group_handles:
                        handle.remove()
                    if key == self._first:
                        self._leave_all_outer()
                    stop = LayerStop(key, [_only_input(s[1], s[2]) for s in stops])
                    yield stop
                    stop.hidden.clear()
                    group_handles = []
                    if stop.pause_at_groups:
                        layer = self._layers[key]
                        for group in self._input_groups(layer, args, kwargs):
                            leader = layer.get_submodule(group[0])
                            hook = pause((key, group))
                            group_handles.append(
                                leader.register_forward_pre_hook(hook, with_kwargs=True)
                            )
                else:
                    group_stop = GroupStop(key[0], key[1], [_only_input(s[1], s[2]) for s in stops])
                    yield group_stop
                    group_stop.inputs.clear()
                del args, kwargs, stops  # release the inputs before the forwards continue
                stops = [forward.switch() for forward in forwards]
            self.results = stops
        finally:
            for handle in handles + group_handles:
                handle.remove()
            for layer in self._layers[: self._first]:
                vars(layer).pop("forward", None)
            for forward in forwards:
                if not forward.dead:
                    forward.throw()

    def _run(self, micro_batch: Any) -> Any:
        return self._forward(micro_batch)

    def _pausing_hook(self, driver: greenlet, forwards: list[greenlet], key: Any) -> Callable:
        """Returns a hook that switches the forward out and hands its arguments to the driver."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if self._hidden is not None and key == self._first:
                value = self._hidden(forwards.index(getcurrent()))
                args, kwargs = _with_only_input(args, kwargs, value)
            parked = self._parking.park(sys._getframe()) if self._parking else []
            driver.switch((key, args, kwargs))
            if self._parking:
                self._parking.fetch(parked)
            return args, kwargs

        return hook

    def _entering_hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            if name not in self._entered:
                self._entered.add(name)
                self._enter_outer(name)

        return hook

    def _leave_all_outer(self) -> None:
        for name in sorted(self._entered):
            self._leave_outer(name)
        self._entered.clear()

    def _input_groups(self, layer: nn.Module, args: tuple, kwargs: dict) -> list[tuple[str, ...]]:
        """Groups the layer's linears by the tensor that they read, found by running one micro-batch through it.

        Layers of the same structure share the result. `layer.forward` skips the layer's own pausing hook.
        """
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        structure = (type(layer), *((name, type(m), m.weight.shape) for name, m in linears.items()))
        if structure not in self._groups:
            seen: list[
                tuple[Tensor, list[str]]
            ] = []  # keeps the tensors, since the id of a freed one may be reused

            def observe(name: str) -> Callable:
                def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                    tensor = _only_input(args, kwargs)
                    for known, group in seen:
                        if known is tensor:
                            group.append(name)
                            return
                    seen.append((tensor, [name]))

                return hook

            probes = [
                linear.register_forward_pre_hook(observe(name), with_kwargs=True)
                for name, linear in linears.items()
            ]
            if self._parking:
                here = self._parking.device
                args, kwargs = tree_map_only(Tensor, lambda t: t.to(here), (args, kwargs))
            try:
                layer.forward(*args, **kwargs)
            finally:
                for probe in probes:
                    probe.remove()
            self._groups[structure] = [tuple(group) for _, group in seen]
        return self._groups[structure]


def _require_same_stop(key: Any, forwards: Sequence[greenlet], stops: Sequence[Any]) -> None:
    if any(forward.dead or stop[0] != key for forward, stop in zip(forwards, stops, strict=True)):
        raise RuntimeError(f"micro-batches took different paths through the model at {key}")


def _only_input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _with_only_input(args: tuple, kwargs: dict, value: Tensor) -> tuple[tuple, dict]:
    if args:
        return (value, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): value}


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces the forward of a layer that is skipped: only the shape of its output matters."""
    return hidden_states
