"""The judge: a small classifier of the real images, trained on first use, that tells how good class samples are.

``class_accuracy`` is the share of samples that it puts in the class they were asked for; ``fd_classifier`` is the
Frechet distance between real and sampled images in its 64 features. Both are for small data sets and depend on this
classifier: they are no FID, and compare with nothing but themselves.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from erd_fast.evaluation.metrics import frechet_distance, mean_and_covariance
from erd_fast.files import cache_folder, write_bytes

_IMAGES_SHOWN = 1797 * 30  # in training the judge, whatever the size of the data set
_BATCH = 64
_VERSION = 1  # of network and recipe; part of the cache's name


class Classifier(nn.Module):
    """Three 3 x 3 convolutions, global mean, 64 features, a linear head. Images are uint8 NCHW."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(256, 64)
        self.head = nn.Linear(64, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(N, 64)."""
        x = images.float() / 127.5 - 1.0
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(F.max_pool2d(x, 2)))
        x = F.relu(self.conv3(x))
        return F.relu(self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclasses.dataclass(frozen=True)
class Judge:
    """A trained classifier with the statistics of the real images in its features."""

    classifier: Classifier
    real: tuple[np.ndarray, np.ndarray]
    holdout_accuracy: float
    """Accuracy of the same recipe on a fifth of the real images that it was not shown."""

    @torch.no_grad()
    def score(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """``class_accuracy`` and ``fd_classifier`` of uint8 NCHW samples with the labels they were asked for."""
        features = _in_batches(self.classifier.features, images)
        predicted = self.classifier.head(features).argmax(1)
        fd = frechet_distance(mean_and_covariance(features.double().numpy()), self.real)
        return {"class_accuracy": (predicted == labels).float().mean().item(), "fd_classifier": fd}


def get_judge(images: Tensor, labels: Tensor, num_classes: int, fingerprint: str) -> Judge:
    """The judge of a data set: read from the cache, or trained (seconds for small images on a CPU) and cached.

    Args:
        images: (N, C, H, W) uint8 real images.
        labels: (N,) int64.
        fingerprint: identity of the data set.
    """
    path = cache_folder("judges") / f"{fingerprint}-v{_VERSION}.safetensors"
    classifier = Classifier(images.shape[1], num_classes)
    accuracy = _load(classifier, path)
    if accuracy is None:
        accuracy = _train(classifier, images, labels)
        write_bytes(path, save(classifier.state_dict(), metadata={"holdout_accuracy": repr(accuracy)}))
    classifier.eval()
    with torch.no_grad():
        real = mean_and_covariance(_in_batches(classifier.features, images).double().numpy())
    return Judge(classifier, real, accuracy)


def _load(classifier: Classifier, path: Path) -> float | None:
    """Fill the classifier from the cache; None if there is none, or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return float(file.metadata()["holdout_accuracy"])
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        return None


def _train(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Train on four fifths, measure on the rest, then train the given classifier on everything."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    fifth = len(images) // 5
    trial = Classifier(images.shape[1], classifier.head.out_features)
    _fit(trial, images[order[fifth:]], labels[order[fifth:]])
    with torch.no_grad():
        predicted = _in_batches(trial, images[order[:fifth]]).argmax(1)
    _fit(classifier, images, labels)
    return (predicted == labels[order[:fifth]]).float().mean().item()


def _fit(classifier: Classifier, images: Tensor, labels: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in classifier.parameters():
            bound = (6.0 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.0
            parameter.uniform_(-bound, bound, generator=generator) if bound else parameter.zero_()
    steps = max(1, _IMAGES_SHOWN // _BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(images), (_BATCH,), generator=generator)
        loss = F.cross_entropy(classifier(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


def _in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([function(part) for part in images.split(512)])
