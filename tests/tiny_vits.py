"""Tiny random vision transformers that transformers wrote, and images for them."""

import numpy as np

SIZES = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 3,
    # Large weights: with the usual 0.02 every hidden state is near its bias and errors hide.
    "initializer_range": 0.4,
}
FAMILIES = {
    "vit": ("ViTConfig", "ViTModel"),
    "vit_without_qkv_bias": ("ViTConfig", "ViTModel"),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel"),
}
OPTIONS = {"vit_without_qkv_bias": {"qkv_bias": False}}


def torch_model(transformers, family, head=None, **options):
    """A model of transformers with every parameter moved off its start."""
    import torch

    config_name, model_name = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**SIZES, **OPTIONS.get(family, {}), **options)
    return moved(getattr(transformers, head or model_name)(config))


def moved(model):
    """The model, in evaluation mode, with noise on its parameters."""
    import torch

    with torch.no_grad():  # fresh biases are zero and fresh norms one, which would hide swaps
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(count=4):
    """(count, 12, 12, 3), no two pixels alike."""
    size, channels = SIZES["image_size"], SIZES["num_channels"]
    draw = np.random.default_rng(0).normal(size=(count, size, size, channels))
    return draw.astype(np.float32)


def torch_outputs(model, pixels):
    """What a model of transformers returns for images (B, H, W, C)."""
    import torch

    with torch.no_grad():
        return model(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
