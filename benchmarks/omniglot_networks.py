"""The networks of ``bench_omniglot``: one small network per alphabet, which share some of their modules or none.

Shapes: T tasks, B drawings of each in a step, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl import L2Coupling, TraceNorm
from mtl.data import TaskData, num_outputs
from mtl.sharing.couplings import Coupling, Stacked

WIDTHS = (16, 32, 64)
NUM_FEATURES = WIDTHS[-1] * 3 * 3  # 28 x 28 pixels, halved by the stride of the first block and the pooling of others
BATCH_SIZE = 16  # drawings of each alphabet in a step
CONVOLUTIONS, NORMS = {"conv1", "conv2", "conv3"}, {"norm1", "norm2", "norm3"}
FIRST_TWO = {"conv1", "norm1", "conv2", "norm2"}


@dataclass(frozen=True)
class Arm:
    """A way of sharing.

    Args:
        shared: names of the modules that all tasks have in common
        union: factor of the union softmax in the loss
        coupling: of what is not shared
        together: in this part of the steps, the first ones, all tasks train one network, union softmax included; then
            each goes on with a copy of its own
    """

    shared: frozenset[str] = frozenset()
    union: float = 0.0
    coupling: Coupling | None = None
    together: float = 0.0


ARMS = {
    "single-task": Arm(),
    "all + union, then apart": Arm(union=1.0, together=0.7),
    "all + union": Arm(frozenset(CONVOLUTIONS | NORMS), union=1.0),
    "first two + union": Arm(frozenset(FIRST_TWO), union=1.0),
    "first two": Arm(frozenset(FIRST_TWO)),
    "convolutions": Arm(frozenset(CONVOLUTIONS)),  # batch norms are private
    "all": Arm(frozenset(CONVOLUTIONS | NORMS)),
    "L2 to the mean": Arm(coupling=L2Coupling({"conv*": 0.1})),
    "trace norm of deviations": Arm(coupling=TraceNorm({"conv*": 0.03}, of="deviations")),
}
STATISTICS = ("running", "clean")  # of batch norm in evaluation: as in training, or of the undistorted drawings


@dataclass(frozen=True)
class Recipe:
    """How an arm is trained; ``augmentation`` scales shift, rotation, zoom and shear alike, ``sharing`` the factors of
    union softmax and coupling."""

    steps: int = 600
    lr: float = 1e-2
    weight_decay: float = 0.5
    augmentation: float = 2.0
    sharing: float = 1.0


class Network(nn.Module):
    """A network per task, all in one computation, whatever they share.

    Parameters have an axis of copies in front, one for each task, or a single one where they are shared; all copies
    start alike. Between layers the channels of all tasks lie side by side.

    Args:
        outputs: classes of each task
        arm: what is shared
    """

    def __init__(self, outputs: Mapping[str, int], arm: Arm) -> None:
        super().__init__()
        self.num_tasks = len(outputs)
        self.stacks, self.statistics = nn.ParameterDict(), nn.ModuleDict()
        channels = 1
        for number, width in enumerate(WIDTHS, start=1):
            for name, module in (
                (f"conv{number}", nn.Conv2d(channels, width, 5 if number == 1 else 3, bias=False)),
                (f"norm{number}", nn.BatchNorm2d(width)),
            ):
                copies = 1 if name in arm.shared else self.num_tasks
                for kind, values in module.named_parameters():
                    self.stacks[f"{name}_{kind}"] = nn.Parameter(values.detach().expand(copies, *values.shape).clone())
            self.statistics[f"norm{number}"] = nn.BatchNorm2d(copies * width, affine=False)
            channels = width
        self.heads = nn.ModuleList(nn.Linear(NUM_FEATURES, number) for number in outputs.values())
        self.union = nn.Linear(NUM_FEATURES, sum(outputs.values())) if arm.union else None

    def features(self, images: Tensor) -> Tensor:
        """Images (B, T, 28, 28) -> features (T, B, D)."""
        x = images.to(torch.bfloat16, memory_format=torch.channels_last)
        for number in range(1, len(WIDTHS) + 1):
            kernels = self.stacks[f"conv{number}_weight"].to(x.dtype)
            kernels = kernels.expand(self.num_tasks, *kernels.shape[1:]).flatten(0, 1)
            padding, stride = kernels.shape[-1] // 2, 2 if number == 1 else 1
            x = self._norm(F.conv2d(x, kernels, None, stride, padding, groups=self.num_tasks), number)
            x = F.relu(F.max_pool2d(x, 2) if number > 1 else x)
        return x.unflatten(1, (self.num_tasks, -1)).flatten(2).transpose(0, 1).float()

    def mixed_features(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """As ``features``, but each copy gets images of any tasks, B of all B T: for copies that are the same.

        Batch norms then have the statistics of all tasks, and the noise of a batch of B.
        """
        order = torch.randperm(images.shape[0] * images.shape[1], generator=generator)
        features = self.features(images.flatten(0, 1)[order].view_as(images)).transpose(0, 1)
        return features.flatten(0, 1)[order.argsort()].view_as(features).transpose(0, 1)

    def average_gradients(self) -> None:
        """Over the copies: those that are the same stay the same."""
        for stack in self.stacks.values():
            assert stack.grad is not None
            stack.grad.copy_(stack.grad.mean(0, keepdim=True).expand_as(stack))

    def _norm(self, x: Tensor, number: int) -> Tensor:
        """Over the images of each task where the module is private, of all tasks where it is shared."""
        weight, bias = (self.stacks[f"norm{number}_{kind}"].flatten() for kind in ("weight", "bias"))
        own = self.statistics[f"norm{number}"]
        assert isinstance(own, nn.BatchNorm2d)
        assert own.momentum is not None
        shared = len(weight) < x.shape[1]
        if shared:  # tasks from the axis of channels to that of images, in the memory order of channels_last
            x = x.permute(0, 2, 3, 1).unflatten(3, (self.num_tasks, -1)).movedim(3, 1).flatten(0, 1).permute(0, 3, 1, 2)
        x = F.batch_norm(x, own.running_mean, own.running_var, weight, bias, self.training, own.momentum, own.eps)
        if shared:
            x = x.permute(0, 2, 3, 1).unflatten(0, (-1, self.num_tasks)).movedim(1, 3).flatten(3).permute(0, 3, 1, 2)
        return x


def train(arm: Arm, recipe: Recipe, data: Mapping[str, TaskData], seed: int, split: str) -> dict[str, float]:
    """Accuracy on a split, mean over tasks, after training on "train": with each of ``STATISTICS``."""
    torch.manual_seed(seed)
    classes = num_outputs(data)
    network = Network(classes, arm)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps)
    generator = torch.Generator().manual_seed(seed)
    images, labels, sizes = _together(data, "train")
    starts = sizes.cumsum(0) - sizes
    offsets = torch.tensor([0, *classes.values()]).cumsum(0)[:-1, None]  # of each task's classes among all
    network.train()
    for step in range(recipe.steps):
        # with replacement, so that alphabets of all sizes give batches of one size
        chosen = starts + (torch.rand(BATCH_SIZE, len(sizes), generator=generator) * sizes).long()
        inputs = distort(images[chosen.flatten()], recipe.augmentation, generator).view(*chosen.shape, 28, 28)
        together = step < arm.together * recipe.steps
        features = network.mixed_features(inputs, generator) if together else network.features(inputs)
        targets = labels[chosen].T
        losses = [F.cross_entropy(head(x), y) for head, x, y in zip(network.heads, features, targets, strict=True)]
        loss = torch.stack(losses).sum()
        if network.union is not None and (together or not arm.together):
            everyone = F.cross_entropy(network.union(features.flatten(0, 1)), (targets + offsets).flatten())
            loss = loss + recipe.sharing * arm.union * len(data) * everyone
        if arm.coupling is not None:
            stacked = Stacked(tuple(data), dict(network.stacks.items()), torch.tensor(step))
            loss = loss + recipe.sharing * arm.coupling.penalty(stacked)
        optimizer.zero_grad()
        loss.backward()
        if together:
            network.average_gradients()
        optimizer.step()
        schedule.step()
    held_out = _together(data, split)
    found = {"running": _accuracy(network, *held_out)}
    rows = torch.arange(int(sizes.max()))[:, None] % sizes  # all, those of small tasks several times
    network.train()
    for norm in network.statistics.values():
        assert isinstance(norm, nn.BatchNorm2d)
        norm.momentum = 1.0
    with torch.no_grad():
        network.features(images[starts + rows, 0])
    return found | {"clean": _accuracy(network, *held_out)}


def distort(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Images (B, 1, H, W), each moved, turned, zoomed and sheared at random.

    At amount 1: by up to 3 pixels of 28, 0.25 radians, 15 % and 0.2, uniformly.
    """
    limits = amount * torch.tensor([6 / 28, 6 / 28, 0.25, 0.15, 0.15, 0.2])
    draws = (2 * torch.rand(len(images), 6, generator=generator) - 1) * limits
    right, down, angle, wide, high, shear = draws.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    wide, high = wide.exp(), high.exp()
    rows = (cos * wide, (shear * cos - sin) * high, right, sin * wide, (shear * sin + cos) * high, down)
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _together(data: Mapping[str, TaskData], split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 1, H, W) in [0, 1] and labels (N,) of all tasks, one after the other, and how many are of each."""
    parts = [getattr(own, split) for own in data.values()]
    labels = [part.targets[task] for task, part in zip(data, parts, strict=True)]
    sizes = torch.tensor([len(part) for part in parts])
    return torch.cat([part.inputs for part in parts]).float() / 255, torch.cat(labels), sizes


@torch.no_grad()
def _accuracy(network: Network, images: Tensor, labels: Tensor, sizes: Tensor) -> float:
    """Mean over tasks."""
    network.eval()
    starts = sizes.cumsum(0) - sizes
    right = torch.zeros(len(sizes))
    for first in range(0, int(sizes.max()), 64):  # the last rows of small tasks come several times, and count once
        rows = torch.arange(first, min(first + 64, int(sizes.max())))[:, None]
        chosen = starts + rows.minimum(sizes - 1)
        features = network.features(images[chosen, 0])
        found = torch.stack([head(x).argmax(1) for head, x in zip(network.heads, features, strict=True)], 1)
        right += ((found == labels[chosen]) & (rows < sizes)).sum(0)
    return float((right / sizes).mean())
