"""Every method by name: one file each, no registry."""

from __future__ import annotations

from ..method import Method
from .cutmix_seg import CutMixSeg
from .dual_teacher import DualTeacher
from .gps import GPS
from .gta_seg import GTASeg
from .mean_teacher import MeanTeacher
from .ps_mt import PSMT
from .pseudo_label import PseudoLabel
from .supervised import Supervised

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "pseudo_label": PseudoLabel,
    "mean_teacher": MeanTeacher,
    "cutmix_seg": CutMixSeg,
    "dual_teacher": DualTeacher,
    "gps": GPS,
    "gta_seg": GTASeg,
    "ps_mt": PSMT,
}
