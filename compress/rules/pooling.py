"""Pooling and resizing: they slide along the spatial axes and leave batch and channels alone."""

from compress.labels import Labels
from compress.recorder import Op
from compress.rules.registry import NoRule, rule

# operator -> number of spatial axes, which are the last ones
SPATIAL_AXES = {
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3,
    "mkldnn_max_pool2d": 2, "fractional_max_pool2d": 2,
    "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3,
    "adaptive_avg_pool1d": 1, "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3,
    "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3,
    "upsample_nearest1d": 1, "upsample_nearest2d": 2, "upsample_nearest3d": 3,
    "_upsample_nearest_exact1d": 1, "_upsample_nearest_exact2d": 2, "_upsample_nearest_exact3d": 3,
    "upsample_linear1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3,
    "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2,
    "reflection_pad1d": 1, "reflection_pad2d": 2, "reflection_pad3d": 3,
    "replication_pad1d": 1, "replication_pad2d": 2, "replication_pad3d": 3,
}  # fmt: skip


@rule(*SPATIAL_AXES)
def spatial(labels: Labels, op: Op) -> None:
    """The leading axes pass; a spatial axis that could shrink is frozen, as its neighbours meet in the window."""
    source = op.tensors[0]
    num_spatial = SPATIAL_AXES[op.func._schema.name.removeprefix("aten::")]
    if len(source.shape) <= num_spatial:
        raise NoRule(f"an input of shape {source.shape}")
    axes = labels[source]
    for axis in axes[-num_spatial:]:
        labels.freeze(axis, f"operator {op} slides along the axis")
    for output in op.outputs:
        labels.set(output, [*axes[:-num_spatial], *(labels.fixed(n) for n in output.shape[-num_spatial:])])
