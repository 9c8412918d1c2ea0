"""Pictures and tables of a survey chapter, computed by the methods' own code.

scene = survey.look(model, images)        # evaluation images, and what a network says of them
scene.draw({"image": scene.image, "says": scene.label} | survey.flaws(model.method, scene))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..build import network_of
from ..data.images import Images
from ..evaluate import evaluated
from ..flaws import dynamic_targets, flaw_map, flaw_target
from ..losses import IGNORE
from ..methods.cct import CCT, KINDS
from ..methods.gct import GCT
from ..nets import SegNet
from ..records import paired, summary
from ..trained import Trained
from . import pictures
from .analysis import Predictions, precision_coverage
from .published import columns, load
from .self_training import strong
from .standings import BASE, Standings, work
from .tables import CLOCK, Table

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Scene:
    """Annotated images, and what one network says of them. On the CPU, but `normal`."""

    image: Tensor  # (B, 3, H, W) uint8
    truth: Tensor  # (B, H, W) uint8, IGNORE = void
    normal: Tensor  # (B, 3, H, W), as networks take them
    strong: tuple[Tensor, Tensor]  # two strong views (B, 3, H, W), in [0, 255]
    label: Tensor  # (B, H, W)
    confidence: Tensor  # (B, H, W)
    net: SegNet
    classes: Sequence[str]
    colors: np.ndarray

    def draw(self, rows: Mapping[str, Tensor], height: float = 0.9, **about) -> Figure:
        """`pictures.grid` of images (B, 3, h, w) in [0, 255], class indices (B, h, w), and heat
        maps (B, h, w), floating or bool, in [0, 1]; also of lists of pictures."""
        drawn = {name: x if isinstance(x, list) else self._pictures(x) for name, x in rows.items()}
        look = {"classes": self.classes, "colors": self.colors, "height": height}
        return pictures.grid(drawn, **look, **about)

    def _pictures(self, x: Tensor) -> list[np.ndarray]:
        if x.ndim == 4:
            return pictures.as_pictures(x.float() / 255, self.colors)
        if x.is_floating_point() or x.dtype == torch.bool:
            return list(x.detach().float().cpu().numpy())
        return pictures.as_pictures(x, self.colors)

    def mistakes(self, label: Tensor, threshold: float, mix: Callable = lambda x: x) -> list:
        """`pictures.as_mistakes` of labels; `mix` is applied to truth and confidence."""
        given = zip(label, mix(self.truth), mix(self.confidence), strict=True)
        return [pictures.as_mistakes(*x, threshold) for x in given]


def look(model: Trained, images: Images, network: str = "", count: int = 6) -> Scene:
    """The first `count` images, cut to the size that all have, through a network of `model`.

    Two strong views of each are drawn as in the model's own training; always the same ones.
    """
    pairs = [images[i] for i in range(count)]
    h, w = (min(label.shape[side] for _, label in pairs) for side in (0, 1))
    image, truth = (
        torch.stack([x[..., :h, :w] for x in part]) for part in zip(*pairs, strict=True)
    )
    drawn = tuple(255 * strong(image.float() / 255, model.config, view) for view in (0, 1))
    confidence, label = model.probs(image, network).max(1)
    net = evaluated(model.method)[network] if network else network_of(model.method)
    said = model.normalise(image), drawn, label, confidence, net
    return Scene(image, truth, *said, images.classes, images.colors)


@torch.no_grad()
def disturbed(
    net: SegNet, scene: Scene, background: int | None = 0, count: int = 3
) -> tuple[Rows, list[str]]:
    """Rows of the first `count` images, a column per disturbance of CCT, and the columns' titles.

    Of the fused map: its mean size over channels, as a share of the largest one of the map as it
    is; and the labels that the network's own classifier reads from it. That one stands for the
    auxiliary ones, also where it is misled most. A title says how many pixels change their class.
    """
    one = CCT(lambda: net, **dict.fromkeys(KINDS, 1), background=background)
    for part in one.auxiliary:
        part.classifier.load_state_dict(net.classifier.state_dict())
        part.eval()
    fused, size = net.fuse(net.encode(scene.normal)), scene.truth.shape[-2:]
    logits, valid = net.classify(fused, size), scene.truth.to(fused.device) != IGNORE
    maps = [fused, *one.perturbed(fused, logits, valid)]
    largest = fused.abs().mean(1).amax((1, 2), keepdim=True)
    sizes = torch.stack([(x.abs().mean(1) / largest).clamp(max=1) for x in maps], 1)
    labels = torch.stack([net.classify(x, size).argmax(1) for x in maps], 1)
    rows = {}
    for i, both in enumerate(zip(sizes[:count], labels[:count], strict=True), 1):
        rows |= dict(zip((f"map {i}", f"labels {i}"), both, strict=True))
    shares = 100 * (labels != labels[:, :1]).float().mean((0, 2, 3))
    kinds = zip(("as it is", *one.kinds), shares, strict=True)
    return rows, [f"{kind}\n{share:.0f} %" for kind, share in kinds]


@torch.no_grad()
def flaws(method: GCT, scene: Scene) -> Rows:
    """What GCT's networks say, their flaws as known and as seen, and what comes of these."""
    image, truth = scene.normal, scene.truth.long().to(scene.normal.device)
    probs = [net(image).float().softmax(1) for net in method.students]
    seen = [flaw_map(method.flaws(image, p, truth != IGNORE)) for p in probs]
    rows = {}
    for i, p in enumerate(probs):
        rows[f"network {i + 1}"] = p.argmax(1)
        rows[f"flaws {i + 1}, known"] = flaw_target(p, truth)[:, 0]
        rows[f"flaws {i + 1}, seen"] = seen[i][:, 0]
    *_, bad = dynamic_targets(tuple(probs), tuple(seen), method.flaw_threshold)
    return rows | {"1 leads": (seen[0] < seen[1])[:, 0], "both bad": bad[:, 0]}


