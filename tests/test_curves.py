"""curves.py: the picture and the table of several runs, and what cannot be drawn."""

import json
import sys

import pytest
from conftest import call, fails

import curves
from scripts import InputError


def line(phase, step, **values):
    return {"phase": phase, "step": step, "tokens": 1000 * step, "seconds": 2.5 * step} | values


def validated(phase, step, loss):
    return line(phase, step, val_loss=loss, val_bpb=loss / 2)


@pytest.fixture
def two_runs(tmp_path):
    flow = [line(1, 5, loss=5.0, lr=0.1), validated(1, 5, 4.5), line(1, 10, loss=4.0, lr=0.1), validated(1, 10, 4.25)]
    flow += [line(2, 15, loss=3.0, lr=0.1), validated(2, 15, 3.125), line(2, 20, loss=3.0, lr=0.1)]  # stopped before its next validation
    pulse = [line(1, 1200, loss=6.0, lr=0.1), validated(1, 1200, 5.0), line(3, 1300, loss=6.0, lr=0.1)]
    for name, lines in (("flow", flow), ("pulse", pulse)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path / "flow", tmp_path / "pulse"


def test_the_last_figures_of_each_phase_are_printed(two_runs):
    flow, pulse = two_runs
    done = call("curves.py", flow, pulse, f"--output={flow / 'both.svg'}")
    assert done.returncode == 0, done.stderr
    head, *rows, empty, picture = done.stdout.splitlines()
    assert [part.strip() for part in head.split("  ") if part] == ["run", "phase", "tokens", "seconds", "validation loss", "bits per byte"]
    assert [row.split() for row in rows] == [
        [str(flow), "1", "10,000", "25", "4.2500", "2.1250"],
        [str(flow), "2", "15,000", "38", "3.1250", "1.5625"],
        [str(pulse), "1", "1,200,000", "3,000", "5.0000", "2.5000"],
        [str(pulse), "3", "1,300,000", "3,250", "-", "-"],
    ]
    assert len({len(row) for row in [head, *rows]}) == 1 and not empty and picture == str(flow / "both.svg")
    assert (flow / "both.svg").stat().st_size > 1000 and not (flow / "curves.png").exists()


def test_a_training_script_prints_no_table(two_runs, capsys):
    curves.draw_curves(two_runs[0])
    assert capsys.readouterr().out == f"curves: {two_runs[0] / 'curves.png'}\n" and (two_runs[0] / "curves.png").exists()


def test_the_table_needs_no_matplotlib(two_runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="curves need matplotlib: pip install matplotlib"):
        curves.main([str(two_runs[0])])
    assert "4.2500" in capsys.readouterr().out
    curves.draw_curves(two_runs[0])
    assert capsys.readouterr().out == "no curves.png: curves need matplotlib: pip install matplotlib\n"


def test_what_cannot_be_drawn(two_runs, tmp_path):
    fails("curves.py", two_runs[0], tmp_path / "none", match="none/log.jsonl does not exist or is empty: train with --out=")
    fails("curves.py", two_runs[0] / "log.jsonl", match="log.jsonl is a file: name the folder of a run")
    with pytest.raises(InputError, match="cannot be drawn .*: name a .png, .svg or .pdf"):
        curves.main([str(two_runs[0]), f"--output={tmp_path / 'x.jpegg'}"])
