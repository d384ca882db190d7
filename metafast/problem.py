"""What one call means, with no backend in it, and what a backend offers.

A `Problem` names every tensor that the losses read and that may receive a gradient, its *leaves*, by a key:

    param/<name>     a parameter of the model; tied ones once, under the first of their names
    hyper/<name>     a hyper-parameter of the update rule; hyper/<name>.<parameter> where it is one per parameter
    support/<i>      tensor i of the flattened support batch, task dimension first
    query/<i>        the same of the query batch
    extern/<i>       a tensor found in a closure or an attribute that requires grad
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from .capture import Trace
    from .generators import Draws
    from .reach import Reach
    from .updates import UpdateRule

__all__ = ["Backend", "Loss", "Objective", "Outcome", "Problem", "filled", "hyper_tree"]

#: `objective(model, batch of one task) -> scalar loss`, or `(scalar loss, outputs)`.
Objective = Callable[[nn.Module, Any], Any]

#: `loss(output, target) -> scalar`.
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Problem:
    """Everything one call means: model, losses, update rule, batches.

    `leaves` is ordered as the module docstring lists the kinds. `adapted` holds the names, without "param/", that the
    inner loop adapts; `wrt` the keys whose gradient is wanted; `reduction` what becomes of the losses ("mean", "sum",
    "none"); `memory_budget` how many bytes the states of steps may take. `places` maps the first name of each
    parameter and buffer to a name for each place that holds it. `buffers` holds the values the losses read, usually the
    model's own tensors; a deferred replay is given a copy from before the first pass instead. `reach` knows what else
    model, objectives and update rule can read. `settled` is where whoever has worked out what holds for all problems of
    this form notes it, under a key of his own; `traces` what a capture of its losses has written down on the way there;
    `replace` starts both afresh. `tensors` are leaves and buffers in a row, where the call is known to be like one
    before it.
    """

    model: nn.Module
    inner_objective: Objective
    query_objective: Objective
    update: UpdateRule
    steps: int
    order: int
    leaves: Mapping[str, Tensor]
    adapted: tuple[str, ...]
    support_spec: pytree.TreeSpec
    query_spec: pytree.TreeSpec | None
    tasks: int
    wrt: tuple[str, ...]
    return_outputs: bool = False
    reduction: str = "mean"
    memory_budget: int | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reach: Reach | None = None
    settled: dict[Any, Any] = field(init=False, default_factory=dict, compare=False, repr=False)
    traces: dict[str, Trace] = field(init=False, default_factory=dict, compare=False, repr=False)
    tensors: list[Tensor] | None = field(init=False, default=None, compare=False, repr=False)

    def over(self, leaves: Mapping[str, Tensor], buffers: Mapping[str, Tensor], tensors: list[Tensor]) -> Problem:
        """The same problem over other leaves and buffers of the same form, which `tensors` lists: what was settled for
        one holds for both, but not what was traced."""
        made, fields = object.__new__(Problem), self.__dict__.copy()
        fields["leaves"], fields["buffers"], fields["traces"], fields["tensors"] = leaves, buffers, {}, tensors
        object.__setattr__(made, "__dict__", fields)
        return made

    def again(self) -> tuple[Tensor, Sequence[Tensor]] | None:
        """The reduced loss and the gradients in the order of `wrt`, where a backend has noted what makes them for all
        problems of this form, and nothing stands against it; None where the call is to be looked into. Running
        statistics and random generators have no part in such a call."""
        ready = None if self.tensors is None else self.settled.get("ready")
        return None if ready is None else ready.run(self.tensors)

    def settle_apart(self) -> None:
        """What is settled from here on holds for this problem alone, not for all of its form: running the losses has
        changed what they read."""
        object.__setattr__(self, "settled", {})

    def with_leaves(self, tensors: Sequence[Tensor]) -> Problem:
        """The same problem over other values of its leaves, in their order."""
        return replace(self, leaves=dict(zip(self.leaves, tensors, strict=True)))

    def group(self, kind: str) -> dict[str, Tensor]:
        """The leaves of one kind ("param", "hyper", "support", "query", "extern"), by name without the kind."""
        start = kind + "/"
        return {key[len(start) :]: leaf for key, leaf in self.leaves.items() if key.startswith(start)}

    @property
    def parameter(self) -> Tensor:
        """The first parameter that adapts; its dtype and device are those of the losses."""
        return self.leaves["param/" + self.adapted[0]]


def hyper_tree(hyper: Mapping[str, Tensor]) -> dict[str, Any]:
    """The hyper-parameters as an update rule reads them: one per parameter become a dict inside.

    >>> sorted(hyper_tree({"lr.0.weight": torch.ones(()), "decay": torch.ones(())})["lr"])
    ['0.weight']
    """
    tree: dict[str, Any] = {}
    for key, value in hyper.items():
        name, dot, parameter = key.partition(".")
        if dot:
            tree.setdefault(name, {})[parameter] = value
        else:
            tree[name] = value
    return tree


@dataclass
class Outcome:
    """What a backend returns: whatever of it the call asked for.

    `losses` is `(T,)`, `step_losses` `(T, steps)` the support losses before each update; where a reduction is asked for
    and all are finite, `total`, the losses reduced to 0-dim, may be all there is of them. `outputs` is what the query
    objective returned beside the loss, stacked over tasks. `gradients` maps keys of `Problem.wrt` to tensors shaped
    like the leaf (`None` where nothing depends on it), `fast` names of adapted parameters to `(T, *shape)`. `finite` is
    False where the backend knows that a loss is not finite, True where it knows that all are, None where nobody looked.
    `draws` is where the random generators stood before, where the backend may have drawn from them.
    """

    losses: Tensor | None = None
    step_losses: Tensor | None = None
    outputs: Any = None
    gradients: dict[str, Tensor | None] | None = None
    fast: dict[str, Tensor] | None = None
    finite: bool | None = None
    total: Tensor | None = None
    draws: Draws | None = None

    def reduced(self, reduction: str) -> Tensor:
        """The losses as `reduction` ("mean", "sum" or "none") wants them."""
        if self.total is not None and reduction != "none":
            return self.total
        losses = self.losses
        assert losses is not None
        if reduction == "none":
            return losses
        return losses.mean() if reduction == "mean" else losses.sum()

    def filled(self, problem: Problem) -> list[Tensor]:
        """The gradients in the order of `wrt`, zeros where nothing depends on a leaf."""
        assert self.gradients is not None
        return [filled(self.gradients[key], problem.leaves[key]) for key in problem.wrt]


def filled(grad: Tensor | None, leaf: Tensor) -> Tensor:
    """The gradient, zeros where nothing depends on the leaf."""
    return torch.zeros_like(leaf) if grad is None else grad


class Backend(Protocol):
    """One way to compute a problem.

    Laws: results depend on the problem alone, not on threads or on earlier calls; nothing of the user's is changed but
    the running statistics, those once and only where `fold` is true, as the eager loop over the tasks in order would
    leave them; random draws come from the generators that loop would take, in its order; returned tensors own their
    memory, carry no graph, and alias no leaf.
    """

    name: str

    def losses(self, problem: Problem, *, fold: bool) -> Outcome:
        """Losses (and outputs) only; nothing is kept for a gradient."""
        ...

    def meta_gradient(
        self,
        problem: Problem,
        weights: Tensor,
        output_cotangents: Sequence[Tensor | None] | None = None,
        *,
        fold: bool,
    ) -> Outcome:
        """Losses and the gradient in `problem.wrt` of sum_t weights[t] * loss_t (+ <outputs, cotangents>).

        `weights` is `(T,)`; `output_cotangents` runs parallel to the flattened outputs, `(T, ...)` each.
        """
        ...

    def adapt(self, problem: Problem, *, fold: bool) -> Outcome:
        """The adapted parameters of all tasks; the query part of the problem is not read."""
        ...

    def adapt_vjp(self, problem: Problem, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """The gradient in `problem.wrt` of sum_name <fast[name], cotangents[name]>."""
        ...
