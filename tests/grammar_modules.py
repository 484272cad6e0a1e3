"""Random networks of nested modules: chains, residual and parallel blocks, lists, and code between the modules.

Where `grammar` writes many operators into one module, this composes modules, in all the ways in which their boundaries
can be easy or hard: used twice, several results, arguments by keyword, in-place operators, values that are kept.
Sizes are tokens (batch, 3, width) or images (batch, width, 4, 4). All in float64.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (4, 6, 8)


class Plain(nn.Module):
    """An activation that works in place or not, by function."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=self.inplace)


class Residual(nn.Module):
    """x + f(x), as people write it."""

    def __init__(self, branch: nn.Module, form: str) -> None:
        super().__init__()
        self.branch, self.form = branch, form
        self.drop = nn.Dropout(0.1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.form == "plain":
            return x + y
        if self.form == "dropped":
            return self.drop(y) + x
        if self.form == "in place":
            y += x
            return self.act(y)
        if self.form == "relu":
            return F.relu(x + y)
        return x + 0.5 * y


class Parallel(nn.Module):
    """Branches side by side, added or joined."""

    def __init__(self, branches: list[nn.Module], joined: bool) -> None:
        super().__init__()
        self.first, self.second = branches[0], branches[1]
        self.others = nn.ModuleList(branches[2:])
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x), self.second(x), *(one(x) for one in self.others)]
        return torch.cat(parts, 1 if x.dim() == 4 else -1) if self.joined else sum(parts[1:], parts[0])


class Listed(nn.Module):
    """A list that code goes through."""

    def __init__(self, layers: list[nn.Module], skips: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) if self.skips else layer(x)
        return x


class Twice(nn.Module):
    """One module that runs twice."""

    def __init__(self, inner: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.after(self.inner(x)))


class Halves(nn.Module):
    """The channels in two halves, of which one goes around."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        dim = 1 if x.dim() == 4 else -1
        kept, changed = x.chunk(2, dim)
        return torch.cat((kept, self.inner(changed)), dim)


class WithExtras(nn.Module):
    """A result with more than one part: a tuple, a list or a dictionary."""

    def __init__(self, inner: nn.Module, form: str) -> None:
        super().__init__()
        self.inner, self.form = inner, form

    def forward(self, x: Tensor, scale: float = 1.0) -> object:
        y = self.inner(x)
        if self.form == "tuple":
            return y * scale, None
        if self.form == "unused":
            return y.mean(), y
        if self.form == "list":
            return [None, y]
        if self.form == "used":
            return y, y.mean()
        return {"out": y}


class Taking(nn.Module):
    """Code that takes such results apart."""

    def __init__(self, inner: WithExtras) -> None:
        super().__init__()
        self.inner, self.form = inner, inner.form

    def forward(self, x: Tensor) -> Tensor:
        found, form = self.inner(x, scale=2.0), self.form
        if form == "tuple":
            return found[0]
        if form in ("unused", "list"):
            return found[1]
        return found[0] + found[1] if form == "used" else found["out"]


class Gate(nn.Module):
    """Two inputs, one of them by keyword."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *, by: Tensor) -> Tensor:
        return self.inner(x) * by.sigmoid()


class Gated(nn.Module):
    """A gate of one's own, or by a value of one number per example."""

    def __init__(self, gate: Gate, value: nn.Module, narrow: bool) -> None:
        super().__init__()
        self.gate, self.value, self.narrow = gate, value, narrow

    def forward(self, x: Tensor) -> Tensor:
        by = self.value(x)
        return self.gate(x, by=by.mean((1, 2), keepdim=True)[:, :, :1] if self.narrow and x.dim() == 3 else by)


class Keeping(nn.Module):
    """What one module computes on the way is used by the next one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.kept[:] = [y * 0.5]
        return y.tanh()


class Kept(nn.Module):
    def __init__(self, keeping: Keeping) -> None:
        super().__init__()
        self.keeping = keeping

    def forward(self, x: Tensor) -> Tensor:
        y = self.keeping(x)
        return y + self.keeping.kept.pop()


class ByWeight(nn.Module):
    """A layer whose weight code takes, of a module that it runs or does not run."""

    def __init__(self, width: int, runs: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.runs = runs

    def forward(self, x: Tensor) -> Tensor:
        y = x if x.dim() == 3 else x.transpose(1, 3)
        y = F.linear(self.layer(y) if self.runs else y, self.layer.weight)
        return y if x.dim() == 3 else y.transpose(1, 3)


class Turned(nn.Module):
    """A layer across another dimension, so that strides are not those of a fresh tensor; then a view."""

    def __init__(self, inner: nn.Module, viewed: bool) -> None:
        super().__init__()
        self.inner, self.viewed = inner, viewed

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape
        y = self.inner(x.transpose(1, 2).transpose(1, 2) if not self.viewed else x.flatten(1).view(size))
        y = y.transpose(1, 2)
        if self.viewed:
            return y.contiguous().view(size[0], -1).view(y.shape).transpose(1, 2)
        return y.transpose(1, 2)


class Across(nn.Module):
    """A layer that runs on the transposed value, whose result is viewed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.transpose(1, 2))
        return y.view(x.shape[0], -1).view(y.shape).transpose(1, 2)


