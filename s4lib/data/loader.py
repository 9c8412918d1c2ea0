"""Batches for training: which images and which views of them, a function of (seed, step)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..config import one_of
from ..method import Batch, Crop, Method
from .colour import jitter_normalised
from .families import FamilyViews
from .images import Images
from .splits import Split
from .views import Views, add_noise

# Streams of random numbers: orders, then what is drawn for the views of images.
LABELED, UNLABELED = 0, 1
LABELED_VIEWS, UNLABELED_VIEWS, SHARED, SECOND_VIEWS = 2, 3, 4, 5


class Loader:
    """`loader[step]` is this process's share of the step's `Batch`.

    An epoch passes once over the unlabeled list in a shuffled order (its last batch is filled up
    from the order's start); the labeled list is cycled through in orders of its own. Both batch
    sizes count all processes together, and process r takes the r-th contiguous share, so that the
    union over processes does not depend on their number. Asked for consecutive steps, it makes the
    next batch while the caller works on this one (`prefetch`); batches are the same either way.

    Args:
        images, split: the training part and who carries labels.
        views: crop and colour settings.
        method: says which views it needs, and in which order unlabeled images come.
        batch, unlabeled_batch: images per step, over all processes.
        mean, std: normalisation, per channel.
        pseudo_labels: by image index (H, W) uint8, for a method with `offline_labels`.
        prefetch: whether to work ahead; None does for a GPU. On a CPU the step needs the cores.

    Raises:
        ValueError: a batch size that the processes cannot share evenly, or nothing unlabeled.
    """

    def __init__(
        self,
        images: Images,
        split: Split,
        views: Views | FamilyViews,
        method: Method,
        *,
        batch: int,
        unlabeled_batch: int,
        seed: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        pseudo_labels: Mapping[int, Tensor] | None = None,
        prefetch: bool | None = None,
    ):
        for name, size in (("batch", batch), ("unlabeled_batch", unlabeled_batch)):
            if size < 1 or size % distributed.world():
                raise ValueError(
                    f"{name}={size}: choose a multiple of the {distributed.world()} ranks"
                )
        self.images, self.split, self.views = images, split, views
        self.batch, self.unlabeled_batch = batch, unlabeled_batch
        family = method.family
        self.families = (family,) * method.strong_views if isinstance(family, str) else family
        self.labeled_family = family if isinstance(family, str) else family[0]
        self.labeled_strong, self.second_crop = method.labeled_strong, method.second_crop
        self.pseudo_labels = pseudo_labels if method.offline_labels else None
        for family in (*self.families, self.labeled_family):
            one_of("family", family, "colour", "noise", "normalised")
        self.uses_unlabeled = method.uses_unlabeled
        if self.uses_unlabeled and not split.unlabeled:
            raise ValueError(
                "labeled covers every image, so nothing is left unlabeled: use method=supervised"
            )
        if self.uses_unlabeled and unlabeled_batch == distributed.world() > 1:
            warnings.warn(
                f"unlabeled_batch={unlabeled_batch} on {distributed.world()} processes: each has "
                "one image, so what mixes the images of a batch shows each in itself",
                stacklevel=3,
            )
        order = one_of("unlabeled_order", method.unlabeled_order, "shuffled", "fixed")
        self.shuffled = order == "shuffled"
        # Dual Teacher's distributed loader is neither shuffled nor longer than the labeled one.
        self.unlabeled = split.unlabeled[: None if self.shuffled else len(split.labeled)]
        self.seed, self.device = seed, device
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)
        self.steps_per_epoch = math.ceil(len(self.unlabeled or split.labeled) / unlabeled_batch)
        self._readers = ThreadPoolExecutor(4)
        self.prefetch = device.type == "cuda" if prefetch is None else prefetch
        start = {}
        if device.type == "cuda":  # a thread that pins memory would else wake up the first GPU
            index = torch.cuda.current_device() if device.index is None else device.index
            start = {"initializer": torch.cuda.set_device, "initargs": (index,)}
        self._maker = ThreadPoolExecutor(1, **start)
        self._next: tuple[int, Future | None] = (-1, None)  # step that is expected, and its batch

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
        order = np.arange(len(self.unlabeled))
        if self.shuffled:
            order = np.random.default_rng([self.seed, UNLABELED, epoch]).permutation(len(order))
        positions = range(within * self.unlabeled_batch, (within + 1) * self.unlabeled_batch)
        return [(epoch, self.unlabeled[order[p % len(order)]]) for p in positions]

    def _mine(self, entries: list) -> list:
        share = len(entries) // distributed.world()
        return entries[distributed.rank() * share : (distributed.rank() + 1) * share]

    def _read(self, entries: list[tuple[int, int]]) -> tuple[tuple[Tensor, ...], ...]:
        """Images and labels of these (pass, image index)."""
        samples = self._readers.map(lambda entry: self.images[entry[1]], entries)
        return tuple(zip(*samples, strict=True))

    def _drawn(
        self, stream: int, entries: list[tuple[int, int]], labels: Sequence[Tensor]
    ) -> tuple[list, list[np.random.Generator]]:
        """Crops drawn for these (pass, image index), and the generators that drew them."""
        # An image met twice in one pass (a batch larger than the list) gets two different views.
        seen: dict[tuple[int, int], int] = {}
        rngs, crops = [], []
        for entry, label in zip(entries, labels, strict=True):
            seen[entry] = seen.get(entry, -1) + 1
            rngs.append(np.random.default_rng([self.seed, stream, *entry, seen[entry]]))
            crops.append(self.views.draw_crop(rngs[-1], *label.shape, label))
        return crops, rngs

    def _normalise(self, image: Tensor) -> Tensor:
        normalised = (image - self.mean).div_(self.std)
        return normalised.contiguous(memory_format=torch.channels_last)

    def __getitem__(self, step: int) -> Batch:
        expected, ahead = self._next
        batch = ahead.result() if ahead and expected == step else self._make(step)
        working = self.prefetch and expected == step
        self._next = step + 1, self._maker.submit(self._make, step + 1) if working else None
        return batch

    def _make(self, step: int) -> Batch:
        entries = self._mine(self.labeled_at(step))
        images, labels = self._read(entries)
        crops, rngs = self._drawn(LABELED_VIEWS, entries, labels)
        plain = self.views.crop_images(images, crops, self.device)
        image, label = self._normalise(plain), self.views.crop_labels(labels, crops, self.device)
        image_strong = None
        if self.labeled_strong:
            shared = np.random.default_rng([self.seed, SHARED, step, len(self.families)])
            image_strong = self._strong(self.labeled_family, plain, image, rngs, shared)
        if not self.uses_unlabeled:
            valid = torch.ones_like(label[:0], dtype=torch.bool)
            return Batch(image, label, image[:0], (), valid, image_strong)
        entries = self._mine(self.unlabeled_at(step))
        images, labels = self._read(entries)
        crops, rngs = self._drawn(UNLABELED_VIEWS, entries, labels)
        first = self._crop(step, images, crops, rngs)
        weak_label = second = None
        if self.pseudo_labels:
            found = list(self._readers.map(lambda e: self.pseudo_labels[e[1]], entries))
            weak_label = self.views.crop_labels(found, crops, self.device)
        if self.second_crop:
            second = self._crop(step, images, *self._drawn(SECOND_VIEWS, entries, labels))
        return Batch(image, label, *first, image_strong, weak_label, second)

    def _crop(
        self,
        step: int,
        images: Sequence[Tensor],
        crops: list,
        rngs: list[np.random.Generator],
    ) -> Crop:
        """Weak and strong views of drawn crops of unlabeled images."""
        plain = self.views.crop_images(images, crops, self.device)
        weak = self._normalise(plain)
        strong = tuple(
            self._strong(
                family, plain, weak, rngs, np.random.default_rng([self.seed, SHARED, step, view])
            )
            for view, family in enumerate(self.families)
        )
        return Crop(weak, strong, self.views.valid(images, crops, self.device))

    def _strong(
        self,
        family: str,
        plain: Tensor,
        weak: Tensor,
        rngs: list[np.random.Generator],
        shared: np.random.Generator,
    ) -> Tensor:
        """A strong version of views in [0, 1], which normalised are `weak`."""
        if family == "noise":
            return add_noise(weak, self.views.noise, rngs)
        if family == "normalised":  # one draw for the step's images, whatever their share here
            return jitter_normalised(weak, shared)
        return self._normalise(self.views.strong(plain, rngs))
