"""How fast a core prepares training images, where time goes, and a released pipeline beside it."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jsonargparse
import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from .. import records
from ..config import Config
from ..data import open_dataset
from ..data.families import build_views
from ..speed import keep_freed_memory
from .commands import write

MEAN = (0.485, 0.456, 0.406)  # of padding; normalisation costs the same with any


@dataclass(frozen=True)
class DataTimes:
    """CPU seconds of each part, for `images` images of `height` x `width` on average.

    Decoding is without the cache that keeps read images; the weak view is the crop with its label,
    resized and normalised; the strong views are further versions of that crop. `released` are the
    seconds of UniMatch's released pipeline for the same images, decoding included; None for views
    of another family.
    """

    images: int
    height: float
    width: float
    decode: float
    weak: float
    strong: float
    released: float | None

    @property
    def seconds(self) -> float:
        return self.decode + self.weak + self.strong


def main(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> int:
    """`s4 bench data`. Raises ValueError for bad input."""
    for name in ("dataset", "data_root", "augment", "outside"):
        parser.add_argument(f"--{name}", default=getattr(Config, name))
    for name, kind in (("size", int), ("crop", int), ("scale", float)):
        parser.add_argument(f"--{name}", type=kind, nargs=2, default=list(getattr(Config, name)))
    for name in ("batch", "resize_base"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Config, name))
    parser.add_argument("--strong_views", type=int, default=1)
    parser.add_argument("--images", type=int, default=64, help="how many are prepared")
    parser.add_argument("--out", default="", help="JSON file to write")
    options = parser.parse_args(arguments).as_dict()
    _, count, views, out = (options.pop(k) for k in ("what", "images", "strong_views", "out"))
    config = Config.from_dict(options)
    times = bench_data(config, count, views)
    high, wide = config.crop or (round(times.height), round(times.width))
    print(
        f"{config.dataset}, {times.height:.0f} x {times.width:.0f} pixels, to {config.augment} "
        f"views of {high} x {wide}, {views} strong: {count / times.seconds:.1f} images/s per core"
    )
    parts = {"decode": times.decode, "resize and crop": times.weak, "colour": times.strong}
    for name, seconds in parts.items():
        print(f"{name:16}{100 * seconds / times.seconds:4.0f} %{1e3 * seconds / count:9.2f} ms")
    print(f"decoding alone, as where a GPU makes the views: {count / times.decode:.1f} images/s")
    if released := times.released:
        made = times.seconds, times.weak + times.strong, times.decode
        print(
            "the released pipeline: {:.1f} images/s; ours {:.1f} times that, {:.1f} times with "
            "decoded images in memory, {:.1f} times where it only decodes".format(
                count / released, *(released / seconds for seconds in made)
            )
        )
    if out:
        what = {"dataset": config.dataset, "augment": config.augment, "strong_views": views}
        row = {**what, "crop": [high, wide], **asdict(times)}
        where = {**records.surroundings(torch.device("cpu")), "device": "CPU, 1 thread(s)"}
        write(Path(out), {"kind": "data", "rows": [row], **where})
    return 0


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
    keep_freed_memory()
    released = 0.0 if config.augment == "unimatch" else None
    try:
        _batch(dataset, views, range(min(count, config.batch)), strong_views)  # first calls: slow
        times, sizes = np.zeros(3), []
        for first in range(0, count, config.batch):
            indices = range(first, min(first + config.batch, count))
            spent, seen = _batch(dataset, views, indices, strong_views)
            times, sizes = times + spent, sizes + seen
            if released is not None:  # in turn, so that both meet the same machine
                began = time.process_time()
                for index in indices:
                    _released_unimatch(dataset, index % len(dataset), views.crop, strong_views)
                released += time.process_time() - began
    finally:
        torch.set_num_threads(threads)
    return DataTimes(count, *np.mean(sizes, 0).tolist(), *times.tolist(), released)


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
    return (image - mean).div_(mean).contiguous(memory_format=torch.channels_last)


def _released_unimatch(dataset, index: int, crop: tuple[int, int], strong_views: int) -> list:
    """[weak, strong ..., annotation] as UniMatch@0324f3dd makes them of one image with PIL and
    torchvision (dataset/semi.py, dataset/transform.py): zoom, padding, crop, flip; per strong view
    jitter, greyscale and blur; CutMix boxes left out, as they are of ours.
    """
    image, label = map(Image.fromarray, dataset.read(index))
    long = max(image.size)
    side = random.randint(int(0.5 * long), int(2 * long))
    size = [max(1, round(s * side / long)) for s in image.size]
    image, label = image.resize(size, Image.BILINEAR), label.resize(size, Image.NEAREST)
    border = (0, 0, *(max(0, c - s) for c, s in zip(crop[::-1], size, strict=True)))
    image, label = ImageOps.expand(image, border), ImageOps.expand(label, border, fill=255)
    left, top = (random.randint(0, s - c) for s, c in zip(image.size, crop[::-1], strict=True))
    box = (left, top, left + crop[1], top + crop[0])
    image, label = image.crop(box), label.crop(box)
    if random.random() < 0.5:
        image, label = ImageOps.mirror(image), ImageOps.mirror(label)
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, MEAN)])
    views = [image]
    for _ in range(strong_views):
        view = image
        if random.random() < 0.8:
            view = transforms.ColorJitter(0.5, 0.5, 0.5, 0.25)(view)
        view = transforms.RandomGrayscale(0.2)(view)
        if random.random() < 0.5:
            view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))
        views.append(view)
    return [*map(normalise, views), torch.from_numpy(np.array(label)).long()]
