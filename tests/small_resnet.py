"""ResNets for 32 x 32 images with the layers and names of the trained CIFAR-10 ones, and what they answer like a transformers model."""

import json
import math
from types import SimpleNamespace

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x):
        straight = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + straight)


class ResNet(nn.Module):
    def __init__(self, blocks=1, width=8, classes=10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        for stage in (1, 2, 3):
            made = [Block(widths[stage - (i == 0)], widths[stage], 2 if i == 0 and stage > 1 else 1) for i in range(blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*made))
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, pixel_values, labels=None):
        x = torch.relu(self.bn1(self.conv1(pixel_values)))
        logits = self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def resnet(seed=0, **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResNet(**sizes)


def images(count=16, size=16, classes=10, seed=0):
    """Images whose class is the place of a bright patch in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    pixels = 0.5 * torch.randn(count, 3, size, size, generator=generator)
    side = size // math.ceil(classes**0.5)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        row, column = divmod(label, math.ceil(classes**0.5))
        image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] += 2.0
    return {"pixel_values": pixels, "labels": labels}


def trained(folder, blocks=3):
    """The published network of 6 blocks + 2 layers."""
    from safetensors.torch import load_file

    model = resnet(blocks=blocks, width=16)
    state = load_file(f"{folder}/cifar10_resnets/resnet{6 * blocks + 2}.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing), json.dumps([missing, unexpected])
    return model.eval()


def photographs(folder, count, split="test"):
    """The first images of every class, ``count`` in all, as the trained networks want them."""
    import zipfile

    import numpy as np

    import small_jpeg

    with zipfile.ZipFile(f"{folder}/cifar10_jpg/{split}.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[-2] for name in names})
        chosen = [name for c in classes for name in [n for n in names if n.split("/")[-2] == c][: count // len(classes)]]
        pixels = np.stack([small_jpeg.decode(archive.read(name)) for name in chosen]) / 255
    pixels = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    labels = [classes.index(name.split("/")[-2]) for name in chosen]
    return {"pixel_values": torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2).contiguous(), "labels": torch.tensor(labels)}
