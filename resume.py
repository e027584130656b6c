"""What a phase of train.py begins from: its own last checkpoint, the phase before, another run (--init) or new weights; and when it is
refused. A run's folder holds phase{1,2,3}.pt of what is finished and last.pt of what is not.
"""

import contextlib
import dataclasses
import math
import shutil
from pathlib import Path

from checkpoint import DISTILLATION, PHASES, find_checkpoint, load_checkpoint, load_model
from curves import trim_log
from device import Device
from scripts import InputError


def previous(out: Path, phase: int) -> tuple[Path | None, bool]:
    """(the checkpoint that a phase goes on from or None, whether it is one of the same phase): last.pt, or the phase before's.

    Raises InputError when last.pt is an unfinished other phase: this one would overwrite it.
    """
    last, before = out / "last.pt", out / f"phase{phase - 1}.pt"
    if last.exists():
        begun = load_checkpoint(last)["phase"]
        if begun == phase:
            return last, True
        if begun == DISTILLATION:
            raise InputError(f"{last} is a distillation of distill.py: name another --out")
        if not (out / f"phase{begun}.pt").exists():
            raise InputError(f"{last} is an unfinished phase {begun}: finish it with --phase={begun}, or name another --out")
    return (before, False) if before.exists() else (None, False)


def check_same(path: Path, theirs: dict, ours: dict):
    """Raise InputError naming every setting in which a checkpoint and this command differ."""
    differ = [f"{name} is {theirs.get(name)} there, {ours[name]} here" for name in ours if theirs.get(name) != ours[name]]
    if differ:
        remedy = "give the same settings, another --out, or --fresh to start over"
        raise InputError(f"{path} was trained with other settings ({'; '.join(differ)}): {remedy}")


def beginning(args, phase: int) -> Path | None:
    """What this command's first phase starts from: the phase before in --out, --init, or None for new weights. InputError if it cannot."""
    before, init = args.out / f"phase{phase - 1}.pt", args.init and find_checkpoint(args.init)
    if init and init.resolve().parent == args.out.resolve():
        raise InputError(f"--init={args.init} lies in --out={args.out}, which a run of its own needs: name another --out")
    if before.exists() and (theirs := load_checkpoint(before)["settings"].get("init")) != args.init:
        began = f"--init={theirs}: give that too" if theirs else "new weights: leave --init out"
        raise InputError(f"{before} is there, of a run that began from {began}, or name another --out")
    for name, n in (("shorten", 2), ("quieten", 3)):
        if phase == n and (factor := getattr(args, name)) and not args.init and not before.exists():
            remedy = f"train --phase={n - 1} first"
            raise InputError(f"--{name}={factor} is for a trained Pulse, and {args.out} holds no {before.name}: {remedy}")
    return before if before.exists() else init


def read_start(path: Path) -> dict:
    """The checkpoint that a phase begins from; of a Hugging Face folder what there is: weights, sizes, tokenizer."""
    if not path.is_dir():
        return load_checkpoint(path)
    model, _, checkpoint = load_model(path)
    return checkpoint | {"weights": model.state_dict()}


def check_start(path: Path, checkpoint: dict, args, config, tokenizer_json: str):
    """Raise InputError when a phase cannot go on from a checkpoint with this network and these data."""
    if checkpoint["tokenizer"] != tokenizer_json:
        raise InputError(f"{path} was trained with another tokenizer than that of {args.data}: use its data or another --out")
    sizes = {"model": args.model, **dataclasses.asdict(config)}
    sizes.pop("max_seq_len", None)  # no weight depends on it: a phase may have longer windows than those before
    check_same(path, {"model": checkpoint["model"], **checkpoint["config"]}, sizes)
    if "optimizer" not in checkpoint and path.parent == args.out:  # of another run (--init) the weights are enough
        raise InputError(f"{path} is a copy for sampling, without the optimizers' state: put the phase's own checkpoint back")


def start_over(args, phase: int, config, tokenizer_json: str, device: Device):
    """--fresh: sets aside the checkpoints of this phase and later ones, and their lines of the log. Raises InputError, and touches
    nothing, when the phase could not begin again."""
    last = args.out / "last.pt"
    if start := beginning(args, phase):
        check_start(start, read_start(start), args, config, tokenizer_json)
    device.barrier()  # the others look at the same files
    if device.rank != 0:
        return
    try:
        begun = load_checkpoint(last)["phase"]
    except InputError:  # none, or none that could go on
        begun = math.inf
    if begun < phase or begun == DISTILLATION:
        previous(args.out, phase)  # refuses to lose an earlier phase, or a distillation
    files = [args.out / f"phase{n}{kind}.pt" for n in range(phase, len(PHASES) + 1) for kind in ("", "_best")]
    set_aside(args.out, files if begun < phase else [last, *files])
    trim_log(args.out / "log.jsonl", phase - 1, 10**9)


# What --fresh replaces is removed when the new run has saved something, and put back if it ends before.

ASIDE = ".before_fresh"


def set_aside(out: Path, files: list[Path]):
    """Move files of a run's folder, and a copy of its log, to where give_back() finds them."""
    aside = out / ASIDE
    aside.mkdir()
    for file in filter(Path.exists, files):
        file.rename(aside / file.name)
    if (out / "log.jsonl").exists():
        shutil.copy2(out / "log.jsonl", aside)


def give_back(out: Path):
    """Put back what was set aside by a run that came to nothing, perhaps because it was killed."""
    if (aside := out / ASIDE).is_dir():
        for file in aside.iterdir():
            file.replace(out / file.name)
        aside.rmdir()
    shutil.rmtree(out / f"{ASIDE}.gone", ignore_errors=True)


@contextlib.contextmanager
def restoring(out: Path, device: Device):
    """give_back() if the run inside ends with an error, and if the folder is its own."""
    try:
        yield
    except BaseException:
        if device.claimed is not None:
            give_back(out)
        raise


def let_go(out: Path):
    """Remove what was set aside, all at once: no half of it is ever put back."""
    if (aside := out / ASIDE).is_dir():
        aside.rename(gone := out / f"{ASIDE}.gone")
        shutil.rmtree(gone)