class Unheard(nn.Module):
    """A module whose result nobody uses, and one that is the same under two names."""

    def __init__(self, unheard: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.unheard, self.layer = unheard, layer
        self.again = layer

    def forward(self, x: Tensor) -> Tensor:
        self.unheard(x)
        return self.again(x)


class InPlace(nn.Module):
    """Writes into its argument, which code reads afterwards, or into half of it."""

    def __init__(self, act: nn.Module, half: bool) -> None:
        super().__init__()
        self.act, self.half = act, half

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2.0
        if self.half:
            self.act(y[:, 1:])
            return y
        return self.act(y) + y


class Drawn:
    """Draws one network, with a number of modules that it may not pass."""

    def __init__(self, seed: int, most: int = 12) -> None:
        self.rng = random.Random(seed)
        self.left = most
        self.image = self.rng.random() < 0.4

    def network(self) -> tuple[nn.Module, Tensor]:
        """The network in float64 and an input for it."""
        torch.manual_seed(self.rng.randint(0, 2**31))
        width = self.rng.choice(WIDTHS)
        shape = (2, width, 4, 4) if self.image else (2, 3, width)
        layers, at = [], width
        for _ in range(self.rng.randint(1, 3)):
            layer, at = self.block(at, 3)
            layers.append(layer)
        model: nn.Module = nn.Sequential(*layers) if self.rng.random() < 0.7 else Listed(layers, skips=False)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        return Whole(model).double(), torch.randn(shape, dtype=torch.float64)

    def block(self, width: int, depth: int, to: int | None = None) -> tuple[nn.Module, int]:
        """A module and the width that it makes of another one."""
        self.left -= 1
        if depth == 0 or self.left < 0:
            return self.layer(width, to)
        kinds: list[Callable[..., tuple[nn.Module, int]]] = [self.chain, self.chain, self.parallel]
        if to in (None, width):
            kinds += [self.residual, self.residual, self.listed, self.same, self.same]
        return self.rng.choice(kinds)(width, depth - 1, to)

    def layer(self, width: int, to: int | None) -> tuple[nn.Module, int]:
        """One layer of torch."""
        if to is None and self.rng.random() < 0.5:
            return self.keeping_size(width), width
        to = self.rng.choice((width, width, *WIDTHS)) if to is None else to
        if not self.image:
            return nn.Linear(width, to), to
        kernel = self.rng.choice((1, 3))
        return nn.Conv2d(width, to, kernel, padding=kernel // 2), to

    def keeping_size(self, width: int) -> nn.Module:
        """A layer that changes no size."""
        of_kind = nn.BatchNorm2d(width) if self.image else nn.LayerNorm(width)
        choices = [nn.ReLU(), nn.ReLU(inplace=True), Plain(True), Plain(False), nn.GELU(), nn.Identity(), of_kind]
        return self.rng.choice([*choices, nn.Dropout(0.2), nn.Sigmoid()])

    def chain(self, width: int, depth: int, to: int | None) -> tuple[nn.Module, int]:
        layers, at = [], width
        for _ in range(self.rng.randint(1, 3)):
            layer, at = self.block(at, depth)
            layers.append(layer)
        if to is not None:
            layers.append(self.layer(at, to)[0])
        return nn.Sequential(*layers), at if to is None else to

    def residual(self, width: int, depth: int, to: int | None) -> tuple[nn.Module, int]:
        form = self.rng.choice(("plain", "dropped", "in place", "relu", "scaled"))
        return Residual(self.block(width, depth, width)[0], form), width

    def parallel(self, width: int, depth: int, to: int | None) -> tuple[nn.Module, int]:
        joined = to is None and self.rng.random() < 0.5
        count = self.rng.randint(2, 3)
        out = self.rng.choice(WIDTHS) if to is None else to
        parts = [self.block(width, depth, out)[0] for _ in range(count)]
        return Parallel(parts, joined), out * count if joined else out

    def listed(self, width: int, depth: int, to: int | None) -> tuple[nn.Module, int]:
        layers = [self.block(width, depth, width)[0] for _ in range(self.rng.randint(1, 3))]
        return Listed(layers, self.rng.random() < 0.5), width

    def same(self, width: int, depth: int, to: int | None) -> tuple[nn.Module, int]:
        """One of the harder modules."""
        inner = self.block(width, depth, width)[0]
        forms: list[Callable[[], nn.Module]] = [
            lambda: Twice(inner, self.keeping_size(width)),
            lambda: Halves(self.block(width // 2, depth, width // 2)[0]) if width % 2 == 0 else inner,
            lambda: Taking(WithExtras(inner, self.rng.choice(("tuple", "unused", "list", "used", "dict")))),
            lambda: Gated(Gate(inner), self.layer(width, width)[0], self.rng.random() < 0.5),
            lambda: Kept(Keeping(inner)),
            lambda: ByWeight(width, self.rng.random() < 0.5) if not self.image else inner,
            lambda: Turned(inner, self.rng.random() < 0.5),
            lambda: Across(nn.Linear(3, 3)) if not self.image else Across(nn.Linear(4, 4)),
            lambda: Unheard(self.layer(width, width)[0], inner),
            lambda: InPlace(nn.ReLU(inplace=True), self.rng.random() < 0.5),
        ]
        return self.rng.choice(forms)(), width


class Whole(nn.Module):
    """A network whose last layer has no say in its sizes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def trains(model: nn.Module, x: Tensor) -> bool:
    """Whether a network can be trained as it is, and leaves its input alone: in-place operators may see to that."""
    given = x.clone()
    try:
        for mode in (False, True):
            model.train(mode)(x).sum().backward()
    except RuntimeError:
        return False
    finally:
        model.zero_grad()
    return torch.equal(given, x)


def nested(seed: int) -> tuple[nn.Module, Tensor]:
    """The network of that number."""
    for attempt in range(100):
        model, x = Drawn(seed + attempt * 1_000_003).network()
        if trains(model, x) and any(True for _ in model.parameters()):
            return model, x
    raise AssertionError(f"nothing that trains was drawn for {seed}")
