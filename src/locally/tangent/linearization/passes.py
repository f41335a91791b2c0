"""Passes through a module under other parameters, with an activation put in or taken out, or watched for hazards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

Product = Callable[[Tensor], Tensor]


def call_with(module: nn.Module, values: dict[str, Tensor], inputs: tuple[Any, ...]) -> Any:
    """The module's output with other parameters and buffers, under the names by which it lists them.

    A tensor that several submodules share is replaced in all, and a submodule that stands in several places once;
    `functional_call` by itself would leave the replacement in such a submodule.
    """
    names = {id(t): n for n, t in [*module.named_parameters(), *module.named_buffers()]}
    places = {
        f"{path}.{n}" if path else n: names[id(t)]
        for path, part in module.named_modules()
        for n, t in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
    }
    replaced = {place: values[name] for place, name in places.items() if name in values}
    return functional_call(module, replaced, inputs, tie_weights=False)


def pull_back(function: Product, at: Tensor) -> Product:
    """u -> J^T u at a point."""
    pull = vjp(function, at)[1]
    return lambda u: pull(u)[0]


@contextmanager
def tapped(module: nn.Module, source: str | None, put: Tensor | None, target: str | None) -> Iterator[list[Any]]:
    """Within, `put` stands for the output of submodule `source`, and the output of `target` is kept in the list."""
    seen: list[Any] = []
    handles = []
    if source is not None:
        assert put is not None
        # clones: a later layer that works in place would change the caller's point and what was seen
        handles.append(module.get_submodule(source).register_forward_hook(lambda *_: put.clone()))
    if target is not None:
        keep = lambda _module, _inputs, out: seen.append(out.clone() if isinstance(out, Tensor) else out)
        handles.append(module.get_submodule(target).register_forward_hook(keep))
    try:
        yield seen
        check_called(seen, target)
    finally:
        for handle in handles:
            handle.remove()


def check_called(seen: list[Any], path: str | None) -> None:
    """ValueError unless the submodule at `path` (None for the module itself) was seen exactly once in a pass."""
    if path is not None and len(seen) != 1:
        raise ValueError(f"submodule {path} is called {len(seen)} times in one pass; it must be called once")


class Trail:
    """Which submodules a pass goes through, and what they return for the first example."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.outputs: list[tuple[str, Tensor]] = []

    @property
    def where(self) -> str:
        """The innermost submodule that the pass is in."""
        return self.inside[-1] if self.inside else "the module itself"


@contextmanager
def watched(module: nn.Module) -> Iterator[Trail]:
    """Within, a pass leaves on the `Trail` which submodules it is in and what they returned; hooks go at the end."""
    trail = Trail()
    handles = []
    for path, part in module.named_modules():
        name = f"{path or 'the module'} ({type(part).__name__})"

        def enter(_module: nn.Module, _inputs: Any, name: str = name) -> None:
            trail.inside.append(name)

        def leave(_module: nn.Module, _inputs: Any, out: Any, name: str = name) -> None:
            trail.inside.pop()
            if isinstance(out, Tensor) and out.ndim and not torch._C._functorch.is_functorch_wrapped_tensor(out):
                trail.outputs.append((name, out[:1].detach().clone()))

        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        yield trail
    finally:
        for handle in handles:
            handle.remove()


def hazard(error: RuntimeError) -> str:
    """What a RuntimeError from torch.func says of the module, in words for the message that refuses it."""
    text = str(error).lower()
    if "control flow" in text or ".item()" in text:
        return "its path depends on values (control flow)"
    if "inplace" in text or "in-place" in text:
        return "a tensor is changed in place"
    if "random" in text:
        return "randomness"
    return "cannot be linearised"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
