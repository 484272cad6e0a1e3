"""What `attach` returns: the axes of a live model, and the edits that can be made to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.axis import Axis
from espalier.edit.attributes import AttributeChange
from espalier.edit.births import Births
from espalier.edit.changes import Limits, blocking_reason, find_axis
from espalier.edit.contract import Contract
from espalier.edit.depth_edits import Leaves, Replace
from espalier.edit.depth_plans import addition, insertion, removal
from espalier.edit.known import Known
from espalier.edit.masks import Masks
from espalier.edit.plan import Plan, grow_plan, mask_plan, prune_plan
from espalier.edit.recipes.base import Recipe
from espalier.edit.recipes.folding import fold_plan
from espalier.edit.recipes.kinds import Factorised, Skip
from espalier.edit.steps import known_region, lookup
from espalier.errors import PlanError
from espalier.graph.named_tensors import tensor_table
from espalier.graph.sites import Site, site_table, sites
from espalier.graph.topology import Topology
from espalier.graph.visits import Place
from espalier.measure.cost import Cost, cost_of
from espalier.measure.sparse import SparseCopy, sparse_copy
from espalier.measure.sparse_forms import Form
from espalier.peers import Peers
from espalier.record import Edit, Preview
from espalier.surgery import Surgery
from espalier.table import text_table

LimitLike = Limits | tuple[int | None, int | None]


class Axes(Mapping[str, Axis]):
    """Axes by name, in the order in which the network runs; made anew from the present sizes at each access."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure

    def __getitem__(self, name: str) -> Axis:
        return self._structure._axis(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._structure.topology.by_name)

    def __len__(self) -> int:
        return len(self._structure.topology.by_name)

    def get(self, name: str, default: Any = None) -> Any:
        """The axis of that name, or the default."""
        return self[name] if name in self else default  # noqa: SIM401 - that would be this very function

    def __contains__(self, name: object) -> bool:
        return name in self._structure.topology.by_name


