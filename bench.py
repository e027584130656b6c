"""The figures of the README's "How fast", each a ratio against a peer or a physical limit, measured in the same run where it can be.

    python bench.py                                          # all rows that can run here: for a quiet hour or so
    python bench.py decoding startup --repeats=9             # some of them
    python bench.py flow_to_bpb muon_training --text=tinyshakespeare.txt --json=bench.json

What is compared takes turns, --repeats times after one turn that does not count, so that whatever disturbs the machine disturbs
both; medians are shown, and as spread the range of this side's times over their median. A row ends in a ratio and, where there is
one, the goal and whether it is met. All rows but the gpu_ ones run on the CPU. Close everything else before.
"""

import dataclasses
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

import corpus
import peers
import prepare
import snn_model
import train
from bench_gpu import gpu_attention, gpu_decoding, gpu_memory, gpu_pulse, gpu_training
from checkpoint import save_checkpoint
from curves import read_log
from decode import Decoder
from measure import ROOT, TINY, Bench, adamw, greedy, medians, script, state_bytes, tokens, training_step, tree_bytes
from model import PRESETS, Flow, FlowConfig
from muon import Muon, build_optimizers
from scripts import ArgumentParser, InputError, run
from shards import Windows
from snn_model import Pulse

FLOW_11M = FlowConfig(n_layer=6, n_head=6, n_kv_head=6, d_model=384, head_dim=64, d_ff=1024, global_every=6)
FLOW_15M = FlowConfig(vocab_size=32_000, n_layer=6, n_head=6, n_kv_head=6, d_model=288, head_dim=48, d_ff=768, window=256, global_every=6)
TINY_PULSE = snn_model.PulseConfig(n_layer=3, d_model=32, d_hidden=32, d_ff=64)
NANO_STEPS, NANOGPT_STEPS = 72, 2000  # of flow_to_bpb: enough to end below nanoGPT's recipe, and what that recipe plans
MUON_STEPS, ADAMW_STEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), 300  # of muon_training: shares of AdamW's, and AdamW's
MUON_LRS, ADAMW_LRS = (0.004, 0.008, 0.016, 0.03), (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)


# ---- training ----


