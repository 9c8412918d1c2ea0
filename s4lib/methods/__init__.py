"""Every method by name: one file each, no registry."""

from __future__ import annotations

from ..method import Method
from .ael import AEL
from .augseg import AugSeg
from .cct import CCT
from .classmix import ClassMix
from .cps import CPS
from .cutmix_mt import CutMixMT
from .cutmix_seg import CutMixSeg
from .dst import DST
from .dual_teacher import DualTeacher
from .entropy_min import EntropyMin
from .fixmatch import FixMatch
from .gct import GCT
from .gps import GPS
from .gta_seg import GTASeg
from .mean_teacher import MeanTeacher
from .n_cps import NCPS
from .pc2seg import PC2Seg
from .ps_mt import PSMT
from .pseudo_label import PseudoLabel
from .pseudoseg import PseudoSeg
from .st_plus_plus import STPlusPlus
from .supervised import Supervised
from .u2pl import U2PL
from .unimatch import UniMatch
from .unimatch_v2 import UniMatchV2

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "entropy_min": EntropyMin,
    "pseudo_label": PseudoLabel,
    "st_plus_plus": STPlusPlus,
    "mean_teacher": MeanTeacher,
    "cutmix_seg": CutMixSeg,
    "cutmix_mt": CutMixMT,
    "cct": CCT,
    "gct": GCT,
    "classmix": ClassMix,
    "fixmatch": FixMatch,
    "pseudoseg": PseudoSeg,
    "cps": CPS,
    "n_cps": NCPS,
    "dual_teacher": DualTeacher,
    "gps": GPS,
    "pc2seg": PC2Seg,
    "ael": AEL,
    "u2pl": U2PL,
    "dst": DST,
    "gta_seg": GTASeg,
    "ps_mt": PSMT,
    "unimatch": UniMatch,
    "augseg": AugSeg,
    "unimatch_v2": UniMatchV2,
}