def disagreement(one: Tensor, other: Tensor, truth: Tensor) -> tuple[Rows, str]:
    """Rows of two label maps (B, H, W) and where they differ, and that in words."""
    valid, (a, b) = truth != IGNORE, [label == truth for label in (one, other)]
    differ, same = (one != other) & valid, (one == other) & ~a & valid
    rows = {"network 1": one, "network 2": other, "differ": differ}
    rows |= {"1 is right": differ & a, "2 is right": differ & b}
    shares = [100 * float(x.sum() / valid.sum()) for x in (differ, same)]
    return rows, "{:.0f} % of the pixels differ, {:.0f} % are a common mistake".format(*shares)


def kept(scene: Scene, thresholds: Sequence[float]) -> dict[str, Figure]:
    """{"threshold: what it keeps": strong views, the labels kept for them, and wrong ones}."""
    given, frames = Predictions(scene.label, scene.confidence, scene.truth), {}
    shares = zip(*precision_coverage(given, thresholds), strict=True)
    for threshold, (share, right) in zip(thresholds, shares, strict=True):
        keep = scene.confidence >= threshold
        rows = {"strong view": scene.strong[0], "learns": torch.where(keep, scene.label, IGNORE)}
        rows["mistakes"] = scene.mistakes(torch.where(keep, scene.label, scene.truth), 0.0)
        said = f"{threshold:g}: {100 * share:.0f} % kept"
        said += f", {100 * right:.0f} % of these right" if share else ""
        frames[said] = scene.draw(rows)
    return frames


def gains(stand: Standings, names: Sequence[str]) -> Table:
    """Points over supervised-only: in how many printed columns, from where to where there; ours."""
    printed = [c for c in columns(load()).values() if BASE in c]
    rows, base = [], stand.results[BASE]
    for name in names:
        theirs = sorted(float(c[name].value) - float(c[BASE].value) for c in printed if name in c)
        span = " to ".join(f"{x:+.1f}" for x in sorted({*theirs[:1], *theirs[-1:]}))
        found = stand.results[name]
        ours = paired(found.values(), base.values()) if found.keys() & base.keys() else ""
        rows.append([name, len(theirs) or "", span, ours])
    header = ["", "printed columns", "printed", "ours"]
    return Table(header, rows, "mIoU in points over supervised-only.")


def cost(stand: Standings, names: Sequence[str]) -> Table:
    """Passes of a step, counted, whether or not a run is recorded; images and seconds of a run."""
    rows = []
    for name in names:
        count = stand.passes(name)
        group = list(stand.results[name].values())
        spent = summary(r["seconds"] for r in group) if group else ""
        images = f"{group[0]['images_seen']:,}" if group else ""
        rows.append([name, *(f"{n:g}" for n in (*count, work(count))), images, spent])
    header = ["", "forward", "teaching", "backward", "work", "images seen", "seconds"]
    caption = "Encoder passes of a late step, a backward pass being twice the work; a run."
    return Table(header, rows, f"{caption} {CLOCK}")
