"""Bits per byte of models on the validation text of a data folder: what train.py logs, of any checkpoint and of all of the text.

    python evaluate.py                                                  # newest run, each phase of data/builtin
    python evaluate.py --eval_tokens=65536 --phase=3                    # the windows that train.py took: the last val_bpb of its log
    python evaluate.py --ckpt out/flow/phase2_best.pt out/pulse --data=data/mybook --phase=1 --seq_len=512
    torchrun --nproc_per_node=2 evaluate.py --json=figures.jsonl        # each process reads its share of the windows

Windows do not see each other, so a longer one gives the model more to go by and fewer bits: compare models at one window. The end
of a shard, if shorter than a window, is not counted.
"""

import json
import math
from pathlib import Path

from tokenizers import Tokenizer

from checkpoint import MODELS, PHASES, find_checkpoint, load_model
from device import DTYPES, Device
from scripts import ArgumentParser, InputError, out_of_memory, run, whole_file
from shards import Windows, load_meta, load_tokenizer, token_bytes, tokenizer_fingerprint
from train import evaluate

BATCH_TOKENS = 2**13  # tokens at once unless --batch_size says otherwise: little memory, and on a CPU more are no faster


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", nargs="+", help="files, folders of runs or Hugging Face folders (default: the newest run in out/)")
    parser.add_argument("--model", choices=MODELS, help="with no --ckpt: the newest run of this network")
    parser.add_argument("--data", type=Path, default=Path("data/builtin"), help="folder made by prepare.py (default: data/builtin)")
    parser.add_argument("--phase", type=int, choices=PHASES, help="its validation text (default: of each phase that the data has)")
    parser.add_argument("--seq_len", type=int, help="window in tokens (default: the phase's, 256, 1024 or 2048)")
    parser.add_argument("--eval_tokens", type=int, help="tokens per phase, at most, spread over the text (default: all)")
    parser.add_argument("--batch_size", type=int, help=f"windows per process and step (default: {BATCH_TOKENS:,} tokens)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file, a JSON object per line")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="of matrix products (default: bf16 where the device multiplies it fast)")
    args = parser.parse_args(argv)
    for name in ("seq_len", "eval_tokens", "batch_size"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < 2**31:
            raise InputError(f"--{name}={getattr(args, name)} must be positive and below 2**31")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):  # found out now, not after the last figure
        raise InputError(f"--json={args.json} cannot be written: name a file in a folder that exists")
    return args


def open_data(args) -> tuple[Tokenizer, dict[int, Windows]]:
    """(tokenizer of --data, windows of the validation text by phase)"""
    meta = load_meta(args.data)
    tokenizer_json, tokenizer = load_tokenizer(args.data)
    there = [n for n in PHASES if "val" in meta["phases"].get(str(n), {})] or PHASES  # with none, the first is missed
    of_tokenizer = meta["vocab_size"], tokenizer_fingerprint(tokenizer_json)
    phases = [args.phase] if args.phase else there
    return tokenizer, {n: Windows(args.data, n, "val", args.seq_len or PHASES[n][1], *of_tokenizer) for n in phases}


def open_model(path: Path, args, tokenizer: Tokenizer, windows: dict[int, Windows], device: Device):
    """The model of a checkpoint. Raises InputError when it cannot read these windows."""
    model, own, _ = load_model(path, device.torch, args.model)
    if own.to_str() != tokenizer.to_str():
        remedy = "name the --data it was trained on, or make these again with prepare.py --tokenizer"
        raise InputError(f"{path} was trained with another tokenizer than that of {args.data}: {remedy}")
    if (size := model.config.vocab_size) < own.get_vocab_size():
        raise InputError(f"{path}: its tokenizer has {own.get_vocab_size():,} tokens, the model {size:,}: they do not belong together")
    limit = getattr(model.config, "max_seq_len", math.inf)  # a Pulse reads any number
    for phase, data in windows.items():
        if data.seq_len > limit:
            why = f"phase {phase} has windows of {data.seq_len:,} tokens, {path} reads {limit:,}"
            raise InputError(f"{why}: give --seq_len={limit} or less")
    return model


def table(args, device: Device):
    tokenizer, windows = open_data(args)
    paths = [find_checkpoint(ckpt, args.model) for ckpt in args.ckpt or [None]]
    for path in paths[1:]:  # loaded once before the first figure: a wrong one is found out at once, and memory holds one model
        open_model(path, args, tokenizer, windows, device)
    device.say(f"{args.data}, validation text, on {device}")
    width = max(len(str(path)) for path in [*paths, "checkpoint"])
    device.say(f"{'checkpoint':{width}}  phase  window      tokens  nats per token  bits per byte")
    lines = []
    for path in paths:
        model = open_model(path, args, tokenizer, windows, device)
        for phase, data in windows.items():
            seq_len, eval_tokens = data.seq_len, args.eval_tokens or data.n_windows * data.seq_len
            batch_size = args.batch_size or max(1, BATCH_TOKENS // seq_len)
            nats, bits = evaluate(model, data, token_bytes(tokenizer), eval_tokens, batch_size, device)
            n_tokens = max(1, min(data.n_windows, eval_tokens // seq_len)) * seq_len  # as evaluate() counts windows
            device.say(f"{path!s:{width}}  {phase:>5}  {seq_len:>6,}  {n_tokens:>10,}  {nats:>14.4f}  {bits:>13.4f}", flush=True)
            line = {"checkpoint": str(path), "data": str(args.data), "phase": phase, "seq_len": seq_len, "eval_tokens": n_tokens}
            lines.append(line | {"val_loss": nats, "val_bpb": bits})
    if args.json and device.rank == 0:
        with whole_file(args.json) as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def main(argv=None):
    args = parse_args(argv)
    try:
        with Device(args.device, args.dtype) as device:
            table(args, device)
    except (RuntimeError, MemoryError) as problem:
        if out_of_memory(problem):
            raise InputError("the model or a batch of it does not fit into the memory: lower --batch_size or --seq_len") from problem
        raise


if __name__ == "__main__":
    run(main)
