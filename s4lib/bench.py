"""How fast a core prepares training images, and where its time goes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from .config import Config
from .data import open_dataset
from .data.families import build_views

MEAN = (0.485, 0.456, 0.406)  # of padding; normalisation costs the same with any


@dataclass(frozen=True)
class DataTimes:
    """CPU seconds of each part, for `images` images of `height` x `width` on average.

    Decoding is without the cache that keeps read images; the weak view is the crop with its label,
    resized and normalised; the strong views are further versions of that crop.
    """

    images: int
    height: float
    width: float
    decode: float
    weak: float
    strong: float

    @property
    def seconds(self) -> float:
        return self.decode + self.weak + self.strong


def bench_data(config: Config, count: int, strong_views: int) -> DataTimes:
    """Prepare `count` training images in one thread, `config.batch` at a time.

    Raises:
        ValueError: bad data, or a count below one.
    """
    if count < 1:
        raise ValueError(f"images={count}: choose 1 or more")
    if strong_views < 0:
        raise ValueError(f"strong_views={strong_views}: choose 0 or more")
    dataset = open_dataset(config.dataset, "train", root=config.data_root, size=config.size or None)
    views = build_views(config, dataset[0][0].shape[1:], MEAN)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _batch(dataset, views, range(min(count, config.batch)), strong_views)  # first calls: slow
        times, sizes = np.zeros(3), []
        for first in range(0, count, config.batch):
            indices = range(first, min(first + config.batch, count))
            spent, seen = _batch(dataset, views, indices, strong_views)
            times, sizes = times + spent, sizes + seen
    finally:
        torch.set_num_threads(threads)
    return DataTimes(count, *np.mean(sizes, 0).tolist(), *times.tolist())


def _batch(dataset, views, indices: range, strong_views: int) -> tuple[np.ndarray, list]:
    """Seconds of the three parts, and the images' sizes."""
    marks = [time.process_time()]
    samples = [dataset.read(i % len(dataset)) for i in indices]
    images = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image, _ in samples]
    labels = [torch.from_numpy(label.copy()) for _, label in samples]
    marks.append(time.process_time())
    rngs = [np.random.default_rng(i) for i in indices]
    drawn = zip(rngs, labels, strict=True)
    crops = [views.draw_crop(rng, *label.shape, label) for rng, label in drawn]
    plain = views.crop_images(images, crops)
    views.crop_labels(labels, crops), views.valid(images, crops), _normalised(plain)
    marks.append(time.process_time())
    for _ in range(strong_views):
        _normalised(views.strong(plain, rngs))
    marks.append(time.process_time())
    return np.diff(marks), [label.shape for label in labels]


def _normalised(image: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(MEAN).view(3, 1, 1)
    return ((image - mean) / mean).contiguous(memory_format=torch.channels_last)
