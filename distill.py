"""Distillation: a teacher answers word problems, its answers train a student, exact match of the final number measures it.

    python distill.py                                                   # the newest run learns the built-in problems' own solutions
    python distill.py --student=out/pulse --teacher=out/flow            # Flow's answers that are right, and its logits, train Pulse
    python distill.py --trace --teacher=http://localhost:8000/v1 --problems=train.jsonl --samples=4      # only ask, keep the answers
    python distill.py --student=out/flow --teacher=Qwen/Qwen3-4B-Instruct-2507 --problems=train.jsonl --eval test.jsonl
    python distill.py --evaluate --student=out/flow                     # only measure a checkpoint

Three stages, joined by files: traces (JSON lines, one per answer, written as they come), training (loss on the answer and its end
token only) and evaluation on problems that no answer was trained on. Traces and training go on where they were stopped when the
same command is given again; evaluation is made anew. A run leaves in --out: last.pt, log.jsonl, curves.png and eval_*.jsonl with
every answer of the evaluation.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
import shlex
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import prepare
import teachers
from checkpoint import DISTILLATION, find_checkpoint, load_checkpoint, load_model, save_checkpoint
from curves import draw_curves, trim_log
from device import DTYPES, Device, StopNotice
from exact_match import DATA, Problem, final_number, load_problems, majority, problem_files, refuse_leaks, wilson
from loss import distillation_loss
from muon import build_optimizers, decay_groups, update
from resume import check_same, give_back, let_go, restoring, set_aside
from scripts import ArgumentParser, InputError, json_object, out_of_memory, run, whole_file
from teachers import Job, LocalTeacher, check_tokenizer, checkpoint_teacher, question_ids
from train import RATE_PENALTY, lr_at

TEACHER = "Qwen/Qwen3-4B-Instruct-2507"  # what --teacher without a name means
POOL = 16  # batches whose examples are sorted by length together: little padding, and still a random order
VAL_EXAMPLES = 256  # of the first evaluation file, for the validation loss
WEIGHT_DECAY = 0.1
LR = {"muon": 0.008, "adamw": 0.002}  # peak at d_model = 128, divided by sqrt(d_model / 128) for others


# --------------------------------------------------------------------------------------------------------------- examples


class Examples:
    """Questions with the answers to learn, as token ids; and which of them a step sees.

    One example is one row of a batch, so that nothing leaks from one into another, neither through Flow's attention nor through
    Pulse's membranes; rows of similar length share a batch, which leaves little to pad.
    """

    def __init__(self, pairs: list[tuple[str, str]], tokenizer: Tokenizer, seq_len: int):
        end, pad = map(tokenizer.token_to_id, ("<|im_end|>", "<|pad|>"))
        self.pad, self.rows, self.too_long = pad or end, [], 0  # an imported tokenizer may have no <|pad|>; no loss is taken there
        for question, answer in pairs:
            prompt = question_ids(tokenizer, question)
            row = [*prompt, *prepare.plain_ids(tokenizer, answer), end]
            if len(row) <= seq_len + 1:
                self.rows.append((np.array(row, np.int32), len(prompt)))
            else:
                self.too_long += 1
        self.lengths = np.array([len(row) - 1 for row, _ in self.rows])
        self.answer_lengths = np.array([len(row) - n_prompt for row, n_prompt in self.rows])
        self.cached: tuple = (None, [])

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for row, n_prompt in self.rows:
            digest.update(np.int32(n_prompt).tobytes() + row.tobytes())
        return digest.hexdigest()

    def epoch(self, seed: int, epoch: int, size: int) -> list[np.ndarray]:
        """One pass: batches of `size` example numbers, in random order, each sorted by length. The rest is left out."""
        if self.cached[0] != (seed, epoch, size):
            rng = np.random.default_rng((seed, epoch))
            order = rng.permutation(len(self.rows))[: len(self.rows) // size * size]
            pools = [order[i : i + POOL * size] for i in range(0, len(order), POOL * size)]
            batches = [b for pool in pools for b in pool[np.argsort(self.lengths[pool], kind="stable")].reshape(-1, size)]
            self.cached = (seed, epoch, size), [batches[i] for i in rng.permutation(len(batches))]
        return self.cached[1]

    def batch(self, seed: int, step: int, size: int) -> np.ndarray:
        """The example numbers of an optimizer step; they depend on nothing else."""
        per_epoch = len(self.rows) // size
        return self.epoch(seed, step // per_epoch, size)[step % per_epoch]

    def tensors(self, numbers: np.ndarray, device) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, T] of examples, padded on the right; targets are -1 except at the answer and its end token."""
        T = int(self.lengths[numbers].max())
        x, y = np.full((len(numbers), T), self.pad, np.int64), np.full((len(numbers), T), -1, np.int64)
        for i, n in enumerate(numbers):
            row, n_prompt = self.rows[n]
            x[i, : len(row) - 1] = row[:-1]
            y[i, n_prompt - 1 : len(row) - 1] = row[n_prompt:]
        return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)

    def padding(self, seed: int, size: int) -> float:
        """The share of a first epoch's tokens that is padding."""
        batches = self.epoch(seed, 0, size)
        return 1 - sum(self.lengths[b].sum() for b in batches) / sum(self.lengths[b].max() * size for b in batches)


