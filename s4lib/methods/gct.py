"""GCT (Ke et al., ECCV 2020): two networks guided by a detector of each other's flaws.

A flaw detector sees an image and a prediction and learns, where there are labels, how wrong the
prediction is at each pixel. It then guides two networks that start differently. Dynamic
consistency: each takes over the other's probabilities where those are said to be less flawed. Flaw
correction: where both are bad, they must change until the detector sees no flaw.

`code` is the authors' ZHKKKe/PixelSSL@ce19203: a flawless map below 0 (see `flaw_map`), negative
flaws cut off for the detector's loss but not for its gradient, padding that counts. `torchsemiseg`
is TorchSemiSeg@5e0c29c: a ramp of 3 epochs, a detector that keeps its learning rate and sees what
the updated networks predict, labeled and unlabeled images apart. Deviation: the detector has the
run's optimizer; the papers' is Adam at 1e-4, whatever the networks have.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ..config import Count
from ..flaws import FlawDetector, dynamic_targets, flaw_map, flaw_target
from ..losses import IGNORE, mean_over, mse
from ..method import Method, joint
from ..schedules import gaussian


class GCT(Method):
    """Dynamic consistency and flaw correction for two networks."""

    dc_weight: float = 100.0  # of dynamic consistency after its ramp-up
    ramp_epochs: float = 5.0  # for how long it rises; 0 for none
    fc_weight: float = 1.0  # of flaw correction
    fd_weight: float = 10.0  # of the flaw detector's own loss
    flaw_threshold: float = 0.6  # flaw above which a pixel is bad (xi)
    mu: float = 0.5  # factor of the difference of a prediction to its label
    nu: Count = 1  # times that flaws are dilated and blurred
    detector_width: Count = 64  # channels of the detector's first convolution; the last has 8 times
    detector_size: Count = 64  # pixels a side that smaller images are enlarged to for it
    detector_lr: Literal["poly", "const"] = "poly"  # its learning rate falls, or stays
    updated: bool = False  # it learns from predictions of the networks just updated
    apart: bool = False  # labeled and unlabeled images pass through the networks in turn
    released: bool = False  # flawless maps below 0, negative flaws cut off, as the code does
    padding: bool = False  # padded and void pixels count too

    deployed = "students.0"
    presets = {"paper": {}, "code": {"released": True, "padding": True}}
    presets["torchsemiseg"] = presets["code"] | dict(ramp_epochs=3.0, detector_lr="const")
    presets["torchsemiseg"] |= dict(updated=True, apart=True)

    def setup(self, build):
        self.students = nn.ModuleList([build(), build()])
        with torch.no_grad():
            classes = self.students[0].eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        self.detector = FlawDetector(classes, self.detector_width, self.detector_size)

    def networks(self):  # the detector segments nothing
        return {name: net for name, net in super().networks().items() if name != "detector"}

    def schedule(self, child, clock):
        return clock.progress * (child != "detector" or self.detector_lr == "poly")

    def step(self, batch, clock, minimize):
        n, image = len(batch.image), torch.cat([batch.image, batch.weak])
        seen = torch.cat([batch.label != IGNORE, batch.valid]) | self.padding
        logits = [self.predict(net, batch) for net in self.students]
        probs = [x.float().softmax(1) for x in logits]
        flaws = [self.flaws(image, p, seen) for p in probs]
        # Guided learning of the networks, labeled and unlabeled images alike
        maps = [flaw_map(f.detach(), released=self.released) for f in flaws]
        plain = [p.detach() for p in probs]
        *targets, bad = dynamic_targets(plain, maps, self.flaw_threshold)
        sup = sum(self.criterion(x[:n], batch.label) for x in logits)
        dc = sum(mse(x, t, valid=seen) for x, t in zip(logits, targets, strict=True))
        fc = sum(mean_over(bad * f.square(), seen[:, None]) for f in flaws)
        x = clock.step / (self.ramp_epochs * clock.steps_per_epoch) if self.ramp_epochs else 1.0
        weight = self.dc_weight * gaussian(x)
        minimize(sup + weight * dc + self.fc_weight * fc, self.students)
        # Learning of the detector, from labels
        if self.updated:
            with torch.no_grad():
                plain = [self.predict(net, batch).float().softmax(1) for net in self.students]
        fd = 0
        for p in plain:
            flaw, truth = (
                self.flaws(image, p, seen)[:n],
                flaw_target(p[:n], batch.label, self.mu, self.nu),
            )
            if self.released:
                flaw = flaw + (flaw.clamp(min=0) - flaw).detach()
            fd = fd + mean_over((flaw - truth).square(), seen[:n, None]) / 2
        minimize(self.fd_weight * fd, self.detector)
        losses = {"sup": sup, "dc": dc, "fc": fc, "fd": fd, "bad": bad.float().mean()}
        return {name: value.detach() for name, value in losses.items()}

    def predict(self, net, batch):
        views = batch.image, batch.weak
        return torch.cat([net(x) for x in views] if self.apart else joint(net, *views))

    def flaws(self, image, probs, seen):
        """The detector's maps, which see nothing of what is not `seen`."""
        seen = seen[:, None]
        return self.detector(torch.where(seen, image, 0), torch.where(seen, probs, 0)).float()