def flow_training(bench: Bench):
    """A step of Flow, also compiled where a compiler is, against the GEMM rate (MFU) and against the same network in transformers."""
    config, budget = (TINY, 128) if bench.quick else (FLOW_11M, 16_384)
    n = 256 if bench.quick else 2048
    a = torch.randn(n, n).to(bench.device.dtype)
    for seq_len, mfu in ((256, 0.6), (2048, 0.5)):
        seq_len = seq_len // 32 if bench.quick else seq_len
        models = {"": Flow(config)}
        if shutil.which(os.environ.get("CXX", "g++")) and not bench.quick:  # compiling takes a minute
            models[", compiled"] = Flow(config)
            train.compile_parts(models[", compiled"])
        other = peers.twin(models[""])
        x, y = tokens(config, budget // seq_len, seq_len)
        jobs = {}
        for kind, model in models.items():
            jobs[kind] = training_step(model, build_optimizers(model, 1e-4, dtype=bench.device.dtype), x, y, bench.device)
        jobs["transformers, AdamW"] = training_step(other, [adamw(other)], x, y, bench.device)
        times = bench.alternate(jobs | {"GEMM": lambda: [a @ a for _ in range(8)]})
        *ours, theirs, gemm = medians(times)
        peak = 8 * 2 * n**3 / gemm / 1e9
        for kind, seconds in zip(models, ours):
            figure = f"training {config.num_params() / 1e6:.1f}M, {budget // seq_len} x {seq_len:,} tokens{kind}"
            flops = config.flops_per_token(seq_len) * budget / seconds / 1e9
            bench.record(figure, flops, "GFLOP/s", f"GEMM {a.dtype}", peak, ("at least", mfu), times, kind)
            against = "transformers' Qwen3, AdamW"
            bench.record(figure, budget / seconds, "tokens/s", against, budget / theirs, ("at least", 1.5), times, kind)


def flow_to_bpb(bench: Bench):
    """train.py's nano against nanoGPT's recipe for a CPU, on --text: seconds of training, and what they reach. So few steps want a
    higher learning rate than a curriculum."""
    data, text = bench.data(), bench.text.read_text(encoding="utf-8")
    ours, theirs = (3, 3) if bench.quick else (NANO_STEPS, NANOGPT_STEPS)
    reached = {"nano": [], "nanoGPT": []}

    def nano():
        out = bench.folder / "nano"
        script("train.py", f"--data={data}", f"--out={out}", "--phase=1", f"--steps={ours}", "--lr=0.016", "--fresh", "--device=cpu")
        last = [line for line in read_log(out / "log.jsonl") if "val_bpb" in line][-1]
        reached["nano"].append(last["val_bpb"])
        return last["seconds"]

    def nanogpt():
        seconds, bpb = peers.train_nanogpt(text, theirs)
        reached["nanoGPT"].append(bpb)
        return seconds

    times = bench.alternate({"nano": nano, "nanoGPT": nanogpt})
    (mine, other), (bpb, there) = medians(times), medians(reached)
    against = f"nanoGPT's CPU recipe, {theirs:,} steps"
    bench.record(f"nano, {ours} steps: training", mine, "s", against, other, ("at most", 0.1), times)
    bench.record(f"nano, {ours} steps: validation", bpb, "bits per byte", against, there, ("at most", 1))


def muon_training(bench: Bench):
    """Seconds to the bits per byte that AdamW reaches, with Muon, both at the best of their learning rates, on --text."""
    data, meta = bench.data(), prepare.load_meta(bench.data())
    tokenizer_json = (data / "tokenizer.json").read_text(encoding="utf-8")
    table, fingerprint = prepare.token_bytes(Tokenizer.from_str(tokenizer_json)), prepare.tokenizer_fingerprint(tokenizer_json)
    config, seq_len = dataclasses.replace(TINY if bench.quick else PRESETS["nano"], vocab_size=meta["vocab_size"]), 256
    batch_size, full = (2, 10) if bench.quick else (train.RECIPES["nano"].micro_step_tokens[0] // seq_len, ADAMW_STEPS)
    windows = {split: Windows(data, 1, split, seq_len, len(table), fingerprint) for split in ("train", "val")}

    def run(muon: bool, lr: float, steps: int) -> tuple[float, float]:
        torch.manual_seed(0)
        model, seconds = Flow(config), 0.0
        optimizers = build_optimizers(model, lr, dtype=bench.device.dtype) if muon else [adamw(model)]
        for step in range(steps):
            x, y = bench.device.put(windows["train"].batch(0, 1, step * batch_size, batch_size))
            start = time.perf_counter()
            training_step(model, optimizers, x, y, bench.device, train.lr_at(step, steps, lr))()
            seconds += time.perf_counter() - start
        return seconds, train.evaluate(model, windows["val"], table, 2**16, batch_size, bench.device)[1]

    target, adamw_lr = min((run(False, lr, full)[1], lr) for lr in ADAMW_LRS)
    _, lr = min((run(True, lr, full // 2)[1], lr) for lr in MUON_LRS)
    steps = next((n for n in (max(1, round(share * full)) for share in MUON_STEPS) if run(True, lr, n)[1] <= target), None)
    if steps is None:
        raise InputError(f"Muon did not reach AdamW's {target:.4f} bits per byte within {full} steps")
    jobs = {f"Muon, {steps} steps, rate {lr}": lambda: run(True, lr, steps)[0]}
    times = bench.alternate(jobs | {f"AdamW, {full} steps, rate {adamw_lr}": lambda: run(False, adamw_lr, full)[0]})
    (ours, against), (mine, theirs) = times, medians(times)
    bench.record(f"{ours}: to {target:.3f} bits per byte", mine, "s", against, theirs, ("at most", 0.6), times)


def optimizer_step(bench: Bench):
    """One step of Muon against torch.optim.Muon over the same matrices."""
    if bench.device.dtype != torch.bfloat16 and not bench.quick:
        raise InputError("torch.optim.Muon computes in bf16, which this CPU only imitates: minutes for a step")
    for name in ("small", "base"):
        model = Flow(TINY if bench.quick else PRESETS[name])
        matrices = model.muon_params()
        for p in matrices:
            p.grad = torch.randn_like(p)
        theirs = torch.optim.Muon(matrices, lr=1e-4, adjust_lr_fn="match_rms_adamw")
        jobs = {"Muon": Muon(matrices, lr=1e-4, dtype=bench.device.dtype).step, "torch.optim.Muon": theirs.step}
        bench.rates(f"optimizer step, {name}, {len(matrices)} matrices", jobs, 1, "steps/s", ("at least", 2))


def pulse_training(bench: Bench):
    """A step of Pulse, whole sequences at once, against the same network stepped token by token."""
    config = TINY_PULSE if bench.quick else snn_model.PRESETS["nano"]
    for seq_len in (8,) if bench.quick else (256, 1024):
        model = Pulse(config)
        x, y = tokens(config, 2048 // seq_len if not bench.quick else 2, seq_len)
        optimizers = build_optimizers(model, 1e-4, dtype=bench.device.dtype)
        jobs = {"Pulse": training_step(model, optimizers, x, y, bench.device)}
        jobs["stepped with snntorch.Leaky"] = training_step(peers.Stepped(model), optimizers, x, y, bench.device)
        bench.rates(f"training Pulse nano, {x.size(0)} x {seq_len:,} tokens", jobs, x.numel(), "tokens/s", ("at least", 20))


def pulse_beside_flow(bench: Bench):
    """A step of Pulse against one of Flow of the same size: attention grows with the window, Pulse does not."""
    for seq_len, goal in ((8, None), (16, None)) if bench.quick else ((256, 1 / 1.6), (1024, None), (4096, 1)):
        models = Pulse(TINY_PULSE if bench.quick else snn_model.PRESETS["nano"]), Flow(TINY if bench.quick else PRESETS["nano"])
        x, y = tokens(models[0].config, 16 // seq_len if bench.quick else max(1, 2048 // seq_len), seq_len)
        names = (type(model).__name__ for model in models)
        optimizers = (build_optimizers(model, 1e-4, dtype=bench.device.dtype) for model in models)
        jobs = {name: training_step(*pair, x, y, bench.device) for name, *pair in zip(names, models, optimizers)}
        bench.rates(f"training nano, {x.size(0)} x {seq_len:,} tokens", jobs, x.numel(), "tokens/s", goal and ("at least", goal))


# ---- decoding ----


def rounds(model: Flow) -> bool:
    """Whether a Decoder with 8-bit weights has any: it leaves small matrices as they are."""
    idx, decoders = torch.zeros(1, 1, dtype=torch.long), (Decoder(model), Decoder(model, int8=True))
    with torch.inference_mode():
        return not torch.equal(*(decoder(idx, state=model.init_state(1, 1))[0] for decoder in decoders))


def decoding(bench: Bench):
    """One sequence, greedy, against transformers' generate with its KV cache, in fp32 and with 8-bit weights on this side."""
    n = 8 if bench.quick else 128
    for name, config in {"nano": PRESETS["nano"], "small": PRESETS["small"], "15M": FLOW_15M}.items():
        model = Flow(TINY if bench.quick else config).eval()
        idx = tokens(model.config, 1, 16)[0]
        label = "8-bit weights" if rounds(model) else "--int8 (none is large enough)"
        jobs = {label: greedy(Decoder(model, int8=True), idx, n, bench.device), "fp32": greedy(model, idx, n, bench.device)}
        times = bench.alternate(jobs | {"transformers": partial(peers.twin(model).eval().generate, idx, n)})
        *ours, theirs = (n / seconds for seconds in medians(times))
        for kind, goal, rate in zip(jobs, (("at least", 4), None), ours):
            figure, against = f"decoding {name}, {kind}, {n} tokens", "transformers' generate, fp32"
            bench.record(figure, rate, "tokens/s", against, theirs, goal, times, kind)


def decoding_bandwidth(bench: Bench):
    """Decoding reads every weight once per token: bytes per second against those of adding up a large tensor."""
    n, buffer = 8 if bench.quick else 32, torch.ones(2**16 if bench.quick else 2**28)  # 1 GiB: no cache holds it
    for name in ("base", "1b"):
        config = TINY if bench.quick else PRESETS[name]
        size = 4 * config.num_params()  # fp32, as sample.py computes on a CPU
        if 1.5 * size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise InputError(f"{name} needs {1.5 * size / 1e9:.1f} GB of memory")
        jobs = {"Flow": greedy(Flow(config).eval(), [[0]], n, bench.device), "sum of a large tensor": buffer.sum}
        bench.rates(f"decoding {name}, {n} tokens", jobs, (size * n / 1e9, buffer.nbytes / 1e9), "GB/s", ("at least", 0.8))


def decoding_batch(bench: Bench):
    """16 sequences at once against one at a time."""
    n = 4 if bench.quick else 128
    for name in ("nano", "small"):
        model = Flow(TINY if bench.quick else PRESETS[name]).eval()
        idx = tokens(model.config, 16, 16)[0]
        jobs = {"16 at once": greedy(model, idx, n, bench.device), "one at a time": greedy(model, idx[:1], n, bench.device)}
        bench.rates(f"decoding {name}, 16 at once", jobs, (16 * n, n), "tokens/s", ("at least", 6))


# ---- how cost grows with the context ----


def context_jobs(bench: Bench, model: torch.nn.Module, lengths: tuple) -> tuple[dict, dict, dict]:
    """For each context length: a training step over as many tokens as the longest has, 32 tokens decoded behind that context, and
    the bytes of a state for it."""
    training, decode, sizes, optimizers = {}, {}, {}, build_optimizers(model, 1e-4, dtype=bench.device.dtype)
    for T in lengths:
        training[T] = training_step(model, optimizers, *tokens(model.config, lengths[-1] // T, T), bench.device)
        state = model.init_state(1, T + 32 * (bench.repeats + 1))
        with torch.inference_mode():
            for part in tokens(model.config, 1, T)[0].split(256, dim=1):
                model(part, state=state)
        reader = Decoder(model) if isinstance(model, Flow) else model  # as generate does it
        decode[T], sizes[T] = partial(read_on, reader, state), state_bytes(model.init_state(1, T))
    return training, decode, sizes


@torch.inference_mode()
def read_on(reader: Callable, state):
    for _ in range(32):
        reader(torch.zeros(1, 1, dtype=torch.long), state=state)


def pulse_context(bench: Bench):
    """Pulse's time per token and its state do not grow with the context."""
    model = Pulse(TINY_PULSE if bench.quick else snn_model.PRESETS["nano"])
    windows, pasts = ((16, 64), (4, 90)) if bench.quick else ((256, 1024, 8192), (100, 50_000))
    training, _, _ = context_jobs(bench, model, windows)
    _, decode, sizes = context_jobs(bench, model, pasts)
    for what, jobs, n in (("training", training, windows[-1]), ("decoding", decode, 32)):
        times = bench.alternate(jobs)
        (first, base), *others = ((T, seconds / n * 1e3) for T, seconds in zip(times, medians(times)))
        for T, ms in others:
            figure, goal = f"{what} Pulse nano, context {T:,}", ("at most", 1.1)
            bench.record(figure, ms, "ms/token", f"context {first:,}", base, goal, times, T)
    first, last = pasts
    bench.record(f"state of Pulse nano, context {last:,}", sizes[last], "bytes", f"context {first:,}", sizes[first], ("at most", 1))


def flow_context(bench: Bench):
    """Sliding layers against the same Flow with every layer global, in time and in memory of the cache."""
    sliding = TINY if bench.quick else PRESETS["nano"]
    lengths = (32, 64) if bench.quick else (256, 2048, 8192)
    everywhere = dataclasses.replace(sliding, global_every=1)
    ours, theirs = (context_jobs(bench, Flow(config), lengths) for config in (sliding, everywhere))
    for T in lengths:
        flops = everywhere.flops_per_token(T) / sliding.flops_per_token(T)
        for i, what, n in ((0, f"training, FLOPs / {flops:.2f}:", lengths[-1]), (1, "decoding", 32)):
            bench.rates(f"{what} nano, context {T:,}", {"sliding": ours[i][T], "all layers global": theirs[i][T]}, n, "tokens/s")
        bench.record(f"cache of nano, context {T:,}", ours[2][T] / 1e6, "MB", "all layers global", theirs[2][T] / 1e6)


# ---- the scripts ----


def preparation(bench: Bench):
    """prepare.py against tokenizers' encode_batch on the same text in memory, and its peak memory as the input grows."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise InputError("measures memory through Linux's /proc")
    small, large = (300_000, 600_000) if bench.quick else (10_000_000, 1_000_000_000)
    packages, peak = ("tqdm", "packaging") if bench.quick else (corpus.STDLIB,), {}
    sources = {size: bench.documents(size, *packages) for size in (small, large)}

    def run(size: int) -> float:
        """Seconds of prepare.py; the most memory goes to `peak`, in MB."""
        start, command = time.perf_counter(), [sys.executable, str(ROOT / "prepare.py"), str(sources[size])]
        command += [f"--out={bench.folder / 'prepared'}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            while process.poll() is None:
                peak[size] = max(peak.get(size, 0), tree_bytes(process.pid) / 1e6)
                time.sleep(0.1)
            output = process.stdout.read()
        if process.returncode:
            raise InputError(f"prepare.py failed: {output.strip().splitlines()[-1]}")
        return time.perf_counter() - start

    run(small)
    tokenizer = Tokenizer.from_file(str(bench.folder / "prepared" / "tokenizer.json"))
    with open(sources[small], encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    batch = partial(tokenizer.encode_batch, texts, add_special_tokens=False)
    jobs = {"encode": lambda: list(prepare.encode(texts, tokenizer.to_str())), "prepare.py": lambda: run(small), "batch": batch}
    times = bench.alternate(jobs)
    encode, whole, theirs = (small / 1e6 / seconds for seconds in medians(times))
    once, against, goal = run(large), "tokenizers' encode_batch", ("at least", 0.9)
    bench.record(f"tokenising {small / 1e6:,g} MB", encode, "MB/s", against, theirs, goal, times)
    bench.record(f"prepare.py, {small / 1e6:,g} MB, start included", whole, "MB/s", against, theirs, None, times, "prepare.py")
    figure, times = f"prepare.py, {large / 1e6:,g} MB, start included", times | {"once": [once]}
    bench.record(figure, large / 1e6 / once, "MB/s", against, theirs, goal, times, "once")
    bench.record(f"prepare.py, {large / 1e6:,g} MB, peak memory", peak[large], "MB", f"{small / 1e6:,g} MB", peak[small], ("at most", 1.2))


def ranks(bench: Bench):
    """Two processes under torchrun against one, one thread each: tokens/s as train.py logs them."""
    data, out = bench.folder / "ranks", bench.folder / "run"
    script("prepare.py", bench.documents(500_000, "tqdm", "packaging"), f"--out={data}")
    size = ("--n_layer=1", "--d_model=32", "--batch_size=2") if bench.quick else ("--preset=small", "--batch_size=32")
    steps = 4 if bench.quick else 12

    def run(launcher: tuple) -> float:
        """Seconds per 1,000 tokens, the first quarter of the steps aside."""
        options = (f"--data={data}", f"--out={out}", "--phase=1", f"--steps={steps}", f"--log_interval={steps // 4}", "--eval_tokens=256")
        script("train.py", *options, *size, "--fresh", "--device=cpu", launcher=launcher, OMP_NUM_THREADS="1")
        rates = [line["tokens_per_s"] for line in read_log(out / "log.jsonl") if "tokens_per_s" in line]
        return 1000 / statistics.median(rates[1:])

    two = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--local-addr=127.0.0.1")
    jobs = {"2 processes": partial(run, two), "1 process": partial(run, ())}
    bench.rates("training small, 2 processes of 1 thread", jobs, 1000, "tokens/s", ("at least", 1.7))


def startup(bench: Bench):
    """From the command to the first token of nano, against importing torch."""
    tokenizer = prepare.train_tokenizer(["the cat sat on the mat"], 300)
    model, path = Flow(PRESETS["nano"]), bench.folder / "startup.pt"
    config = dataclasses.asdict(model.config)
    save_checkpoint(path, dict(model="flow", config=config, weights=model.state_dict(), tokenizer=tokenizer.to_str(), phase=1, step=1))
    jobs = {"sample.py": partial(script, "sample.py", f"--ckpt={path}", "--max_new_tokens=1", "--device=cpu")}
    jobs["import torch"] = partial(subprocess.run, [sys.executable, "-c", "import torch"], check=True)
    times = bench.alternate(jobs)
    ours, theirs = medians(times)
    bench.record("python sample.py --max_new_tokens=1", ours, "s", 'python -c "import torch"', theirs, ("at most", 1.5), times)


# ---- main ----

ROWS = {row.__name__: row for row in (
    flow_training, flow_to_bpb, muon_training, optimizer_step, decoding, decoding_bandwidth, decoding_batch, pulse_training,
    pulse_beside_flow, pulse_context, flow_context, preparation, ranks, startup, gpu_training, gpu_pulse, gpu_memory, gpu_decoding,
    gpu_attention,
)}  # fmt: skip


def main(argv=None):
    described = "\n".join(f"  {name:19s} {row.__doc__}" for name, row in ROWS.items())
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], epilog=f"rows:\n{described}")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="what to measure (default: everything that can run here)")
    parser.add_argument("--text", type=Path, help="a text file for the rows that train to a quality: flow_to_bpb and muon_training")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count (default: 5)")
    parser.add_argument("--json", type=Path, help="write all results, every time of every turn included, to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether a row works: the figures mean nothing")
    args = parser.parse_args(argv)
    if unknown := [row for row in args.rows if row not in ROWS]:
        raise InputError(f"{unknown[0]} is no row: expected {', '.join(ROWS)}")
    if args.repeats < 1:
        raise InputError(f"--repeats={args.repeats} must be at least 1")
    if args.text and not args.text.is_file():
        raise InputError(f"--text={args.text} does not exist: name a text file")
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"--json={args.json}: there is no folder {args.json.parent}: make it first")
    if args.json and args.json.is_dir():
        raise InputError(f"--json={args.json} is a folder: name a file")
    torch.manual_seed(0)
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    machine = {"system": platform.platform(), "cpu": cpu[1] if cpu else platform.processor(), "threads": torch.get_num_threads()}
    machine |= {"torch": torch.__version__, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    print("  ".join(f"{name} {value}" for name, value in machine.items()) + f"  repeats {args.repeats}" + "  QUICK" * args.quick + "\n")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for bench.row in args.rows or ROWS:
            try:
                ROWS[bench.row](bench)
            except InputError as reason:
                if args.rows:
                    raise InputError(f"{bench.row}: {reason}") from reason
                print(f"| {bench.row} | not run: {reason} |||||||", flush=True)
            if args.json:  # after every row: a run that is stopped keeps what it has measured
                report = {"machine": machine, "repeats": args.repeats, "quick": args.quick, "results": bench.results}
                args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main)
