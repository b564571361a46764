"""Data sets. To bring your own: write a function that returns a `Data`, and a yaml that names it.

Randomness in a transform may come from torch, numpy or python alike: the loader seeds all three for
every sample (see `loader.py`), so results do not depend on the number of workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets as tv
from torchvision.transforms import v2

from src.errors import ConfigError, require_int, require_number


@dataclass(frozen=True)
class Data:
    """What training needs to know of a data set. Items are `(image, label)`: float32 (C, H, W), int."""

    train: Dataset[Any]
    val: Dataset[Any]
    train_size: int
    val_size: int
    classes: Sequence[str]
    channels: int
    image_size: int
    """Pixels, height and width."""
    batch_size: int
    """Samples per optimizer step."""

    def fingerprint(self) -> dict[str, int | str]:
        """What must not change under a run that is resumed, wherever the files are."""
        names = blake2b("\n".join(self.classes).encode(), digest_size=8).hexdigest()
        return {"train_size": self.train_size, "val_size": self.val_size, "classes": names}


class TensorImages(Dataset[Any]):
    """Images that fit in memory, with an optional transform per sample."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images, self.transform = images, transform
        self.labels: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.labels[index]


def digits(batch_size: int, augment: bool = True, image_size: int = 8) -> Data:
    """1,797 handwritten digits of 8 x 8 pixels, from scikit-learn's wheel: real, and needs no download.

    Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits. Every fifth image validates.
    """
    from sklearn.datasets import load_digits  # imported here: it takes a second that others need not pay

    require_int("data.image_size", image_size, 8, "pixels")
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1) / 16
    if image_size != 8:
        images = v2.functional.resize(images, [image_size, image_size], antialias=True)
    images = (images - 0.305) / 0.376
    labels = torch.tensor(source.target)
    validates = torch.arange(len(images)) % 5 == 4
    shift = v2.RandomCrop(image_size, padding=image_size // 8, fill=float(images.min()))
    train = TensorImages(images[~validates], labels[~validates], shift if augment else None)
    val = TensorImages(images[validates], labels[validates])
    names = [str(digit) for digit in range(10)]
    return _checked(Data(train, val, len(train), len(val), names, 1, image_size, batch_size))


def cifar10(root: str, batch_size: int, augment: bool = True, download: bool = True) -> Data:
    """60,000 photographs of 32 x 32 pixels in ten classes (Krizhevsky 2009), downloaded to `root` once."""
    normalize = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    ]
    augmentation = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if augment else []
    try:
        train = tv.CIFAR10(root, train=True, download=download, transform=v2.Compose([*augmentation, *normalize]))
        val = tv.CIFAR10(root, train=False, download=download, transform=v2.Compose(normalize))
    except (OSError, RuntimeError) as error:
        remedy = "has no CIFAR-10; put cifar-10-batches-py there, or choose data.download=true"
        if download:
            remedy = f"has no CIFAR-10 and it could not be downloaded ({error}); put cifar-10-batches-py there"
        raise ConfigError("data.root", root, remedy) from error
    return _checked(Data(train, val, len(train), len(val), train.classes, 3, 32, batch_size))


def image_folder(root: str, batch_size: int, image_size: int = 224, augment: bool = True) -> Data:
    """Your own photographs: `root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg`."""
    require_int("data.image_size", image_size, 1, "pixels")
    normalize = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    resize = [v2.Resize(image_size * 8 // 7, antialias=True), v2.CenterCrop(image_size)]
    augmentation = [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()] if augment else resize
    try:
        train = tv.ImageFolder(str(Path(root) / "train"), v2.Compose([*augmentation, *normalize]))
        val = tv.ImageFolder(str(Path(root) / "val"), v2.Compose([*resize, *normalize]))
    except OSError as error:
        remedy = f"must hold train/CLASS/*.jpg and val/CLASS/*.jpg ({error})"
        raise ConfigError("data.root", root, remedy) from error
    if train.classes != val.classes:
        different = sorted(set(train.classes) ^ set(val.classes))
        raise ConfigError("data.root", root, f"train/ and val/ must have the same classes; they differ in {different}")
    return _checked(Data(train, val, len(train), len(val), train.classes, 3, image_size, batch_size))


def synthetic(
    batch_size: int,
    train_size: int = 1024,
    val_size: int = 256,
    classes: int = 10,
    channels: int = 3,
    image_size: int = 32,
    noise: float = 1.0,
    seed: int = 0,
) -> Data:
    """A fixed random picture per class plus noise: learnable, of any size, for tests and benchmarks."""
    require_int("data.train_size", train_size, 1, "images")
    require_int("data.val_size", val_size, 1, "images")
    require_int("data.classes", classes, 2, "classes")
    require_int("data.channels", channels, 1, "colour channels")
    require_int("data.image_size", image_size, 1, "pixels")
    require_number("data.noise", noise, "standard deviation of the noise", at_least=0)
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(classes, channels, image_size, image_size, generator=generator)

    def sample(count: int) -> TensorImages:
        labels = torch.randint(classes, (count,), generator=generator)
        images = pictures[labels] + noise * torch.randn(count, *pictures.shape[1:], generator=generator)
        return TensorImages(images, labels)

    names = [str(index) for index in range(classes)]
    return _checked(
        Data(sample(train_size), sample(val_size), train_size, val_size, names, channels, image_size, batch_size)
    )


def _checked(data: Data) -> Data:
    require_int("data.batch_size", data.batch_size, 1, "samples per optimizer step")
    if data.batch_size > data.train_size:
        remedy = f"is more than the {data.train_size} samples of the training set; choose a smaller one"
        raise ConfigError("data.batch_size", data.batch_size, remedy)
    return data
