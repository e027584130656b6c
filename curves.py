"""The log of a run, and its curves and last figures, of several runs beside each other if wanted.

    python curves.py out/flow                                  # out/flow/curves.png, as train.py draws it itself
    python curves.py out/flow out/pulse --output=both.png

The picture: training and validation loss, bits per byte and learning rate over the tokens seen; the phases are marked. The table, so
that a sweep can be read as numbers: where each phase ended, or is by now; tokens and seconds count from the run's beginning.
"""

import json
from pathlib import Path

from scripts import ArgumentParser, InputError, run, whole_file


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl as train.py writes it; a last line that a kill cut short is left out. InputError for any other."""
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        if line.endswith(b"}"):
            try:
                lines.append(json.loads(line))
                if not all(isinstance(lines[-1][name], int) for name in ("phase", "step", "tokens")):
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(f"{path}:{number} is no line of a log: remove it") from None
    return lines


def trim_log(path: Path, phase: int, step: int):
    """Drop what was logged after this step: a killed run had got further than its checkpoint and will log it again."""
    kept = [line for line in read_log(path) if (line["phase"], line["step"]) <= (phase, step)]
    with whole_file(path) as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)


def read_logs(runs: list[Path]) -> dict[Path, list[dict]]:
    """The log of each run folder. Raises InputError when one is empty, or as read_log does."""
    if files := [path for path in runs if path.is_file()]:
        raise InputError(f"{files[0]} is a file: name the folder of a run")
    logs = {run: read_log(run / "log.jsonl") for run in runs}
    for folder, lines in logs.items():
        if not lines:
            raise InputError(f"{folder}/log.jsonl does not exist or is empty: train with --out={folder} first")
    return logs


def table(logs: dict[Path, list[dict]]) -> str:
    """A row per run and phase: its last validation, or a dash where none has been made yet."""
    rows = [["run", "phase", "tokens", "seconds", "validation loss", "bits per byte"]]
    for folder, lines in logs.items():
        for phase in sorted({x["phase"] for x in lines}):
            of_phase = [x for x in lines if x["phase"] == phase]
            last = [x for x in of_phase if "val_loss" in x][-1:] or of_phase[-1:]
            losses = [f"{last[0][name]:.4f}" if name in last[0] else "-" for name in ("val_loss", "val_bpb")]
            rows.append([str(folder), str(phase), f"{last[0]['tokens']:,}", f"{last[0]['seconds']:,.0f}", *losses])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(x.rjust(width) for x, width in zip(row[1:], widths[1:]))]) for row in rows)


def draw(logs: dict[Path, list[dict]], picture: Path):
    """Draw the log of each run folder into one picture. Raises InputError when matplotlib is missing or the picture's format is unknown."""
    try:
        from matplotlib import ticker
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise InputError("curves need matplotlib: pip install matplotlib") from problem
    figure = Figure(figsize=(9, 8), layout="constrained")
    ends = {}  # phase -> bits per byte at its end, of every run: the lowest stands below its curve where there are others
    for lines in logs.values():
        for phase, last in {x["phase"]: x["val_bpb"] for x in lines if "val_bpb" in x}.items():
            ends.setdefault(phase, []).append(last)
    loss_axis, bits_axis, lr_axis = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    for n, (folder, lines) in enumerate(logs.items()):
        train, val = [x for x in lines if "loss" in x], [x for x in lines if "val_loss" in x]
        seen, color = [x["tokens"] for x in train], f"C{n}"
        loss_axis.plot(seen, [x["loss"] for x in train], color=color, lw=0.8, alpha=0.6, label=f"{folder.name}, training")
        for phase in sorted({x["phase"] for x in val}):  # each phase has its own validation text: no line from one to the next
            points = [x for x in val if x["phase"] == phase]
            at, last = [x["tokens"] for x in points], points[-1]["val_bpb"]
            name = f"{folder.name}, validation" if phase == val[0]["phase"] else None
            loss_axis.plot(at, [x["val_loss"] for x in points], color=color, marker="o", ms=4, label=name)
            bits_axis.plot(at, [x["val_bpb"] for x in points], color=color, marker="o", ms=4)
            place = {"xytext": (-4, -14 if len(ends[phase]) > 1 and last == min(ends[phase]) else 8), "textcoords": "offset points"}
            bits_axis.annotate(f"{last:.3f}", (at[-1], last), **place, ha="right", color=color)
        lr_axis.plot(seen, [x["lr"] for x in train], color=color)
        for phase in sorted({x["phase"] for x in lines}):
            start = max((x["tokens"] for x in lines if x["phase"] < phase), default=0)
            if n == 0:
                loss_axis.text(start, 1.01, f" phase {phase}", transform=loss_axis.get_xaxis_transform(), color="gray")
            for axis in (loss_axis, bits_axis, lr_axis):
                axis.axvline(start, color="lightgray", lw=1, zorder=0)
    loss_axis.set_ylabel("loss (nats per token)")
    loss_axis.legend()
    bits_axis.set_ylabel("validation bits per byte")
    bits_axis.margins(y=0.15)  # room for the figures
    lr_axis.set_ylabel("learning rate")
    lr_axis.set_xlabel("tokens seen")
    lr_axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    for axis in (loss_axis, bits_axis, lr_axis):
        axis.spines[["top", "right"]].set_visible(False)
    try:
        with whole_file(picture, "wb") as file:
            figure.savefig(file, dpi=110, format=picture.suffix[1:] or "png")
    except ValueError as problem:  # the ending of the name says in which format
        raise InputError(f"{picture} cannot be drawn ({problem}): name a .png, .svg or .pdf") from problem


def draw_curves(out: Path):
    """Draw a run's curves.png, or say why not."""
    try:
        draw(read_logs([out]), out / "curves.png")
        print(f"curves: {out / 'curves.png'}")
    except Exception as problem:  # matplotlib raises what it likes, and the weights are what counts: a missing picture is only said
        print(f"no curves.png: {problem}")


def main(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("out/flow")], help="folders of runs (default: out/flow)")
    parser.add_argument("--output", type=Path, help="the picture (default: curves.png in the first folder)")
    args = parser.parse_args(argv)
    picture = args.output or args.runs[0] / "curves.png"
    logs = read_logs(args.runs)
    print(table(logs))  # first: it needs no matplotlib
    draw(logs, picture)
    print(f"\n{picture}")


if __name__ == "__main__":
    run(main)
