"""Checkpoints: writing one so that it is never half there, finding the newest, and making a model of it again.

A checkpoint is one .pt file of plain tensors, numbers and strings: model name, config, weights, optimizer state, phase, step,
data fingerprint, and the tokenizer as its JSON text, so that the file alone is enough to sample.

    model, tokenizer, checkpoint = load_model("out/flow")
"""

import dataclasses
import errno
from pathlib import Path

import torch
from tokenizers import Tokenizer

import publish
import snn_model
from model import PRESETS, Flow, FlowConfig
from prepare import WINDOWS
from scripts import InputError, whole_file
from snn_model import Pulse, PulseConfig

# What --model may be.
MODELS = {"flow": (Flow, FlowConfig, PRESETS), "pulse": (Pulse, PulseConfig, snn_model.PRESETS)}
PHASES = {n: (name, WINDOWS[n]) for n, name in enumerate(("language foundations", "reasoning and logic", "long context"), 1)}
DISTILLATION = 4  # the phase, in checkpoint and log, of what distill.py trains


def save_checkpoint(path: Path, checkpoint: dict):
    """Write a checkpoint so that `path` at any moment is the old one or the new one, never a part. Raises OSError."""
    with whole_file(path, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as problem:  # how torch's zip writer reports a write that failed
            raise OSError(errno.ENOSPC, f"cannot be written ({problem})".splitlines()[0], str(path)) from problem


def load_checkpoint(path: Path) -> dict:
    """The dict that save_checkpoint wrote, tensors on the CPU. Raises InputError for a file that is not one or is cut short."""
    if not path.exists():
        raise InputError(f"{path} does not exist: train a model with `python train.py`, or name another file")
    mapped = str(path).isascii()  # what torch maps it opens by the UTF-8 name, which is another file's or none's in another locale
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if {"model", "config", "weights", "tokenizer", "phase", "step"} <= checkpoint.keys():
            return checkpoint
    except Exception as problem:  # the zip reader and the restricted unpickler raise many types; each means the same to a user
        why = type(problem).__name__
        raise InputError(f"{path} is cut short or not a checkpoint ({why}): name another, or train again with --fresh") from problem
    raise InputError(f"{path} is not a checkpoint of this project: name another")


def load_weights(network, checkpoint: dict, path: Path):
    """Put a checkpoint's weights into a network of its sizes. Raises InputError when the network has others by now, or other settings."""
    shapes, theirs = ({n: w.shape for n, w in weights.items()} for weights in (network.state_dict(), checkpoint["weights"]))
    if shapes != theirs or vars(network.config).keys() != checkpoint["config"].keys():
        name = checkpoint["model"]
        raise InputError(f"{path} has the weights of another version of this {name}: train it again, or use that version")
    network.load_state_dict(checkpoint["weights"])


def find_checkpoint(ckpt: str | Path | None, model: str | None = None) -> Path:
    """The checkpoint that --ckpt means: a file, a Hugging Face folder, the latest of a run folder, or (None) of the newest run in out/.

    Validation-best copies are taken only when named. With `model`, runs of the other model are passed over.
    """
    if ckpt is not None and (Path(ckpt).is_file() or (Path(ckpt) / "config.json").is_file()):
        return Path(ckpt)
    # last.pt, an unfinished phase, is newer than all finished ones. File times cannot tell: a copied run has others.
    names = ["last.pt", *(f"phase{n}.pt" for n in sorted(PHASES, reverse=True))]
    folders = [Path(ckpt)] if ckpt is not None else Path("out").glob("*/")
    files = [file for folder in folders if (file := next((folder / n for n in names if (folder / n).exists()), None))]
    for file in sorted(files, key=lambda f: (f.stat().st_mtime_ns, f.name), reverse=True):
        if ckpt is not None or model is None or load_checkpoint(file)["model"] == model:
            return file
    where, kind, option = ckpt or "out/", f"{model} " if model else "", f" --model={model}" if model else ""
    raise InputError(f"{where} holds no {kind}checkpoint yet: make one with `python train.py{option}`, or name one")


def check_tokens(where, tokenizer: Tokenizer, *tokens: str):
    """Raise InputError when a tokenizer, of a model from elsewhere, lacks one of these special tokens."""
    if missing := [token for token in tokens if tokenizer.token_to_id(token) is None]:
        raise InputError(f"{where}: its tokenizer has no {missing[0]}, with which texts and turns begin and end: use a model that has it")


def load_model(path: str | Path, device="cpu", model: str | None = None):
    """(model in eval mode, Tokenizer, checkpoint) from a checkpoint file, a run folder (its latest, as find_checkpoint says) or a Hugging
    Face folder (of unknown phase: 0). Raises InputError, also when it holds another `model`.
    """
    path = find_checkpoint(path, model) if Path(path).is_dir() else Path(path)
    if path.is_dir():
        network, tokenizer = publish.read_folder(path)
        check_tokens(path, tokenizer, "<|endoftext|>")
        config, name = dataclasses.asdict(network.config), type(network).__name__.lower()
        imported = publish.read_json(path / "config.json").get("imported", True)
        checkpoint = {"model": name, "config": config, "tokenizer": tokenizer.to_str(), "phase": 0, "step": 0, "imported": imported}
    else:
        checkpoint = load_checkpoint(path)
        name = checkpoint["model"]
    if name not in MODELS or (model is not None and name != model):
        raise InputError(f"{path} holds a {name} model, not {model or ' or '.join(MODELS)}: leave --model out or name another --ckpt")
    if not path.is_dir():
        Model, Config, _ = MODELS[name]
        try:
            network, tokenizer = Model(Config(**checkpoint["config"])), Tokenizer.from_str(checkpoint["tokenizer"])
        except (TypeError, ValueError) as problem:
            raise InputError(f"{path} is of another version of this {name} ({problem}): train it again, or use that version") from problem
        load_weights(network, checkpoint, path)
    return network.to(device).eval(), tokenizer, checkpoint


def for_writing(model):
    """The model as it writes fastest: a Flow on an NVIDIA GPU in bf16. Pulse stays as it is: membranes and leaks need fp32."""
    return model.bfloat16() if isinstance(model, MODELS["flow"][0]) and next(model.parameters()).device.type == "cuda" else model
