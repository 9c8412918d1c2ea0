"""Weight files: read without running code in them, and fitted to an encoder without guessing."""

from __future__ import annotations

import zipfile
from pathlib import Path

import timm
import torch
from torch import Tensor, nn


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file, on the CPU; code inside a pickle is never run.

    Raises:
        ValueError: missing, truncated, or holding anything but tensors and plain values.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable tensor file ({first_line(error)})") from error
    except Exception as error:  # safetensors and pickle raise types of their own
        raise ValueError(
            f"{path}: refused, corrupt or not made of plain tensors ({first_line(error)})"
        ) from error


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__


def load_encoder(net: nn.Module, path: Path) -> None:
    """Initialise the encoder from the state dict of a classifier or encoder, as timm names it or as
    the papers' code does: the deep-stem ResNets of U2PL, UniMatch and TorchSemiSeg ("v1c"),
    MMSegmentation's with its `stem`, Meta's DINOv2; with `module.` or `backbone.` before all names.

    Strict: every tensor that reaches an output must be there in its shape, and nothing may be left
    over but what only the classifier has. (BN's step counters, and blocks behind the last feature
    used, are not needed.)

    Raises:
        ValueError: the file belongs to another architecture; names the first keys.
    """
    given = _without_wrapping(read_tensors(path))
    wanted = net.encoder.state_dict()
    if not isinstance(given, dict) or not all(isinstance(v, Tensor) for v in given.values()):
        raise ValueError(f"{path}: not a state dict (names with tensors)")
    name, arguments = net.source
    with torch.device("meta"):
        whole = timm.create_model(name, **arguments).state_dict()
    unneeded = {*whole, *(k.replace(".", "_", 1) for k in whole), "mask_token"}
    given = {_encoder_name(k, wanted): v for k, v in given.items()}
    given = {k: v for k, v in given.items() if k in wanted or k not in unneeded}
    unused = _unused_parameters(net)
    optional = lambda k: k.endswith("num_batches_tracked") or k.rsplit(".", 1)[0] in unused  # noqa: E731
    missing = [k for k in wanted if k not in given and not optional(k)]
    extra = [k for k in given if k not in wanted]
    shapes = [k for k in given if k in wanted and given[k].shape != wanted[k].shape]
    for what, keys in (
        ("lacks", missing),
        ("has no place for", extra),
        ("has other shapes for", shapes),
    ):
        if keys:
            more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
            verb = (
                "the encoder has no place for" if what.startswith("has no") else f"the file {what}"
            )
            raise ValueError(
                f"{path}: weights of another architecture: {verb} {', '.join(keys[:2])}{more}; "
                f"expected timm {net.encoder.__class__.__name__} with {len(wanted)} tensors"
            )
    net.encoder.load_state_dict({**wanted, **given})


def _without_wrapping(given: object) -> object:
    """What training code saves around a state dict, and before each name in it, removed."""
    for key in ("state_dict", "model"):
        if isinstance(given, dict) and isinstance(given.get(key), dict):
            given = given[key]
    for prefix in ("module.", "backbone."):
        if isinstance(given, dict) and all(str(k).startswith(prefix) for k in given):
            given = {k.removeprefix(prefix): v for k, v in given.items()}
    return given


def _encoder_name(key: str, wanted: dict[str, Tensor]) -> str:
    """The name that the encoder has for a published tensor; the same if it has none."""
    names = (
        key,
        key.replace(".", "_", 1),  # timm's feature extractors call a classifier's `stages.0` so
        f"vit.{key}",
        key.replace("stem.7.", "bn1.").replace("stem.", "conv1."),  # MMSegmentation's deep stem
    )
    return next((name for name in names if name in wanted), key)


def _unused_parameters(net: nn.Module) -> set[str]:
    """Names of the encoder's modules whose parameters reach no output."""
    training = net.encoder.training
    net.encoder.eval()
    with torch.enable_grad():
        sum(f.sum() for f in net.encode(torch.zeros(1, 3, 64, 64))).backward()
    unused = {n.rsplit(".", 1)[0] for n, p in net.encoder.named_parameters() if p.grad is None}
    net.encoder.zero_grad(set_to_none=True)
    net.encoder.train(training)
    return unused