# --------------------------------------------------------------------------------------------------------------- training


def make_optimizers(kind: str, model, lr: float, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """The pre-training optimizers, or AdamW for everything."""
    if kind == "muon":
        return build_optimizers(model, lr, WEIGHT_DECAY, dtype)
    return [torch.optim.AdamW(decay_groups(model.parameters(), WEIGHT_DECAY), lr=lr, betas=(0.9, 0.95), fused=True)]


@torch.no_grad()
def validate(model, examples: Examples, token_bytes: np.ndarray, batch_size: int, device: Device) -> tuple[float, float]:
    """(mean nats per token, bits per byte) of the reference answers, their end tokens included."""
    order = np.argsort(examples.lengths, kind="stable")[device.rank :: device.ranks]
    nats, n_tokens, n_bytes = 0.0, 0, 0
    model.eval()
    for i in range(0, len(order), batch_size):
        x, y = examples.tensors(order[i : i + batch_size], device.torch)
        with device.autocast():
            _, loss = model(x, y)
        targets = y[y >= 0].cpu().numpy()
        nats, n_tokens, n_bytes = nats + loss.item() * len(targets), n_tokens + len(targets), n_bytes + int(token_bytes[targets].sum())
    model.train()
    nats, n_tokens, n_bytes = device.sum([nats, n_tokens, n_bytes])
    return nats / n_tokens, nats / math.log(2) / max(1, n_bytes)


def train(args, student: Path, pairs: list[tuple[str, str]], val: list[Problem], teacher, device: Device, say):
    """Train the student on (question, answer) pairs; leaves last.pt, log.jsonl and curves.png in args.out."""
    model, tokenizer, source = load_model(student, device.torch)
    check_tokenizer(student, tokenizer, model.config.vocab_size)
    limit = min(getattr(network.config, "max_seq_len", math.inf) for network in (model, teacher.model if teacher else model))
    if args.seq_len > limit:
        say(f"--seq_len={limit}, not {args.seq_len}: {'student or teacher' if teacher else 'the student'} reads no more")
        args.seq_len = limit
    examples = Examples(pairs, tokenizer, args.seq_len)
    held_out = Examples([(p.question, p.answer) for p in val[:VAL_EXAMPLES]], tokenizer, args.seq_len)
    size = args.batch_size * args.grad_accum * device.ranks  # examples of an optimizer step
    n = len(examples.rows)
    if n < size or not held_out.rows:
        few = f"{n:,} examples" if n < size else "0 evaluation problems"
        raise InputError(f"{few} of at most {args.seq_len:,} tokens, a step takes {size}: give more, raise --seq_len or lower --batch_size")
    steps = max(1, round(args.epochs * (n // size)))
    peak_lr = args.lr or LR[args.optimizer] * (128 / model.config.d_model) ** 0.5
    if source["model"] == "pulse":  # what it paid for its spikes while it learned to write, unless told otherwise
        rate_penalty = source.get("settings", {}).get("rate_penalty", RATE_PENALTY) if args.rate_penalty is None else args.rate_penalty
        model.rate_penalty = rate_penalty / args.grad_accum  # it acts in every micro-step
    say(f"device: {device}")
    say(f"student: {student}, {source['model']}, {model.config.num_params():,} parameters")
    left_out = f"; {examples.too_long:,} longer than --seq_len={args.seq_len} left out" if examples.too_long else ""
    say(f"{n:,} examples of {examples.lengths.mean():.0f} tokens, {examples.answer_lengths.mean():.0f} of them to learn{left_out}")
    say(f"{steps:,} steps of {size} examples, {examples.padding(args.seed, size):.1%} of a batch is padding; "
        f"{args.optimizer}, peak learning rate {peak_lr:.2g}" + (f"; KL weight {args.kl_weight}" if teacher else ""))  # fmt: skip

    settings = {
        "student": f"{student}@{teachers.weights_checksum(model):08x}", "examples": examples.fingerprint(), "steps": steps,
        "examples_per_step": size, "optimizer": args.optimizer, "lr": peak_lr, "seed": args.seed, "seq_len": args.seq_len,
        "kl_weight": args.kl_weight if teacher else 0.0, "kl_temperature": args.kl_temperature if teacher else 0.0,
        "teacher": teacher.name if teacher else None,
    } | ({"rate_penalty": rate_penalty} if source["model"] == "pulse" else {})  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    log, last = args.out / "log.jsonl", args.out / "last.pt"
    device.claim(args.out)
    if device.rank == 0:
        give_back(args.out)
        if args.fresh:
            set_aside(args.out, [last])
    device.barrier()
    torch.manual_seed(args.seed)
    optimizers = make_optimizers(args.optimizer, model, peak_lr, device.dtype)
    step, tokens, seconds = 0, 0, 0.0
    if last.exists():
        checkpoint = load_checkpoint(last)
        check_same(last, checkpoint["settings"], settings)
        if checkpoint["step"] == steps:
            say(f"training is finished ({last}); --fresh would start over")
            return
        model.load_state_dict(checkpoint["weights"])
        for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
            optimizer.load_state_dict(state)
        step, tokens, seconds = checkpoint["step"], checkpoint["tokens"], checkpoint["seconds"]
        say(f"continuing {last} at step {step:,}")
        del checkpoint
    if device.rank == 0:
        trim_log(log, DISTILLATION, step or -1)  # -1: the validation loss before the first step is measured again
    peak, _ = device.peak_flops()
    flops = model.config.flops_per_token(round(examples.lengths.mean()))
    token_bytes = prepare.token_bytes(tokenizer)
    network = device.parallel(model)

    def record(**line):
        if device.rank == 0:
            with open(log, "a") as file:
                file.write(json.dumps(dict(step=step, phase=DISTILLATION, tokens=tokens, seconds=round(seconds, 3)) | line) + "\n")

    def evaluate_loss():
        val_loss, val_bpb = validate(model, held_out, token_bytes, args.batch_size, device)
        say(f"step {step:>5,}/{steps:,}  validation loss {val_loss:.4f}  {val_bpb:.4f} bits per byte", flush=True)
        record(val_loss=round(val_loss, 5), val_bpb=round(val_bpb, 5))

    stop = StopNotice(device)  # ends the run after the step in progress, with everything saved
    model.train()
    if step == 0:
        evaluate_loss()
    losses, logged = [], (step, tokens, seconds)
    while step < steps:
        clock = time.perf_counter()
        lr = lr_at(step, steps, peak_lr)
        chosen = examples.batch(args.seed, step, size)
        n_targets = int(examples.answer_lengths[chosen].sum())
        for micro in range(args.grad_accum):
            mine = chosen[micro * device.ranks + device.rank :: args.grad_accum * device.ranks]
            x, y = examples.tensors(mine, device.torch)
            with network.no_sync() if device.ranks > 1 and micro < args.grad_accum - 1 else nullcontext():
                with device.autocast():
                    if teacher:
                        with torch.no_grad():
                            teacher_logits, _ = teacher.model(x)
                        logits, _ = network(x)
                        loss = distillation_loss(logits, teacher_logits, y, args.kl_weight, args.kl_temperature)
                    else:
                        _, loss = network(x, y)
                # The mean over all answer tokens of the step, wherever they are: DDP will divide by the ranks.
                loss = loss * (int(examples.answer_lengths[mine].sum()) / n_targets * device.ranks)
                loss.backward()
            losses.append(loss.detach() / device.ranks)
        grad_norm = update(model, optimizers, lr)
        step, tokens = step + 1, tokens + int(examples.lengths[chosen].sum())

        ending = step == steps
        stopping = stop.given(step % args.log_interval == 0) and not ending
        log_now = ending or stopping or step % args.log_interval == 0
        save_now = ending or step % args.save_interval == 0
        if log_now or save_now:
            device.wait()
            if not math.isfinite(grad_norm):  # so neither are the weights by now: nothing more is saved
                why = f"the gradient is {grad_norm:.3g} at step {step}"
                raise InputError(f"{why}: start over with --fresh and a lower --lr than {peak_lr:.2g}")
        seconds += time.perf_counter() - clock
        if log_now:
            (mean_loss,) = device.sum([torch.stack(losses).sum().item() / (step - logged[0])])
            rate = (tokens - logged[1]) / (seconds - logged[2])
            mfu = flops * rate / (peak * device.ranks)
            eta = datetime.timedelta(seconds=round((steps - step) * (seconds - logged[2]) / (step - logged[0])))
            say(f"step {step:>5,}/{steps:,}  loss {mean_loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}  {rate:,.0f} tokens/s  mfu {mfu:.1%}"
                f"  eta {eta}", flush=True)  # fmt: skip
            record(loss=round(mean_loss, 5), lr=lr, grad_norm=round(grad_norm.item(), 5), tokens_per_s=round(rate, 1), mfu=round(mfu, 4))
            losses, logged = [], (step, tokens, seconds)
        if ending or step % args.eval_interval == 0:
            evaluate_loss()
        if save_now or stopping:
            state = [optimizer.state_dict() for optimizer in optimizers]  # gathered: all ranks take part
            if device.rank == 0:
                save_checkpoint(last, dict(
                    model=source["model"], config=dataclasses.asdict(model.config), weights=model.state_dict(), optimizer=state,
                    tokenizer=source["tokenizer"], settings=settings, data_fingerprint=settings["examples"], phase=DISTILLATION, step=step,
                    tokens=tokens, seconds=seconds, imported=source.get("imported", not source["phase"]),
                ))  # fmt: skip
                let_go(args.out)
        if stopping:
            say(f"stopped at step {step:,}; saved in {last}: the same command{' without --fresh' * args.fresh} goes on from there")
            device.barrier()
            raise SystemExit(130)
    stop.close()
    if device.rank == 0:
        draw_curves(args.out)
    device.barrier()
    say(f"training took {seconds:.0f} s; weights in {last}")


# ------------------------------------------------------------------------------------------------------------- evaluation


def evaluate(student: LocalTeacher, problems: list[Problem], args, transcripts: Path) -> str:
    """Exact match of the final number on problems, as text; every answer goes to the transcripts file."""
    jobs = [Job(str(i), k, problem.question) for i, problem in enumerate(problems) for k in range(args.votes)]
    temperature = 0.0 if args.votes == 1 else 0.7 if args.temperature is None else args.temperature
    began, texts, cut, tokens = time.perf_counter(), [[""] * args.votes for _ in problems], 0, 0
    right, silent = 0, 0
    with whole_file(transcripts) as file:  # opened first: an answer that cannot be kept is not asked for
        for job, answer in student.answers(jobs, temperature, args.max_new_tokens, args.seed):
            texts[int(job.key)][job.sample] = answer.text
            cut, tokens = cut + (answer.finish != "stop"), tokens + answer.tokens
        for problem, answers in zip(problems, texts):
            final = majority([final_number(text) for text in answers])
            right, silent = right + (final == problem.number), silent + (final is None)
            line = {"question": problem.question, "reference": str(problem.number), "answers": answers,
                    "final": None if final is None else str(final), "correct": final == problem.number}  # fmt: skip
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    n, (low, high) = len(problems), wilson(right, len(problems))
    how = "greedy" if args.votes == 1 else f"majority of {args.votes} at temperature {temperature:g}"
    return (f"{right}/{n} = {right / n:.1%} right (95 % interval {low:.1%} to {high:.1%}), {how}; {silent} without a final number, "
            f"{cut} cut off; {tokens / (time.perf_counter() - began):,.0f} tokens/s")  # fmt: skip


def evaluate_all(checkpoint: Path, label: str, folder: Path, evals: dict[str, list[Problem]], args, device: Device, say):
    student = checkpoint_teacher(checkpoint, device.torch, args.gen_batch_size)
    bare, taken = {name: re.sub(r"\.(jsonl|jsonl\.gz|parquet)$", "", name) for name in evals}, set()
    for name, problems in evals.items():
        stem = Path(bare[name]).name
        if [Path(path).name for path in bare.values()].count(stem) > 1:
            stem = re.sub(r"[^A-Za-z0-9.-]+", "_", bare[name]).strip("._")
        while stem in taken:  # x/e and ../x/e
            stem += "_2"
        taken.add(stem)
        transcripts = folder / f"eval_{label}_{stem}.jsonl"
        say(f"{label} {stem}: {evaluate(student, problems, args, transcripts)}; {transcripts}", flush=True)


# ------------------------------------------------------------------------------------------------------------------- main


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], epilog=f"A server's key comes from {teachers.KEY} only.")
    parser.add_argument("--student", help="the checkpoint or run folder to train or measure (default: the newest in out/)")
    parser.add_argument("--teacher", nargs="?", const=TEACHER, help="who answers: a Qwen3 folder or hub id, a checkpoint or run folder, "
                        f"http://host:port/v1 (without a name: {TEACHER}; default: the problems' own solutions)")  # fmt: skip
    parser.add_argument("--problems", help=f"training problems: JSON lines with question and answer (default: {DATA}/problems_train.jsonl)")
    parser.add_argument("--eval", nargs="+", metavar="FILE", help=f"problems to measure on (default: {DATA}/problems_val.jsonl and _test)")
    parser.add_argument("--traces", type=Path, help="file of answers (default: out/traces_<teacher>.jsonl); without --teacher: train on it")
    parser.add_argument("--out", type=Path, help="folder of the run (default: out/<student>_distilled)")
    parser.add_argument("--trace", action="store_true", help="only ask the teacher")
    parser.add_argument("--evaluate", action="store_true", help="only measure the student")
    parser.add_argument("--samples", type=int, default=1, help="answers per problem; 0 = train on the problems' own solutions (default: 1)")
    parser.add_argument("--keep", choices=("correct", "all"), default="correct", help="which answers to train on (default: correct)")
    parser.add_argument("--votes", type=int, default=1, help="evaluate by the majority of so many sampled answers (default: 1, greedy)")
    parser.add_argument("--temperature", type=float, help="of sampled answers (default: 0.7; a single answer is greedy)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of one answer at most (default: 512)")
    parser.add_argument("--gen_batch_size", type=int, default=64, help="answers made at a time (default: 64)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests to a server at a time (default: 16)")
    parser.add_argument("--teacher_model", help="the model of a server that has several")
    parser.add_argument("--teacher_body", type=json_object, metavar="JSON", help="fields to add to what a server is asked, or with null "
                        'to take out: {"max_tokens": null, "max_completion_tokens": 512}')  # fmt: skip
    parser.add_argument("--num_problems", type=int, help="use the first so many training problems only")
    parser.add_argument("--num_eval", type=int, help="use the first so many problems of each evaluation file only")
    parser.add_argument("--skip_bad", action="store_true", help="leave out malformed lines of problem files")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the examples (default: 3)")
    parser.add_argument("--batch_size", type=int, default=32, help="examples per process and micro-step (default: 32)")
    parser.add_argument("--grad_accum", type=int, default=1, help="micro-steps per optimizer step (default: 1)")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens of an example at most; longer ones are left out (default: 1024)")
    parser.add_argument("--optimizer", choices=LR, default="muon", help="for the matrices (default: muon, as in pre-training)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: by optimizer and width)")
    parser.add_argument("--kl_weight", type=float, help="share of the loss that compares logits (default: 0.5 if teacher and student "
                        "have the same tokenizer, else 0)")  # fmt: skip
    parser.add_argument("--kl_temperature", type=float, default=2.0, help="softens both distributions (default: 2)")
    parser.add_argument("--rate_penalty", type=float, help="Pulse: nats per spike per synapse and token (default: as it was trained)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the examples and of sampled answers (default: 0)")
    parser.add_argument("--save_interval", type=int, default=250, help="steps between checkpoints (default: 250)")
    parser.add_argument("--eval_interval", type=int, default=250, help="steps between validation losses (default: 250)")
    parser.add_argument("--log_interval", type=int, default=25, help="steps between log lines (default: 25)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="of matrix products (default: bf16 where the device multiplies it fast)")
    parser.add_argument("--fresh", action="store_true", help="train from the student again; the traces stay")
    args = parser.parse_args(argv)
    for name in ("votes", "max_new_tokens", "gen_batch_size", "concurrency", "num_problems", "num_eval", "epochs", "batch_size",
                 "grad_accum", "seq_len", "lr", "kl_temperature", "save_interval", "eval_interval", "log_interval"):  # fmt: skip
        if getattr(args, name) is not None and not 0 < getattr(args, name) < (1000 if name in ("epochs", "lr", "concurrency") else 2**31):
            limit = "1000" if name in ("epochs", "lr", "concurrency") else "2**31"
            raise InputError(f"--{name}={getattr(args, name)} must be positive and below {limit}")
    if args.samples < 0 or not 0 <= args.seed < 2**63:
        raise InputError(f"--samples={args.samples} and --seed={args.seed} cannot be negative, nor a seed 2^63 or more")
    if not 0 <= (args.rate_penalty or 0) < math.inf:
        raise InputError(f"--rate_penalty={args.rate_penalty} must be 0 or more, and finite")
    greedy = args.temperature == 0 and max(args.samples, args.votes) == 1
    if args.temperature is not None and not (greedy or 0.01 <= args.temperature <= 100):
        raise InputError(f"--temperature={args.temperature} must be 0.01 to 100, or 0 (greedy) for a single answer")
    if args.kl_weight is not None and not 0 <= args.kl_weight <= 1:
        raise InputError(f"--kl_weight={args.kl_weight} must be between 0 and 1")
    if args.trace and (args.evaluate or not args.teacher or not args.samples):
        raise InputError("--trace asks a --teacher for --samples answers and does nothing else: name the teacher, leave --evaluate out")
    if args.evaluate and (given := [name for name in ("teacher", "problems", "traces") if getattr(args, name)]):
        raise InputError(f"--evaluate only measures the student: leave --{given[0]} out")
    unread = [name for name, usual in (("problems", None), ("num_problems", None), ("samples", 1)) if getattr(args, name) != usual]
    if args.traces and (unread and not args.teacher or args.samples == 0):
        raise InputError(f"--traces holds the questions and their answers: leave --{unread[-1]} out, or name the teacher to ask for more")
    if args.eval is None and not (args.evaluate or args.trace) and (args.problems or args.traces and not args.teacher):
        raise InputError(f"{'--problems' if args.problems else '--traces'} needs --eval: name files with other problems to measure on")
    return args


def find_student(args) -> Path:
    """The checkpoint to start from. When none is named and the newest run is itself a distillation, that one is continued."""
    path = find_checkpoint(args.student)
    if args.student is None and (settings := load_checkpoint(path).get("settings", {})) and "student" in settings:
        args.out = args.out or path.parent
        path = Path(settings["student"].rpartition("@")[0])
    used = {"student": path} | ({"teacher": Path(args.teacher)} if args.teacher and os.path.exists(args.teacher) else {})
    homes = {role: where.resolve() if where.is_dir() else where.resolve().parent for role, where in used.items()}
    args.out = args.out or Path("out") / f"{homes['student'].name}_distilled"
    for role, home in homes.items():
        if args.out.resolve() == home:
            raise InputError(f"--out={args.out} holds the {role}, whose last.pt the run would replace: name another folder")
    last, phase = args.out / "last.pt", DISTILLATION
    with suppress(InputError) if args.fresh else nullcontext():  # --fresh also replaces a file that is cut short
        phase = load_checkpoint(last)["phase"] if last.exists() else DISTILLATION
    if phase != DISTILLATION or any(args.out.glob("phase[123].pt")):
        raise InputError(f"--out={args.out} holds a run of train.py{', unfinished' * (phase != DISTILLATION)}: name another folder")
    return path


def logit_teacher(args, teacher, student: Path, checkpoint: dict):
    """The teacher if its logits are to be learned, else None; settles --kl_weight. Raises InputError when they cannot be."""
    same = isinstance(teacher, LocalTeacher) and (
        teacher.tokenizer.to_str() == Tokenizer.from_str(checkpoint["tokenizer"]).to_str()
        and teacher.model.config.vocab_size == checkpoint["config"]["vocab_size"]
    )
    if args.kl_weight and not same:
        raise InputError(f"--kl_weight={args.kl_weight} compares logits: it needs a local --teacher with the tokenizer of {student}")
    if teacher and not same and args.kl_weight is None and not args.samples:
        raise InputError(f"--samples=0 leaves the logits of {args.teacher}, which has another tokenizer or none here: leave --samples out")
    args.kl_weight = (0.5 if same else 0.0) if args.kl_weight is None else args.kl_weight
    return teacher if args.kl_weight else None


def distill(args, device: Device, say):
    names = args.eval or [f"{DATA}/problems_val.jsonl", f"{DATA}/problems_test.jsonl"]
    if args.trace and not args.eval:  # only to see that no question of theirs is asked
        names = [name for name in names if Path(name).exists()]
    evals = {name: load_problems(name, args.num_eval, args.skip_bad, say) for name in names}
    if args.evaluate:
        path = find_checkpoint(args.student)
        if device.rank == 0:
            (args.out or path.parent).mkdir(parents=True, exist_ok=True)
            evaluate_all(path, path.stem, args.out or path.parent, evals, args, device, say)
        return
    student = None if args.trace else find_student(args)
    if student:
        source = load_model(student)[2] if student.is_dir() else load_checkpoint(student)
        if args.rate_penalty and source["model"] != "pulse":
            raise InputError(f"--rate_penalty={args.rate_penalty} is for a Pulse, and {student} is none: leave it out")
    options = (device.torch, args.gen_batch_size, args.teacher_model, args.concurrency, args.teacher_body)
    teacher = teachers.open_teacher(args.teacher, *options) if args.teacher else None
    compared = logit_teacher(args, teacher, student, source) if student else None  # refuses before an answer is paid for

    if args.traces and not teacher:
        traces = teachers.read_traces(args.traces, None)
        pairs = teachers.chosen_traces(traces, args.keep, say)
        named = [] if args.traces.name.startswith("traces_") else [str(args.traces)]  # else it is the teacher's name, such as out/test
        refuse_leaks(str(args.traces), named, [trace["question"] for trace in traces.values()], evals)
    else:
        name = args.problems or f"{DATA}/problems_train.jsonl"
        problems = load_problems(name, args.num_problems, args.skip_bad, say)
        refuse_leaks(name, [path for path, _ in problem_files(name)], [problem.question for problem in problems], evals)
        if teacher and args.samples:
            path = args.traces or Path("out") / f"traces_{re.sub(r'[^A-Za-z0-9.-]+', '_', args.teacher.strip('/'))}.jsonl"
            if device.ranks > 1:
                raise InputError(f"several processes train only: make the answers with --trace first, then give --traces={path}")
            pairs = teachers.chosen_traces(teachers.make_traces(path, teacher, problems, args, say), args.keep, say)
        else:
            pairs = [(problem.question, problem.answer) for problem in problems]
    if args.trace:
        say(f"next: python distill.py --traces={shlex.quote(str(path))} --eval FILE --student=...")
        return
    if not pairs:
        raise InputError("no answer is left to learn from: take a better --teacher, --keep=all, or a larger --max_new_tokens")
    with restoring(args.out, device):
        train(args, student, pairs, evals[names[0]], compared, device, say)
    device.leave()  # while the first evaluates, the others need not wait
    if device.rank == 0:
        for checkpoint, label in ((student, "before"), (args.out / "last.pt", "after")):
            evaluate_all(checkpoint, label, args.out, evals, args, device, say)
        say(f"next: python sample.py --chat --ckpt={shlex.quote(str(args.out))}")


def main(argv=None):
    args = parse_args(argv)
    try:
        with Device(args.device, args.dtype) as device:
            distill(args, device, device.say)
    except (RuntimeError, MemoryError) as problem:
        if out_of_memory(problem):
            remedy = "lower --batch_size and raise --grad_accum, lower --gen_batch_size, or choose a smaller model"
            raise InputError(f"a model or a batch of it does not fit into the memory: {remedy}") from problem
        raise


if __name__ == "__main__":
    run(main)
