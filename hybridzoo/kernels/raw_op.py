"""`raw_op`: a kernel's launch as an op of torch, opaque to compiled and exported graphs.

torch.library.custom_op does the same from the same functions, but its Python around a launch takes
the host some 14 us a call and 61 with gradients, on a machine where this one's takes 9 and 18: more
than a short kernel. It also imports torch's compiler, for a second, at its first call.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("hybridzoo", "FRAGMENT")


class RawOp:
    """`torch.ops.hybridzoo.<name>`; call it like the function it was made of."""

    def __init__(self, name: str, launch: Callable[..., Any], mutates: tuple[str, ...]) -> None:
        schema = torch.library.infer_schema(launch, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._name = name
        self._overload = getattr(torch.ops.hybridzoo, name).default
        names = [argument.name for argument in self._overload._schema.arguments]
        self._mutated = [names.index(given) for given in mutates]
        body = self._counted(launch) if mutates else launch
        _LIBRARY.impl(name, _untraced(body), "CompositeExplicitAutograd")

    def __call__(self, *args: Any) -> Any:
        """The launch, through torch's dispatcher."""
        return self._overload(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator of a function of the same arguments to outputs of the same shapes."""
        torch.library.register_fake(f"hybridzoo::{self._name}", fake, lib=_LIBRARY)
        return fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]
    ) -> None:
        """Both functions are torch.autograd.Function's."""
        op = self._overload

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    output = op(*args)
                setup_context(ctx, args, output)
                return output

        Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]

        def above(*args: Any) -> Any:
            # apply would find that out as well, but not as fast
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return Differentiable.apply(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        _LIBRARY.impl(self._name, _untraced(above), "Autograd")

    def _counted(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """Tell autograd of what the launch writes, lest it use a tensor that it saved before."""

        def call(*args: Any) -> Any:
            for i in self._mutated:
                torch.autograd.graph.increment_version(args[i])
            return launch(*args)

        return call


def raw_op(name: str, *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], RawOp]:
    """Decorator of a launch, whose annotations are the op's schema; without defaults.

    Args:
        name: of the op in torch.ops.hybridzoo.
        mutates: arguments that are written; such an op has no gradients.
    """
    return lambda launch: RawOp(name, launch, mutates)


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile, which looks into whatever Python runs behind a graph's end, out of it."""
    disabled: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return call
