"""Models. To bring your own: write a function of (num_classes, channels, image_size), and a yaml that names it.

`num_classes`, `channels` and `image_size` come from the data set; the yaml gives the rest.
"""

from torch import nn
from torchvision import models as tv

from src.errors import ConfigError, require_int, require_number


def resnet(num_classes: int, channels: int, image_size: int, depth: int = 18, small_stem: bool = True) -> nn.Module:
    """torchvision's ResNet (He et al. 2016).

    Args:
        small_stem: A 3 x 3 convolution without max-pooling instead of the 7 x 7 one with, as the paper
            has it for CIFAR: images of a few dozen pixels keep their resolution.
    """
    builders = {18: tv.resnet18, 34: tv.resnet34, 50: tv.resnet50, 101: tv.resnet101}
    if depth not in builders:
        raise ConfigError("model.depth", depth, f"must be one of {', '.join(map(str, builders))}")
    model = builders[depth](num_classes=num_classes)
    width = model.conv1.out_channels
    if small_stem:
        model.conv1 = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False)
    resnet: nn.Module = model
    return resnet


def vit(
    num_classes: int,
    channels: int,
    image_size: int,
    patch_size: int = 16,
    layers: int = 12,
    heads: int = 12,
    width: int = 768,
    dropout: float = 0.0,
) -> nn.Module:
    """torchvision's Vision Transformer (Dosovitskiy et al. 2021); the defaults are ViT-B/16."""
    for name, value in (("patch_size", patch_size), ("layers", layers), ("heads", heads), ("width", width)):
        require_int(f"model.{name}", value, 1, "see Dosovitskiy et al., table 1")
    require_number("model.dropout", dropout, "share of activations dropped", at_least=0, below=1)
    if image_size % patch_size:
        remedy = f"must divide the image size {image_size}; set it, or set data.image_size where the data has it"
        raise ConfigError("model.patch_size", patch_size, remedy)
    if width % heads:
        raise ConfigError("model.heads", heads, f"must divide model.width={width}")
    model: nn.Module = tv.VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        num_layers=layers,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=4 * width,
        dropout=dropout,
        num_classes=num_classes,
    )
    if channels != 3:
        model.conv_proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)
    return model


def small_cnn(num_classes: int, channels: int, image_size: int, width: int = 16, dropout: float = 0.1) -> nn.Module:
    """Two convolutions and a linear layer: trains in seconds, yet has buffers (BatchNorm) and draws
    random numbers (dropout), so it exercises all that exact resume must get right."""
    require_int("model.width", width, 1, "channels of the first convolution")
    require_number("model.dropout", dropout, "share of activations dropped", at_least=0, below=1)
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * width, num_classes),
    )
