"""Batches for training: which images and which views of them, a function of (seed, step)."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..method import Batch, Method
from .images import Images
from .splits import Split
from .views import Views, colour_jitter

LABELED, UNLABELED = 0, 1  # streams of random numbers


class Loader:
    """`loader[step]` is this process's share of the step's `Batch`.

    An epoch passes once over the unlabeled list in a shuffled order (its last batch is filled up
    from the order's start); the labeled list is cycled through in orders of its own. Both batch
    sizes count all processes together, and process r takes the r-th contiguous share, so that the
    union over processes does not depend on their number.

    Args:
        images, split: the training part and who carries labels.
        views: crop and colour settings.
        method: says which views it needs.
        batch, unlabeled_batch: images per step, over all processes.
        mean, std: normalisation, per channel.

    Raises:
        ValueError: a batch size that the processes cannot share evenly.
    """

    def __init__(
        self,
        images: Images,
        split: Split,
        views: Views,
        method: Method,
        *,
        batch: int,
        unlabeled_batch: int,
        seed: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
    ):
        for name, size in (("batch", batch), ("unlabeled_batch", unlabeled_batch)):
            if size < 1 or size % distributed.world():
                raise ValueError(
                    f"{name}={size}: choose a multiple of the {distributed.world()} ranks"
                )
        self.images, self.split, self.views = images, split, views
        self.batch, self.unlabeled_batch = batch, unlabeled_batch
        self.strong_views = method.strong_views
        self.labeled_strong, self.family = method.labeled_strong, method.family
        self.uses_unlabeled = method.uses_unlabeled
        if self.uses_unlabeled and not split.unlabeled:
            raise ValueError(
                "labeled covers every image, so nothing is left unlabeled: use method=supervised"
            )
        self.seed, self.device = seed, device
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)
        self.steps_per_epoch = math.ceil(len(split.unlabeled or split.labeled) / unlabeled_batch)
        self._readers = ThreadPoolExecutor(4)

    def labeled_at(self, step: int) -> list[tuple[int, int]]:
        """(pass, image index) of the labeled images of a step, over all processes."""
        positions = range(step * self.batch, (step + 1) * self.batch)
        return [(p // len(self.split.labeled), self._in_pass(LABELED, p)) for p in positions]

    def _in_pass(self, stream: int, position: int) -> int:
        pool = self.split.labeled
        turn, place = divmod(position, len(pool))
        return pool[np.random.default_rng([self.seed, stream, turn]).permutation(len(pool))[place]]

    def unlabeled_at(self, step: int) -> list[tuple[int, int]]:
        """(epoch, image index) of the unlabeled images of a step, over all processes."""
        epoch, within = divmod(step, self.steps_per_epoch)
        pool = self.split.unlabeled
        order = np.random.default_rng([self.seed, UNLABELED, epoch]).permutation(len(pool))
        positions = range(within * self.unlabeled_batch, (within + 1) * self.unlabeled_batch)
        return [(epoch, pool[order[p % len(pool)]]) for p in positions]

    def _mine(self, entries: list) -> list:
        share = len(entries) // distributed.world()
        return entries[distributed.rank() * share : (distributed.rank() + 1) * share]

    def _views(
        self, stream: int, entries: list[tuple[int, int]]
    ) -> tuple[list, list, Tensor, list]:
        samples = list(self._readers.map(lambda entry: self.images[entry[1]], entries))
        images = [image.to(self.device, non_blocking=True) for image, _ in samples]
        labels = [label.to(self.device, non_blocking=True) for _, label in samples]
        # An image met twice in one pass (a batch larger than the list) gets two different views.
        seen: dict[tuple[int, int], int] = {}
        rngs, maps = [], []
        for entry, (image, _) in zip(entries, samples, strict=True):
            seen[entry] = seen.get(entry, -1) + 1
            rngs.append(np.random.default_rng([self.seed, 2 + stream, *entry, seen[entry]]))
            maps.append(self.views.draw_crop(rngs[-1], *image.shape[1:]))
        return images, labels, torch.from_numpy(np.stack(maps)).to(self.device), rngs

    def _normalise(self, image: Tensor) -> Tensor:
        return ((image - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def __getitem__(self, step: int) -> Batch:
        images, labels, maps, rngs = self._views(LABELED, self._mine(self.labeled_at(step)))
        plain = self.views.crop_images(images, maps)
        image, label = self._normalise(plain), self.views.crop_labels(labels, maps)
        image_strong = self._strong(plain, image, rngs) if self.labeled_strong else None
        if not self.uses_unlabeled:
            valid = torch.ones_like(label[:0], dtype=torch.bool)
            return Batch(image, label, image[:0], (), valid, image_strong)
        images, _, maps, rngs = self._views(UNLABELED, self._mine(self.unlabeled_at(step)))
        plain = self.views.crop_images(images, maps)
        weak = self._normalise(plain)
        strong = tuple(self._strong(plain, weak, rngs) for _ in range(self.strong_views))
        return Batch(image, label, weak, strong, self.views.valid(images, maps), image_strong)

    def _strong(self, plain: Tensor, weak: Tensor, rngs: list[np.random.Generator]) -> Tensor:
        """A strong version of views in [0, 1], which normalised are `weak`."""
        if self.family == "noise":
            return self.views.add_noise(weak, rngs)
        draws = np.stack([self.views.draw_colour(rng) for rng in rngs])
        return self._normalise(colour_jitter(plain, torch.from_numpy(draws).to(self.device)))
