"""Normalisation layers. Batch norm treats channels one by one; the others mix the channels that they normalise over."""

from compress.labels import Labels
from compress.origins import origin, origins
from compress.recorder import Op, TensorRef
from compress.rules.registry import NoRule, base_name, rule


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm",
    "_native_batch_norm_legit_functional", "_batch_norm_with_update_functional",
)  # fmt: skip
def batch_norm(labels: Labels, op: Op) -> None:
    """x (N, C, *): weight, bias and statistics follow the channels. Statistics of x itself are taken over other axes.

    Those hold no channels in a network's batch norm; some networks standardise their weights by this operator.
    """
    source = op.tensors[0]
    axes = labels[source]
    own = op.arguments.get("training", base_name(op).removesuffix("_functional").endswith(("_legit", "with_update")))
    if own and not labels.in_training:  # exactness is about evaluation mode, where most use running statistics
        for axis, labels_of_axis in enumerate(axes):
            if axis != 1:
                labels.mix(labels_of_axis, f"operator {op} takes its statistics over the axis")
    for ref in op.tensors[1:]:
        if ref.shape != (source.shape[1],):
            raise NoRule(f"a statistic of shape {ref.shape}")
        labels.link(axes[1], labels[ref][0], str(op))
    labels.set(op.outputs[0], axes)
    for statistic in op.outputs[1:]:
        labels.set(statistic, [axes[1]] if len(statistic.shape) == 1 and statistic.shape[0] == source.shape[1]
                   else [labels.fixed(n) for n in statistic.shape])  # fmt: skip


@rule("prunus::bn_act")
def fused_batch_norm(labels: Labels, op: Op) -> None:
    """activation(batch_norm(x) + residual) of `layers.kernels`, x (N, C, *), always with the batch's statistics."""
    source, *others = op.tensors
    axes = labels[source]
    if not labels.in_training:
        for axis, labels_of_axis in enumerate(axes):
            if axis != 1:
                labels.mix(labels_of_axis, f"operator {op} takes its statistics over the axis")
    for ref in others:
        of_channels = len(ref.shape) == 1
        for mine, its in zip([axes[1]] if of_channels else axes, labels[ref], strict=True):
            labels.link(mine, its, str(op))
    labels.set(op.outputs[0], axes)
    for statistic in op.outputs[1:]:
        labels.set(statistic, [axes[1]])


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(labels: Labels, op: Op) -> None:
    """x (*, normalized_shape): statistics over the last axes, so that removing a channel changes the others' values."""
    source = op.tensors[0]
    axes = labels[source]
    num_normalized = len(op.arguments["normalized_shape"])
    normalized = axes[len(axes) - num_normalized :]
    for labels_of_axis, size in zip(normalized, origins(op, "normalized_shape"), strict=True):
        labels.mix(labels_of_axis, f"operator {op} takes its statistics over the channels")
        labels.equate(size, labels_of_axis, str(op))
    for ref in op.tensors[1:]:
        for labels_of_axis, parameter_labels in zip(normalized, labels[ref], strict=True):
            labels.link(labels_of_axis, parameter_labels, str(op))
    labels.set(op.outputs[0], axes)
    for statistic in op.outputs[1:]:
        labels.set(statistic, [*axes[: len(axes) - num_normalized], *(labels.fixed(1) for _ in range(num_normalized))])


@rule("native_group_norm")
def group_norm(labels: Labels, op: Op) -> None:
    """x (N, C, *) in G groups. Whole groups go exactly; where G cannot change, the same positions of every group do."""
    source = op.tensors[0]
    axes = labels[source]
    groups = op.arguments["group"]
    grid = axes[1].reshape(groups, -1)
    expression = origin(op, "group")
    if groups > 1 and expression is not None and not isinstance(expression, int):
        for column in grid.T[1:]:
            labels.link(grid[:, 0], column, str(op))
        labels.equate(expression, grid[:, 0], str(op))
    else:
        for row in grid[1:]:
            labels.link(grid[0], row, str(op))
        labels.mix(axes[1], f"operator {op} takes its statistics over the channels")
    for ref in op.tensors[1:]:
        if isinstance(ref, TensorRef):
            labels.link(axes[1], labels[ref][0], str(op))
    labels.set(op.outputs[0], axes)
    for statistic in op.outputs[1:]:
        labels.set(statistic, [labels.fixed(n) for n in statistic.shape])


@rule("_weight_norm_interface")
def weight_norm(labels: Labels, op: Op) -> None:
    """v (*), g (v's length along one axis): the weight is v, each of its slices there scaled to the norm in g."""
    direction, magnitude = op.tensors
    axes = labels[direction]
    dim = op.arguments["dim"] % len(axes)
    for axis, axis_labels in enumerate(axes):
        if axis != dim:
            labels.mix(axis_labels, f"operator {op} normalises the weight over the axis")
    labels.link(axes[dim], labels[magnitude][dim], str(op))
    weight, length = op.outputs
    labels.set(weight, axes)
    labels.set(length, labels[magnitude])
