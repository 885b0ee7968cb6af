"""The models of the sweep in ``benchmarks/zoo.py``: names, how each is built with random weights, and its inputs.

An entry is data; nothing is imported or built before :meth:`Entry.build` is called. Input sizes are the models' own,
but smaller where the architecture takes any size and the model is too large for a sweep on one core.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_huggingface import HUGGING_FACE, hugging_face_inputs, hugging_face_model

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]

FAMILIES = ("huggingface", "timm", "segmentation", "video", "flow", "detection", "torchvision")

TORCHVISION_SIZES = {  # pixels a side; 224 for all others
    "googlenet": 224, "inception_v3": 299, "maxvit_t": 224, "vit_h_14": 224, "swin_v2_b": 256, "swin_v2_s": 256,
    "swin_v2_t": 256, "regnet_y_128gf": 64, "regnet_y_32gf": 96, "regnet_x_32gf": 96, "regnet_y_16gf": 128,
    "regnet_x_16gf": 128, "efficientnet_v2_l": 128, "efficientnet_v2_m": 128, "efficientnet_b7": 128,
    "efficientnet_b6": 128, "efficientnet_b5": 128, "convnext_large": 128, "convnext_base": 128,
    "resnext101_64x4d": 128, "resnext101_32x8d": 128, "wide_resnet101_2": 128,
}  # fmt: skip
VIDEO_SHAPES = {  # frames, pixels a side
    "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224),
    "swin3d_b": (8, 64), "swin3d_s": (8, 64), "swin3d_t": (8, 64),
}  # fmt: skip
SMALL_CLIP = (8, 64)
DETECTION_SIZE = 320  # also the size that the models resize to
SEGMENTATION_SIZE = 128
FLOW_SIZE = 128  # the least that RAFT takes

# One small model a family of timm; the value is the input size where it is not the model's own. gMLP and CSATv2 are in
# the first list, which is not pruned with exact_only: norms before the gates, or over hidden layers, see every channel.
TIMM_CONVOLUTIONAL: dict[str, int | None] = dict.fromkeys((
    "bat_resnext26ts", "convnext_atto", "convnextv2_atto", "cs3darknet_s", "cspdarknet53", "cspnext_tiny",
    "csatv2", "cspresnet50", "cspresnext50", "darknet53", "densenet121", "dla34", "dla60_res2net", "dpn48b",
    "ecaresnet26t", "eca_resnext26ts", "edgenext_xx_small", "efficientnet_b0", "efficientnet_lite0",
    "ese_vovnet19b_slim_dw",
    "fasternet_t0", "fbnetc_100", "fbnetv3_b", "gcresnext26ts", "gernet_s", "ghostnet_050", "ghostnetv2_100",
    "ghostnetv3_050", "gmlp_ti16_224", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0", "hrnet_w18_small",
    "inception_next_atto", "inception_v4", "lcnet_050", "lcnetv2_small", "legacy_seresnet18", "legacy_xception",
    "mambaout_femto", "mixnet_s", "mnasnet_small", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small",
    "mobileone_s0", "nf_regnet_b0", "nf_resnet26", "nfnet_l0", "eca_nfnet_l0", "rdnet_tiny", "regnetx_002",
    "regnety_002", "repghostnet_050", "repvgg_a0", "repvit_m0_9", "res2net50_14w_8s", "res2next50", "resnest14d",
    "resnet10t", "resnetv2_50", "resnext50_32x4d", "rexnet_100", "selecsls42", "semnasnet_050", "skresnet18",
    "spnasnet_100", "starnet_s050", "tinynet_e", "tresnet_m", "vovnet39a", "xception41",
)) | {"convmixer_768_32": 96, "dm_nfnet_f0": 128, "inception_resnet_v2": 160, "pnasnet5large": 128}  # fmt: skip
TIMM_TRANSFORMERS: dict[str, int | None] = dict.fromkeys((
    "beit_base_patch16_224", "botnet26t_256", "caformer_s18", "cait_xxs24_224", "coat_lite_tiny", "coat_tiny",
    "coatnet_nano_rw_224", "convformer_s18", "convit_tiny", "cpubone_nano", "crossvit_tiny_240",
    "davit_tiny", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224",
    "efficientformer_l1", "efficientformerv2_s0", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0",
    "eva02_tiny_patch14_224", "fastvit_t8", "flexivit_small", "focalnet_tiny_srf", "gcvit_xxtiny",
    "gmixer_12_224", "halonet26t", "hiera_tiny_224", "hieradet_small", "iformer_t", "lambda_resnet26t",
    "levit_128s", "levit_conv_128s", "lowformer_b0", "maxvit_pico_rw_256", "maxxvit_rmlp_nano_rw_256",
    "mixer_s32_224", "mobilenetv4_hybrid_medium", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny",
    "naflexvit_base_patch16_gap", "nest_tiny", "nextvit_small", "pit_ti_224", "poolformer_s12", "poolformerv2_s12",
    "pvt_v2_b0", "resmlp_12_224", "samvit_base_patch16_224", "sebotnet33ts_256", "sequencer2d_s", "shvit_s1",
    "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_tiny_window8_256",
    "tiny_vit_5m_224", "tnt_s_patch16_224", "twins_pcpvt_small", "twins_svt_small", "visformer_tiny",
    "vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224", "vit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224", "vitamin_small_224", "volo_d1_224", "xcit_nano_12_p16_224",
))  # fmt: skip
VISION_TRANSFORMERS = ("vit_", "swin", "maxvit", "mvit")  # how names of torchvision's transformers begin


@dataclass(frozen=True)
class Entry:
    """One model of the sweep: ``model()`` builds it, ``inputs(n)`` gives a batch of n for evaluation mode.

    ``training_inputs`` gives a batch for training mode where the model asks for more there (targets).
    ``is_transformer`` asks for a second pass with ``exact_only=True``.
    """

    family: str
    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    training_inputs: Callable[[int], Inputs] | None = None
    is_transformer: bool = False
    size: str = ""  # of the input, as the table shows it

    def build(self) -> nn.Module:
        """The model with its random weights, on the CPU, in evaluation mode."""
        torch.manual_seed(0)
        return self.model().eval()


@dataclass
class _Images:
    """Random images of a shape (channels, height, width), or with frames before the height."""

    shape: tuple[int, ...]
    count: int = 1  # of such inputs

    def __call__(self, batch: int) -> Inputs:
        images = tuple(torch.randn(batch, *self.shape) for _ in range(self.count))
        return images[0] if self.count == 1 else images


def entries(families: Sequence[str] = FAMILIES) -> list[Entry]:
    """The models of ``families``, in the order of :data:`FAMILIES`; libraries of other families are not imported."""
    makers = (_hugging_face, _timm, _segmentation, _video, _flow, _detection, _torchvision)
    chosen = [make for family, make in zip(FAMILIES, makers, strict=True) if family in families]
    return [entry for make in chosen for entry in make()]


def _hugging_face() -> Iterator[Entry]:
    for name, (_, _, is_transformer) in HUGGING_FACE.items():
        yield Entry(
            "huggingface",
            name,
            partial(hugging_face_model, name),
            partial(hugging_face_inputs, name),
            is_transformer=is_transformer,
            size="tiny",
        )


def _timm() -> Iterator[Entry]:
    from timm.models import create_model, get_pretrained_cfg

    for names, is_transformer in ((TIMM_TRANSFORMERS, True), (TIMM_CONVOLUTIONAL, False)):
        for name, pixels in names.items():
            default = get_pretrained_cfg(name)
            own = tuple(default.input_size) if default else (3, 224, 224)
            shape = own if pixels is None else (3, pixels, pixels)
            options: dict[str, Any] = {"img_size": pixels} if pixels and is_transformer else {}
            if default and not default.num_classes:  # where features are the output, whole streams cannot shrink
                options["num_classes"] = 1000
            yield Entry(
                "timm",
                name,
                partial(create_model, name, pretrained=False, **options),
                _Images(shape),
                is_transformer=is_transformer,
                size=_as_text(shape),
            )


def _segmentation() -> Iterator[Entry]:
    shape = (3, SEGMENTATION_SIZE, SEGMENTATION_SIZE)
    for name in _names("segmentation"):
        options = {} if name.startswith("lraspp") else {"aux_loss": True}
        model = _builder(name, weights_backbone=None, **options)
        yield Entry("segmentation", name, model, _Images(shape), size=_as_text(shape))


def _video() -> Iterator[Entry]:
    for name in _names("video"):
        frames, pixels = VIDEO_SHAPES.get(name, SMALL_CLIP)
        shape = (3, frames, pixels, pixels)
        is_transformer = name.startswith(VISION_TRANSFORMERS)
        yield Entry("video", name, _builder(name), _Images(shape), is_transformer=is_transformer, size=_as_text(shape))


def _flow() -> Iterator[Entry]:
    shape = (3, FLOW_SIZE, FLOW_SIZE)
    for name in _names("optical_flow"):
        yield Entry("flow", name, _builder(name), _Images(shape, count=2), size=f"2 x {_as_text(shape)}")


def _detection() -> Iterator[Entry]:
    def images(batch: int) -> tuple[list[Tensor]]:
        return ([torch.rand(3, DETECTION_SIZE, DETECTION_SIZE) for _ in range(batch)],)

    def with_targets(batch: int) -> Inputs:
        half = DETECTION_SIZE // 2
        target = {
            "boxes": torch.tensor([[8.0, 8.0, half, half], [half, 16.0, DETECTION_SIZE - 8, half + 40]]),
            "labels": torch.tensor([1, 1]),
            "masks": torch.ones(2, DETECTION_SIZE, DETECTION_SIZE, dtype=torch.uint8),
            "keypoints": torch.tensor([[[half / 2, half / 2, 1.0]] * 17] * 2),
        }
        return images(batch)[0], [target] * batch

    for name in _names("detection"):
        # with random weights no box passes the usual threshold; few boxes keep the second stage short
        if "rcnn" in name:
            options = {"box_score_thresh": 0.0, "box_detections_per_img": 10}
        else:
            options = {"score_thresh": 0.0, "detections_per_img": 10}
        if not name.startswith("ssd"):
            options |= {"min_size": DETECTION_SIZE, "max_size": DETECTION_SIZE}
        model = _builder(name, weights_backbone=None, **options)
        size = f"[{_as_text((3, DETECTION_SIZE, DETECTION_SIZE))}]"
        yield Entry("detection", name, model, images, with_targets, size=size)


def _torchvision() -> Iterator[Entry]:
    for name in _names(None):
        pixels = TORCHVISION_SIZES.get(name, 224)
        shape = (3, pixels, pixels)
        is_transformer = name.startswith(VISION_TRANSFORMERS)
        model = _builder(name)
        yield Entry("torchvision", name, model, _Images(shape), is_transformer=is_transformer, size=_as_text(shape))


def _names(module: str | None) -> list[str]:
    from torchvision import models

    return models.list_models(module=models if module is None else getattr(models, module))


def _builder(name: str, **options: Any) -> Callable[[], nn.Module]:
    from torchvision import models

    build = models.get_model_builder(name)
    return partial(build, weights=None, **options)


def _as_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