class Structure:
    """The topology of a live model, its optimizer, and the history of edits. Made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        topology: Topology,
        optimizer: Optimizer | None,
        limits: Mapping[str, Limits],
        follow: Sequence[nn.Module],
        undo_limit: int,
        cells: Sequence[str] = (),
        wrapper: nn.Module | None = None,
    ) -> None:
        self.surgery = Surgery(model, optimizer, Known.first(topology, example, limits), follow, undo_limit)
        self._cells = tuple(cells)
        self._compiled = wrapper

    @property
    def model(self) -> nn.Module:
        """The live model."""
        return self.surgery.model

    @property
    def runs(self) -> nn.Module:
        """What training runs: what `attach` was given, the live model or what wraps it."""
        return self.peers.live(self.model) if self._compiled is None else self._compiled

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that trains it."""
        return self.surgery.optimizer

    def train_with(self, optimizer: Optimizer) -> None:
        """Have another optimizer follow every edit from now on, in place of the one that was attached, if any did.

        For trainers that make their optimizers late. Edits that were made before cannot be undone any more.

        Raises:
            OptimizerError: it holds none of the model's parameters, or state of other shapes.
        """
        self.surgery.train_with(optimizer)

    @property
    def step(self) -> int:
        """Optimizer steps that are done, as the session counts them: the birth of units that come now."""
        return self.surgery.step

    @step.setter
    def step(self, step: int) -> None:
        self.surgery.step = step

    @property
    def topology(self) -> Topology:
        """What is known of the network.

        When it is first asked for, every axis is tried out on fake tensors, so that one which says that it may change
        really can.
        """
        return self.surgery.topology

    @property
    def example(self) -> Any:
        """Example inputs, in the sizes that the model takes now."""
        return self.surgery.known.example

    @property
    def limits(self) -> Mapping[str, Limits]:
        """Axis -> the sizes that it may be given."""
        return self.surgery.known.limits

    @property
    def births(self) -> Births:
        """Axis -> for every unit the step at which it came, 0 for those that `attach` or `load` found."""
        return self.surgery.known.births

    @births.setter
    def births(self, births: Births) -> None:
        self.surgery.known = replace(self.surgery.known, births=births)

    @property
    def initial_sizes(self) -> Mapping[str, int]:
        """Axis -> its size when the network was attached, or when the layer came that it is in."""
        return self.surgery.known.initial_sizes

    @property
    def axes(self) -> Axes:
        """The axes, by name."""
        return Axes(self)

    @property
    def history(self) -> tuple[Edit, ...]:
        """The edits that hold, oldest first."""
        return tuple(self.surgery.history)

    @property
    def layers_moved(self) -> bool:
        """Whether layers have come or gone since the model was built, so that names may mean others than they did."""
        return bool(self.surgery.known.depth)

    @property
    def masks(self) -> Masks:
        """Parameters -> what of them is live, as boolean tensors that are not to be changed; others are live whole.

        A network with masks computes with their zeros as with any other numbers: masks save no time. A tied parameter
        goes by its first name.
        """
        return self.surgery.known.masks

    @property
    def peers(self) -> Peers:
        """The processes that train the network together."""
        return self.surgery.peers

    @property
    def undoable(self) -> int:
        """How many of the last edits can be undone."""
        return self.surgery.undoable

    @property
    def may_undo(self) -> bool:
        """Whether edits are kept to be undone at all: `undo_limit` of `attach`."""
        return self.surgery.may_undo

    def axis(self, tensor: str, dim: int) -> Axis:
        """The axis at a dimension of a parameter or buffer.

        Raises:
            PlanError: no such tensor or dimension, a plain size, or several axes there (their names are listed).
        """
        name = self.topology.aliases.get(tensor, tensor)
        if name not in self.topology.tensors:
            raise PlanError(f"there is no parameter or buffer {tensor!r} in the model.")
        rank = len(self.topology.tensors[name])
        if not -rank <= dim < rank:
            raise PlanError(f"{tensor} has {rank} dimensions, found dim={dim}.")
        found = [
            record.name
            for record in self.topology.axes.values()
            if any(slot[:2] == (name, dim % rank) for slot in record.slots)
        ]
        if not found:
            raise PlanError(f"dimension {dim} of {tensor} is a plain size (a kernel position, for one), not an axis.")
        if len(found) > 1:
            raise PlanError(f"dimension {dim} of {tensor} is made of several axes: {', '.join(found)}; name one.")
        return self._axis(found[0])

    def cost(self) -> Cost:
        """Parameters and FLOPs (of the example inputs) as the network is now."""
        return cost_of(self.topology)

    def prune(self, axis: str | Mapping[str, Iterable[int]], units: Iterable[int] | None = None, *,
              interface: bool = False) -> Edit:  # fmt: skip
        """Remove units: of one axis, or of several in one atomic plan given as ``{axis: units}``.

        Raises:
            PlanError: unknown axis, units out of range, repeated or all there are, or an axis that may not change.
            SurgeryError: the changed model would not run as predicted; nothing was changed.
        """
        if isinstance(axis, str):
            if units is None:
                raise PlanError(f"{axis}: which units? Give units=[...].")
            return self.apply(prune_plan({axis: units}, interface=interface))
        if units is not None:
            raise PlanError("give either an axis and units, or a mapping of axes to units, not both.")
        return self.apply(prune_plan(axis, interface=interface))

    def grow(self, axis: str | Mapping[str, int], by: int | None = None, *, interface: bool = False,
             seed: int = 0, values: Mapping[str, Tensor] | None = None) -> Edit:  # fmt: skip
        """Add units: to one axis, or to several in one atomic plan given as ``{axis: count}``.

        New units are wired so that the outputs stay as they are, in train and in eval mode, wherever the axis allows
        it; the edit's contract says whether it does.

        Args:
            axis: name of the axis, or a mapping of names to counts.
            by: number of new units.
            interface: allow axes of the model's own inputs, outputs and lookup tables.
            seed: seeds the random part of what new units start from.
            values: tensor name -> values for its new positions instead of the default ones.

        Raises:
            PlanError: unknown axis, a count below 1, values that do not fit, or an axis that may not change.
            SurgeryError: the changed model would not run as predicted; nothing was changed.
        """
        if isinstance(axis, str):
            if by is None:
                raise PlanError(f"{axis}: by how many units? Give by=n.")
            counts: Mapping[str, int] = {axis: by}
        elif by is not None:
            raise PlanError("give either an axis and by=n, or a mapping of axes to numbers of units, not both.")
        else:
            counts = axis
        return self.apply(grow_plan(counts, interface=interface, seed=seed, values=values or {}))

    def mask(self, tensor: str | Mapping[str, Tensor], live: Tensor | None = None) -> Edit:
        """Hold weights at zero: those of one parameter, or of several in one atomic plan given as ``{name: live}``.

        What is live anew starts at zero. Masks replace those that there are, follow every edit (new weights are live)
        and are kept by the optimizer that was attached, whatever the gradients are.

        Args:
            tensor: name of a parameter, or a mapping of names to masks.
            live: a boolean tensor of its shape, True for what is live.

        Raises:
            PlanError: no such parameter, or a mask that does not fit.
            SurgeryError: the commit failed; nothing was changed.
        """
        if isinstance(tensor, str):
            if live is None:
                raise PlanError(f"{tensor}: which weights are live? Give a mask, or call unmask.")
            return self.apply(mask_plan({tensor: live}))
        if live is not None:
            raise PlanError("give either a parameter and a mask, or a mapping of parameters to masks, not both.")
        return self.apply(mask_plan(tensor))

    def unmask(self, *tensors: str) -> Edit:
        """Take masks away: what they held at zero stays zero, as a plain value that trains on.

        Raises:
            PlanError: one of the parameters has no mask.
        """
        return self.apply(mask_plan(dict.fromkeys(tensors)))

    def sparse_copy(
        self, example: Any = None, *, form: Form | None = None, least: float = 1.1, repeats: int = 20
    ) -> SparseCopy:
        """A copy for inference in which masked linear layers are sparse, where that is measured to be faster.

        Masks save no time by themselves; printing the result says what they save here, if anything: in compressed rows
        on a CPU, or as two of every four weights (`espalier.NM`) on a GPU.

        Args:
            example: inputs of the size that inference will have; None for those that were given to `attach`.
            form: ``compressed rows`` or ``semi-structured``; None for what the device's kernels know.
            least: how many times faster a layer has to be.
            repeats: timings of each, of which the fastest counts.

        Raises:
            EspalierError: nothing is masked; no sparse kernels are known for the device; or a weight cannot have the
                form that is asked for: the error says why.
        """
        given = self.example if example is None else example
        return sparse_copy(self.model, self.masks, given, form=form, least=least, repeats=repeats)

    def sites(self) -> tuple[Site, ...]:
        """All layers and cells in the order in which they run, and what may be done to each; else why not.

        They may be removed (`remove_layer`), copied (`add_cell`, or `insert_layer` of a `CopyOf`), have layers inserted
        after or before them, be factorised or folded into a neighbour. Units of axes are in `axes`.
        """
        return sites(self.topology, tensor_table(self.model).modules, self._cells)

    def insert_layer(self, layer: Recipe | None = None, *, after: str | None = None, before: str | None = None) -> Edit:
        """Put a new layer right after, or right before, a module.

        In an `nn.Sequential`, or at either end of one, it becomes an entry, and those that follow are renumbered;
        elsewhere it becomes a child of the module and runs by a hook, so that all names stay. Its parameters join the
        groups of the optimizer in which their neighbours are.

        Args:
            layer: what to insert: an `Identity`, a `ResidualLayer` or a `CopyOf` (`espalier.layers`). None for one like
                the layers around it, which changes nothing at first (`espalier.layers.default_layer`).
            after: path of the module that it follows.
            before: path of the module that it precedes.

        Raises:
            PlanError: there is no such place, or the layer does not fit it.
            SurgeryError: the changed model would not run as before everywhere else; nothing was changed.
        """
        return self.apply(insertion(self.topology, tensor_table(self.model).modules, after, before, layer))

    def remove_layer(self, *paths: str, leaves: Leaves | None = None, entry: Place | None = None) -> Edit:
        """Leave out a module, a layer or a whole cell, whose result has the size of what goes in; or a run of several.

        An entry of an `nn.Sequential` or `nn.ModuleList` is deleted, and those that follow are renumbered; elsewhere a
        `Bypass` takes its place. Its parameters leave the optimizer. Attributes that count layers follow.

        Args:
            paths: of the module, or of several that run one after the other.
            leaves: what takes the place of its result: ``entry``, what went in, or ``zero``; by default ``zero`` for a
                branch whose result is only added to something, ``inputs``, all that it got, in a list that hands on the
                last results to each of its entries, else ``entry``.
            entry: where among its arguments that is, if several have the size of its result: ``(1,)``, the second one.

        Raises:
            PlanError: it cannot be removed; the error says why.
            SurgeryError: the changed model would not run as before everywhere else; nothing was changed.
        """
        return self.apply(removal(self.topology, tensor_table(self.model).modules, paths, leaves, entry))

    def add_cell(self, container: str, position: int | None = None, *, of: str | None = None,
                 init: Literal["zero", "copy"] = "zero") -> Edit:  # fmt: skip
        """Add a copy of a cell to an `nn.Sequential` or `nn.ModuleList` of cells.

        Args:
            container: path of the list.
            position: that the copy will have; at the end by default.
            of: path of the cell to copy; by default the nearest one whose result has the size of what goes in, which
                those at the boundary of a stage have not.
            init: ``zero`` sets those parameters of the copy to zero which let it hand on what it gets, so that the
                network computes what it did; ``copy`` leaves it a copy.

        Raises:
            PlanError: no cell there can be copied, or not so that nothing changes; the error says why.
            SurgeryError: the changed model would not run as before everywhere else; nothing was changed.
        """
        return self.apply(addition(self.topology, tensor_table(self.model).modules, container, position, of, init))

    def add_skip(self, path: str) -> Edit:
        """Add a residual connection past a module, times a number that is learnt and begins at zero.

        The module moves into the new one, as ``path.inner``.

        Raises:
            PlanError: what goes past it would not have the size of its result.
            SurgeryError: code uses the module by its attributes; nothing was changed.
        """
        region = known_region(self.topology, path)
        return self.apply(Plan((), depth=(Replace(path, Skip(region.entry or (0,))),)))

    def factorise(self, path: str, rank: int) -> Edit:
        """Replace a linear layer or convolution by two thinner ones, of the best approximation of that rank.

        `espalier.rank_by_energy` and `espalier.rank_by_error` find ranks. Undone by `fold`.

        Raises:
            PlanError: it is no plain linear layer or convolution.
            SurgeryError: code uses the layer by its attributes; nothing was changed.
        """
        return self.apply(Plan((), depth=(Replace(path, Factorised(rank)),)))

    def fold(self, path: str, into: str | None = None) -> Edit:
        """Make a linear layer, convolution or batch norm a part of the one next to it; or an `nn.Sequential` of them
        one layer.

        Exact for linear layers one after the other, and in eval mode for batch norms.

        Args:
            path: of the layer that goes.
            into: path of the one that takes it in; by default the one before it or else the one after it.

        Raises:
            PlanError: it cannot be folded; the error says why.
            SurgeryError: code uses the layer by its attributes; nothing was changed.
        """
        return self.apply(Plan((), depth=fold_plan(self.topology, lookup(self.model), path, into)))

    def check(self, plan: Plan) -> tuple[Contract, tuple[AttributeChange, ...]]:
        """What applying a plan would promise and which attributes would follow; changes nothing.

        Layers come and go for a moment to find out: parameters, their gradients and the optimizer are as before.

        Raises:
            PlanError, SurgeryError: as `apply`.
        """
        return self.surgery.check(plan)

    def tried(self, plan: Plan) -> AbstractContextManager[Edit]:
        """Carry out a plan of layers while the body runs, and take it back: what would its new parameters be like?

        All else of this object, the topology for one, is that of the network as it was. The body may run the network,
        without a trace (`espalier.measure.stats.without_a_trace`), and must keep nothing of it.

        Raises:
            PlanError, SurgeryError: as `apply`; PlanError also for a plan that resizes or masks, which is what
                `preview` is for.
        """
        return self.surgery.tried(plan)

    def preview(self, plan: Plan, *, within_limits: bool = True) -> Preview:
        """Every tensor as a plan would make it; changes nothing. A plan without edits makes nothing.

        Args:
            plan: what would be applied.
            within_limits: whether the limits that the user set hold; False for what is only looked at.

        Raises:
            PlanError, SurgeryError: as `apply`; PlanError also for a plan in which layers come or go.
        """
        return self.surgery.preview(plan, within_limits=within_limits)

    def apply(self, plan: Plan) -> Edit:
        """Carry out a plan whole, or leave everything as it is.

        Raises:
            PlanError: the plan does not fit the structure as it is now.
            SurgeryError: the changed model would not run as predicted, or the commit failed; nothing was changed.
        """
        return self.surgery.apply(plan)

    def undo(self) -> Edit:
        """Take back the last edit, every byte of it; possible until the next optimizer step. Returns that edit.

        Raises:
            SurgeryError: there is nothing to undo, or something else changed the tensors since.
        """
        return self.surgery.undo()

    def _axis(self, name: str) -> Axis:
        record = find_axis(self.topology, name)
        return Axis(
            name,
            self.topology.sizes[record.number],
            blocking_reason(record, interface=False),
            record.taps,
            self.limits.get(name, Limits()),
            self.topology,
        )

    def __repr__(self) -> str:
        cost = self.cost()
        return f"Structure({type(self.model).__name__}: {len(self.axes)} axes, {cost})"

    def __str__(self) -> str:
        rows = []
        for axis in self.axes.values():
            may = ", ".join(word for word, can in (("grow", axis.growable), ("prune", axis.prunable)) if can) or "-"
            places = str(len({tensor for tensor, _, _ in self.topology.by_name[axis.name].slots}))
            rows.append((axis.name, str(axis.size), may, f"{axis.unit_cost.parameters:,}", places, axis.reason or ""))
        header = ("axis", "units", "may", "parameters per unit", "tensors", "why not")
        lines = [f"{type(self.model).__name__}: {self.cost()} for the example inputs", ""]
        lines += [*text_table(header, rows, right=(1, 3, 4)), *self.topology.notes]
        lines += ["", *site_table(self.sites())]
        if self.masks:
            size, live = (sum(int(one) for one in each) for each in zip(
                *((mask.numel(), mask.sum()) for mask in self.masks.values()), strict=True
            ))  # fmt: skip
            lines += ["", f"masks hold {size - live:,} of {size:,} weights of {len(self.masks)} parameters at zero"]
            lines += _mask_table(self.masks)
        if self.topology.unknown:
            names = ", ".join(f"{name} ({count}x)" for name, count in self.topology.unknown.items())
            lines.append(f"unknown operators, which freeze what they touch: {names}")
        return "\n".join(lines)


def _mask_table(masks: Masks) -> list[str]:
    """A line for each parameter that has a mask."""
    counts = [(name, mask.numel(), int(mask.sum())) for name, mask in masks.items()]
    rows = [(name, f"{size:,}", f"{live:,}", f"{1 - live / max(size, 1):.1%}") for name, size, live in counts]
    return text_table(("parameter", "weights", "live", "sparsity"), rows, right=(1, 2, 3))


__all__ = ["Axes", "Structure"]
