"""Turn a trained model into what other software runs: Core ML packages for Apple devices, or a Hugging Face folder.

    python convert.py                                   # the newest run, fp16 for the Neural Engine, to out/<run>-coreml
    python convert.py --ckpt=out/pulse --compress=int8
    python convert.py --target=gpu --compress=int4
    python convert.py --to=hf --push=user/name          # a Hugging Face folder, published

A package (iOS 18, macOS 15 and later) has two functions that share their weights and their states: `prefill` reads a prompt in
chunks of fixed size, `decode` one token. No package is left behind that has not been read back from disk and run by
mil_numpy.py against PyTorch (coreml_verify.py); report.json says what was measured. A Mac is not needed, and none was used.
"""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import publish
from checkpoint import MODELS, check_tokens, find_checkpoint, load_model
from coreml_models import MAX_DIM, PREFILL, FlowOnDevice, PulseOnDevice, ranges
from huggingface import read_json
from scripts import ArgumentParser, InputError, lock_folder, run

HERE = Path(__file__).resolve().parent
# --compress: what coremltools is told. Only the matrices of conv and linear are compressed, so norms, gains, betas and
# biases stay as they are; RoPE's angles and the rows of the embedding are inputs.
COMPRESSIONS = {
    "none": None,
    "int8": {"dtype": "int8", "granularity": "per_channel"},
    "palette6": {"nbits": 6},
    "palette4": {"nbits": 4},
    "int4": {"dtype": "int4", "granularity": "per_block", "block_size": 32},  # the recipe of Apple's on-device Llama 3.1
}
MIN_CONTEXT = 128  # a prompt of a chunk and the 64 tokens that verification generates have to fit
# What the folders hold, and what --overwrite may therefore delete; macOS adds the last by itself.
OURS = re.compile(
    r"(Flow|Pulse)(-\d+of\d+)?\.mlpackage|embeddings\.bin|example\.swift|predict\.py|report\.json"
    r"|(config|generation_config|tokenizer|tokenizer_config)\.json|model\.safetensors|README\.md|\.DS_Store"
)
DESCRIPTIONS = {
    "x": "rows of embeddings.bin for the tokens, or `hidden` of the package before",
    "token": "rows of embeddings.bin for the tokens, once more",
    "cos": "cosines of RoPE's angles at the positions of the tokens",
    "sin": "sines of RoPE's angles at the positions of the tokens",
    "mask_window": "0 where a query may look in a sliding layer, -10000 elsewhere; the cache ends with the newest token",
    "mask_full": "0 where a query may look in a global layer, -10000 elsewhere; token p lies at place p",
    "position": "the position of the first token, counted from 0",
    "hidden": "`x` of the next package",
    "logits": "logits of the last token; several parts are to be joined in their order",
    "cache": "what the layers remember, zero before the first token",
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", help="a checkpoint file or the folder of a run (default: the newest in out/)")
    parser.add_argument("--model", choices=MODELS, help="take the newest run of this model")
    parser.add_argument("--to", choices=("coreml", "hf"), default="coreml", help="Core ML packages or a Hugging Face folder")
    parser.add_argument("--target", choices=("ane", "gpu"), default="ane", help="built for the Neural Engine (default) or the GPU")
    parser.add_argument("--compress", choices=COMPRESSIONS, default="none", help="how the matrices are stored (default: none, fp16)")
    parser.add_argument("--group_size", type=int, help="with palette4 or palette6: output channels that share a palette (default: all)")
    parser.add_argument("--context", type=int, help="tokens that Flow's packages can hold (default: the model's max_seq_len)")
    parser.add_argument("--chunks", type=int, default=1, help="packages to split the layers into (default: 1)")
    parser.add_argument("--no_state", action="store_true", help="caches as inputs and outputs, for devices that refuse states")
    parser.add_argument("--data", type=Path, help="prepared data whose validation text verifies (default: data/builtin)")
    parser.add_argument("--out", type=Path, help="folder to write (default: beside the run, named after it)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--push", metavar="USER/NAME", help="with --to=hf: publish the folder on the Hugging Face Hub")
    args = parser.parse_args(argv)
    coreml_only = ("target", "compress", "group_size", "context", "chunks", "no_state", "data")
    if args.to == "hf" and (given := [name for name in coreml_only if getattr(args, name) != parser.get_default(name)]):
        raise InputError(f"--{given[0]}={getattr(args, given[0])} is for Core ML packages: leave it out, or --to=hf")
    if args.push and args.to != "hf":
        raise InputError("--push publishes Hugging Face folders: add --to=hf")
    if args.group_size is not None and (not args.compress.startswith("palette") or args.group_size < 1):
        raise InputError(f"--group_size={args.group_size} needs --compress=palette4 or palette6 and at least 1 channel")
    if args.compress == "int4" and args.target == "ane":
        raise InputError("--compress=int4 has a scale per block, which the Neural Engine does not take: use palette4, or --target=gpu")
    return args


# ---- Core ML ----


class Stateful(nn.Module):
    """A network whose caches are buffers, which Core ML keeps as states."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        for i, shape in enumerate(net.cache_shapes()):
            self.register_buffer(f"cache_{i}", torch.zeros(shape))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        caches = list(self.buffers())
        outputs, after = self.net(*inputs, *caches)
        for cache, new in zip(caches, after):
            if new is not cache:  # a global layer has written into it already
                cache[:] = new  # slice assignment: a plain index here is dropped in conversion, without a word
        return tuple(outputs)


class Stateless(nn.Module):
    """A network whose caches come in and go out."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        n = len(self.net.cache_shapes())
        outputs, after = self.net(*args[:-n], *(cache.clone() for cache in args[-n:]))
        return (*outputs, *after)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without coremltools' progress bars, its warnings on versions, and numpy's on constants that fp16 rounds to infinity."""
    logging.getLogger("coremltools").setLevel(logging.CRITICAL)
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def temporary_files(folder: Path) -> Iterator[None]:
    """What coremltools writes by the way goes here: to the disk that was found large enough, and away with the folder."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def output_names(net) -> list[str]:
    return [f"logits_{i}" for i in range(len(net.head))] if hasattr(net, "head") else ["hidden"]


def convert_function(net: nn.Module, stateful: bool, target: str):
    """A Core ML model with one function from a network of coreml_models.py."""
    import coremltools as ct

    shapes, caches = net.input_shapes(), net.cache_shapes()
    wrapper = (Stateful if stateful else Stateless)(net).eval()
    kinds = {name: torch.int32 if name == "position" else torch.float32 for name in shapes}
    if not stateful:
        shapes = shapes | {f"cache_{i}": shape for i, shape in enumerate(caches)}
    example = tuple(torch.zeros(shape, dtype=kinds.get(name, torch.float32)) for name, shape in shapes.items())
    traced = torch.jit.trace(wrapper, example, check_trace=False)  # checking would run it again, on states that have changed
    outputs = output_names(net) + ([] if stateful else [f"cache_{i}_new" for i in range(len(caches))])
    states = [ct.StateType(ct.TensorType(shape=s, dtype=np.float16), name=f"cache_{i}") for i, s in enumerate(caches)]
    return ct.convert(
        traced,
        inputs=[ct.TensorType(n, s, dtype=np.int32 if n == "position" else np.float16) for n, s in shapes.items()],
        outputs=[ct.TensorType(name, dtype=np.float16) for name in outputs],
        states=states if stateful else None,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        compute_units=ct.ComputeUnit.CPU_AND_NE if target == "ane" else ct.ComputeUnit.CPU_AND_GPU,
        skip_model_load=True,
    )


def palette(weight: np.ndarray, nbits: int) -> tuple[np.ndarray, np.ndarray]:
    """(palette [2**nbits], uint8 index of each weight) by k-means in one dimension: Lloyd's algorithm (1982) on sorted weights.

    Centres lie thickest where the cube root of the density is high, so they start at quantiles spread by sqrt(3), which is right for
    a Gaussian. coremltools' own k-means needs scikit-learn and minutes for a large matrix.
    """
    values = np.sort(weight.ravel()).astype(np.float64)
    sums, n = np.concatenate([[0.0], values.cumsum()]), 1 << nbits
    centres = np.quantile(values, (np.arange(n) + 0.5) / n)
    centres = np.clip(values.mean() + 3**0.5 * (centres - values.mean()), values[0], values[-1])
    edges = None
    for _ in range(100):
        before, edges = edges, np.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        if before is not None and np.array_equal(before, edges):
            break
        ends = np.concatenate([[0], edges, [len(values)]])
        counts = np.diff(ends)
        centres = np.where(counts, np.diff(sums[ends]) / np.maximum(counts, 1), centres)
    indices = np.searchsorted((centres[1:] + centres[:-1]) / 2, weight.ravel())
    return centres.astype(weight.dtype), indices.astype(np.uint8)


def compress(mlmodel, kind: str, group_size: int | None):
    """The model with its matrices compressed; which ones could not be is seen in the package."""
    import coremltools.optimize.coreml as cto

    options = COMPRESSIONS[kind]
    if options is None:
        return mlmodel
    if "nbits" in options:
        grouped = {"granularity": "per_grouped_channel", "group_size": group_size} if group_size else {"granularity": "per_tensor"}
        op = cto.OpPalettizerConfig(mode="custom", lut_function=lambda weight: palette(weight, options["nbits"]), **grouped)
        function = cto.palettize_weights
    else:
        op = cto.OpLinearQuantizerConfig(mode="linear_symmetric", **options)
        function = cto.linear_quantize_weights
    return function(mlmodel, cto.OptimizationConfig(global_config=None, op_type_configs={"conv": op, "linear": op}))


def write_package(path: Path, make, args, work: Path) -> dict:
    """One .mlpackage with the functions prefill and decode; `make(Q)` gives the network for Q tokens.

    Each function is compressed before they are merged: a package of several functions cannot be. Equal weights are then stored once.
    Returns the package's part of the contract.
    """
    from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

    description, shapes = MultiFunctionDescriptor(), {}
    for name, Q in (("decode", 1), ("prefill", PREFILL[args.kind])):
        net, single = make(Q), work / f"{name}.mlpackage"
        with quiet(), temporary_files(work):
            compress(convert_function(net, not args.no_state, args.target), args.compress, args.group_size).save(str(single))
        description.add_function(str(single), "main", name)
        shapes[name] = net.input_shapes()
    description.default_function_name = "decode"
    with quiet(), temporary_files(work):
        save_multifunction(description, str(path))
    for name in shapes:
        shutil.rmtree(work / f"{name}.mlpackage")
    caches = {f"cache_{i}": shape for i, shape in enumerate(net.cache_shapes())}
    return {"file": path.name, "layers": [net.first, net.last], "functions": shapes, "caches": caches, "logits": output_names(net)}


def add_metadata(path: Path, contract: dict, tokenizer_json: str) -> None:
    """Into the saved package what Xcode shows and what a program needs that has only this file."""
    from coremltools.proto import Model_pb2

    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    meta = spec.description.metadata
    meta.shortDescription = (
        f"{contract['kind'].capitalize()}, a small language model with {contract['parameters']:,} parameters, for one sequence. "
        f"prefill reads {contract['prefill']} tokens, decode one; both go on from the same states."
    )
    meta.versionString = contract["version"]
    if "license" in contract:
        meta.author, meta.license = "SLMS", contract["license"]
    meta.userDefined["contract"], meta.userDefined["tokenizer"] = json.dumps(contract), tokenizer_json
    for function in spec.description.functions:
        for feature in [*function.input, *function.output, *function.state]:
            feature.shortDescription = DESCRIPTIONS.get(feature.name) or DESCRIPTIONS[feature.name.split("_")[0]]
    file.write_bytes(spec.SerializeToString())


def check_sizes(args, model) -> int | None:
    """The context. Raises InputError for sizes that the device or the model cannot have."""
    config = model.config
    if not 1 <= args.chunks <= config.n_layer:
        raise InputError(f"--chunks={args.chunks} must be between 1 and the model's {config.n_layer} layers")
    if args.group_size and all(p.size(0) % args.group_size for p in model.parameters() if p.ndim == 2):
        raise InputError(f"--group_size={args.group_size} divides the rows of no matrix: choose a divisor of {config.d_model}")
    if args.kind == "pulse":
        if args.context is not None:
            raise InputError(f"--context={args.context} is for Flow: Pulse reads any number of tokens with the same state")
        return None
    if config.max_seq_len < MIN_CONTEXT:
        raise InputError(f"the model's max_seq_len is {config.max_seq_len}: {MIN_CONTEXT} is the least that can be verified, use --to=hf")
    context = config.max_seq_len if args.context is None else args.context
    limit = min(MAX_DIM, config.max_seq_len)
    if not MIN_CONTEXT <= context <= limit:
        why = "the Neural Engine's largest dimension" if limit == MAX_DIM else "what the model was made for"
        raise InputError(f"--context={context} must be between {MIN_CONTEXT} and {limit:,}, {why}")
    return context


def to_coreml(args, model, tokenizer, checkpoint, folder: Path) -> None:
    """Write, read back and verify the packages of a model and what belongs beside them."""
    with quiet():
        import coreml_verify  # brings coremltools, which needs seconds and on Linux complains of what is missing

    context, Device = check_sizes(args, model), FlowOnDevice if args.kind == "flow" else PulseOnDevice
    need = 6 * model.config.num_params()  # two functions in fp16 before they are merged, and the result
    if shutil.disk_usage(folder).free < need:
        raise InputError(f"{folder.parent} has less than the {need / 1e6:,.0f} MB free that conversion needs: free some or write elsewhere")
    text = coreml_verify.validation_text(args.data, checkpoint, model, tokenizer)
    start, work, packages, nets = time.perf_counter(), folder / "work", [], []
    work.mkdir()
    for number, (first, last) in enumerate(ranges(model.config.n_layer, args.chunks), 1):
        def make(Q, first=first, last=last, model=model):
            return Device(model, args.target, Q, context, first, last).eval()

        name = args.kind.capitalize() + (f"-{number}of{args.chunks}" if args.chunks > 1 else "")
        packages.append(write_package(folder / f"{name}.mlpackage", make, args, work))
        nets.append(make)
    shutil.rmtree(work)
    contract = {
        "made_by": "SLMS", "kind": args.kind, "version": "1", "parameters": model.config.num_params(), "model": asdict(model.config),
        "target": args.target, "compress": args.compress, "stateful": not args.no_state, "context": context,
        "prefill": PREFILL[args.kind], "embeddings": [model.config.vocab_size, model.config.d_model],
        "stop_ids": [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>")], "packages": packages,
    }  # fmt: skip
    if not publish.is_imported(checkpoint):
        contract["license"] = "MIT"
    for package in packages:
        add_metadata(folder / package["file"], contract, checkpoint["tokenizer"])
    table = model.input_table() if args.kind == "pulse" else model.token_embedding.weight
    table.detach().half().numpy().tofile(folder / "embeddings.bin")
    (folder / "tokenizer.json").write_text(checkpoint["tokenizer"], encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(contract, indent=1), encoding="utf-8")
    shutil.copy(HERE / "predict.py", folder)
    shutil.copy(HERE / "docs" / "example.swift", folder)
    print(f"converted in {time.perf_counter() - start:.0f} s, verifying", file=sys.stderr)
    report = coreml_verify.verify(folder, contract, model, nets, text, checkpoint["tokenizer"])
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


# ---- the main job ----


def refuse_foreign(out: Path) -> None:
    """Raises InputError for a folder that is not, file by file, what this script writes: --overwrite deletes it."""
    try:
        config = read_json(out / "config.json")
    except (OSError, ValueError):
        config = {}
    # transformers copies fields it does not know when it saves a model that it has trained further, and adds its version.
    if config.get("made_by") != "SLMS" or "transformers_version" in config:
        raise InputError(f"{out} was not made by convert.py (its config.json does not say so): choose another --out or remove it yourself")
    foreign = [p.name for p in sorted(out.iterdir()) if not OURS.fullmatch(p.name) or p.is_dir() != (p.suffix == ".mlpackage")]
    if foreign:
        raise InputError(f"{out} holds {foreign[0]}, which was not made by convert.py: choose another --out or move it away")


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `out` to build in, which becomes `out` if all goes well; if not, `out` stays what it was."""
    given, out = out, out.resolve()  # behind a link, and with a name even if it is "."
    new, old = (out.parent / f".{out.name}.{kind}" for kind in ("partial", "old"))

    def tidy():
        if old.exists() and not out.exists():  # stopped between the two renames below
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)

    if new.exists():
        os.close(lock_folder(new, given))  # another run may be building in it
    tidy()  # what a killed run left
    if out.exists() and not overwrite:
        raise InputError(f"{given} exists: add --overwrite to replace it, or choose another --out")
    if out.exists():
        refuse_foreign(given)
    out.parent.mkdir(parents=True, exist_ok=True)
    new.mkdir()
    lock = lock_folder(new, given)
    try:
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
    except (OSError, RuntimeError) as error:  # a RuntimeError is how coremltools' C++ reports a write that failed
        if shutil.disk_usage(out.parent).free < 1e6:
            raise InputError(f"{out.parent} is full: free some space or choose another --out") from error
        raise
    finally:
        tidy()
        os.close(lock)


def main(argv=None):
    args = parse_args(argv)
    path = find_checkpoint(args.ckpt, args.model)
    model, tokenizer, checkpoint = load_model(path, model=args.model)
    check_tokens(path, tokenizer, "<|im_start|>", "<|im_end|>")
    args.kind = checkpoint["model"]
    print(f"{path}: {args.kind}, {model.config.num_params():,} parameters, phase {checkpoint['phase']}", file=sys.stderr)
    home = path if path.is_dir() else path.parent
    home = home.resolve() if home.name in ("", "..") else home
    out = args.out or home.with_name(f"{home.name}-{args.to}")
    place = out.resolve()  # if it is the folder one stands in, "." will be gone
    if place == home.resolve():
        raise InputError(f"--out={out} is where --ckpt lies: choose another folder")
    with new_folder(out, args.overwrite) as folder:
        if args.to == "hf":
            publish.write_folder(folder, model, checkpoint, home)
        else:
            to_coreml(args, model, tokenizer, checkpoint, folder)
    print(f"wrote {out}")
    if args.push:
        publish.push(place, args.push)


if __name__ == "__main__":
    run(main)
