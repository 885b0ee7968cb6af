"""Tiny Hugging Face models, built from configurations of their own: no download, two layers, 48 channels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 97
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**TEXT, "num_key_value_heads": 2, "intermediate_size": 96}  # two queries share a key and a value
IMAGE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
PATCHES = {**IMAGE, "image_size": 32, "patch_size": 8}
WIDTHS = [16, 32, 48, 64]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODING = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}  # fmt: skip
CLIP_TEXT = {**TEXT, "intermediate_size": 96, "max_position_embeddings": 32, "eos_token_id": 96, "bos_token_id": 0}
BACKBONE = {"embedding_size": 16, "hidden_sizes": WIDTHS, "depths": [1, 1, 1, 1], "out_features": ["stage4"]}


def hugging_face_model(name: str) -> nn.Module:
    """Builds one of :data:`HUGGING_FACE`, without the cache of keys and values that generation keeps."""
    import transformers

    model, config = HUGGING_FACE[name][0](transformers)
    config.use_cache = False
    built: nn.Module = model(config)
    return built


def hugging_face_inputs(name: str, batch: int) -> dict[str, Any]:
    """A batch of keyword arguments."""
    return HUGGING_FACE[name][1](batch)


def _ids(length: int = 11) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(0, VOCABULARY, (batch, length))


def _text(batch: int) -> dict[str, Any]:
    return {"input_ids": _ids()(batch)}


def _image(pixels: int) -> Callable[[int], dict[str, Any]]:
    return lambda batch: {"pixel_values": torch.randn(batch, 3, pixels, pixels)}


def _pair(batch: int) -> dict[str, Any]:
    return {**_text(batch), "decoder_input_ids": _ids(7)(batch)}


def _speech(batch: int) -> dict[str, Any]:
    return {"input_features": torch.randn(batch, 16, 40), "decoder_input_ids": _ids(7)(batch)}


def _captioned(batch: int) -> dict[str, Any]:
    return {**_text(batch), **_image(32)(batch)}


def _detr(t: Any) -> tuple[type[nn.Module], Any]:
    options = {**DECODING, "encoder_layers": 1, "decoder_layers": 1}
    backbone = t.ResNetConfig(**BACKBONE)
    off = {"use_timm_backbone": False, "use_pretrained_backbone": False}
    return t.DetrModel, t.DetrConfig(**off, backbone_config=backbone, d_model=48, num_queries=9, **options)


def _whisper(t: Any) -> tuple[type[nn.Module], Any]:
    lengths = {"max_source_positions": 20, "max_target_positions": 32, "decoder_start_token_id": 1}
    config = t.WhisperConfig(vocab_size=VOCABULARY, d_model=48, num_mel_bins=16, **DECODING, **lengths, **SPECIAL)
    return t.WhisperModel, config


def _segformer(t: Any) -> tuple[type[nn.Module], Any]:
    options = {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 32}
    return t.SegformerForSemanticSegmentation, t.SegformerConfig(hidden_sizes=WIDTHS, num_labels=7, **options)


# name -> how the class and the configuration are made, inputs, whether it is a transformer
Maker = Callable[[Any], tuple[type[nn.Module], Any]]
HUGGING_FACE: dict[str, tuple[Maker, Callable[[int], dict[str, Any]], bool]] = {
    "bert": (lambda t: (t.BertModel, t.BertConfig(**TEXT, intermediate_size=96)), _text, True),
    "gpt2": (
        lambda t: (t.GPT2LMHeadModel, t.GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4)),
        _text,
        True,
    ),
    "llama": (lambda t: (t.LlamaForCausalLM, t.LlamaConfig(**GROUPED)), _text, True),
    "mistral": (lambda t: (t.MistralForCausalLM, t.MistralConfig(**GROUPED)), _text, True),
    "t5": (
        lambda t: (
            t.T5Model,
            t.T5Config(vocab_size=VOCABULARY, d_model=48, d_kv=12, num_layers=2, num_heads=4, d_ff=96),
        ),
        _pair,
        True,
    ),
    "vit": (lambda t: (t.ViTModel, t.ViTConfig(**PATCHES)), _image(32), True),
    "clip": (
        lambda t: (t.CLIPModel, t.CLIPConfig(text_config=CLIP_TEXT, vision_config=PATCHES, projection_dim=24)),
        _captioned,
        True,
    ),
    "whisper": (_whisper, _speech, True),
    "mamba": (
        lambda t: (
            t.MambaForCausalLM,
            t.MambaConfig(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, state_size=8),
        ),
        _text,
        False,
    ),
    "convnextv2": (
        lambda t: (t.ConvNextV2Model, t.ConvNextV2Config(hidden_sizes=WIDTHS, depths=[1, 1, 2, 1], image_size=64)),
        _image(64),
        False,
    ),
    "segformer": (_segformer, _image(64), True),
    "detr": (_detr, _image(64), True),
}
