"""The loop of train.py from inside: what each option changes, what is logged and what is kept."""

import json
import math
import re
import signal
import sys
import types

import pytest
import torch
from conftest import SIZES

import convert
import device
import model as flow
import train
from checkpoint import load_checkpoint, save_checkpoint
from model import PRESETS
from scripts import InputError

TINY = [*SIZES, "--seq_len=32", "--batch_size=4", "--eval_tokens=256", "--log_interval=1", "--device=cpu", "--dtype=fp32"]
PULSE = ["--model=pulse", "--n_layer=2", "--d_model=32", "--d_hidden=40", "--d_ff=48", "--n_head=2", "--memory_every=2", "--num_steps=4"]
PULSE += TINY[len(SIZES) :]


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """train.main in this process, in a folder of its own; the lines of its log."""
    monkeypatch.setattr(device.Device, "peak_flops", lambda self: (1e12, "made up"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*options, out="run", sizes=TINY):
        train.main([f"--data={data}", f"--out={tmp_path / out}", *sizes, *options])
        return [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_recipe_is_what_is_planned(run, monkeypatch, capsys):
    """Also what the other presets would do; the run ends before it starts."""

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "StopNotice", stop)
    sizes = [option for option in TINY if not option.startswith("--batch_size")]
    for name in PRESETS:
        recipe = train.RECIPES[name]
        with pytest.raises(KeyboardInterrupt):
            run(f"--preset={name}", sizes=sizes)
        tokens = recipe.grad_accum * sum(steps * size for steps, size in zip(recipe.steps, recipe.micro_step_tokens))
        assert f"plan: {tokens:,} tokens" in capsys.readouterr().out
    assert train.RECIPES["nano"] == train.Recipe((2048, 1024, 2048), 1, (1500, 4000, 500), (0.004, 0.0028, 0.001))


def test_the_data_follow_seed_phase_and_micro_step(run, monkeypatch):
    asked, batch = [], train.Windows.batch
    monkeypatch.setattr(train.Windows, "batch", lambda self, *which: asked.append(which) or batch(self, *which))
    run("--phase=2", "--steps=2", "--grad_accum=2", "--seed=5")
    assert asked == [(5, 2, 0, 4), (5, 2, 4, 4), (5, 2, 8, 4), (5, 2, 12, 4)]


def test_gradients_are_those_of_the_whole_batch_and_are_clipped(run, monkeypatch):
    norms, build = [], train.build_optimizers

    def watched(model, *args):
        optimizers = build(model, *args)
        step = optimizers[0].step

        def look():
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
            step()

        optimizers[0].step = look
        return optimizers

    monkeypatch.setattr(train, "build_optimizers", watched)
    options = ["--phase=1", "--steps=3", "--lr=1e-4"]
    whole = [x["grad_norm"] for x in run(*options, "--batch_size=8", out="whole") if "loss" in x]
    parts = [x["grad_norm"] for x in run(*options, "--batch_size=2", "--grad_accum=4", out="parts") if "loss" in x]
    assert parts == pytest.approx(whole, rel=0.01) and max(whole) > 1.1
    assert norms == pytest.approx([min(norm, 1.0) for norm in whole + parts], rel=0.01)


def test_speed_mfu_and_price_are_of_this_run(run, capsys, tmp_path):
    lines = [x for x in run("--phase=1", "--steps=4", "--price=3.6e6") if "loss" in x]  # 1,000 dollars a second
    dollars = [float(number) for number in re.findall(r"\$(\d+\.\d\d)", capsys.readouterr().out)]
    assert len(dollars) == 4 and all(0 <= cost - 1000 * x["seconds"] + 1 < 20_000 * x["seconds"] for cost, x in zip(dollars, lines))
    config = flow.FlowConfig(**load_checkpoint(tmp_path / "run/phase1.pt")["config"])
    for line in lines:
        assert line["mfu"] == pytest.approx(config.flops_per_token(32) * line["tokens_per_s"] / 1e12, rel=0.01, abs=1e-4)
    assert lines[-1]["tokens"] / lines[-1]["seconds"] == pytest.approx(4 / sum(1 / x["tokens_per_s"] for x in lines), rel=0.05)


def test_the_best_weights_are_those_with_the_lowest_validation_loss(run, monkeypatch, tmp_path):
    losses = iter([(3.0, 1.0), (2.0, 0.7), (4.0, 1.3)])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    run("--phase=1", "--steps=3", "--eval_interval=1")
    assert load_checkpoint(tmp_path / "run/phase1_best.pt")["step"] == 2 and load_checkpoint(tmp_path / "run/phase1.pt")["best"] == 2.0


def test_checkpointing_is_passed_on(run, monkeypatch):
    calls, original = [], flow.checkpoint
    monkeypatch.setattr(flow, "checkpoint", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    options = ["--phase=1", "--steps=1"]
    plain = run(*options, out="plain")
    assert not calls
    assert run(*options, "--checkpointing", out="again")[0]["loss"] == plain[0]["loss"] and len(calls) == 2


def test_pulse_pays_for_its_spikes(run):
    fired = []
    for penalty in (0, 20):
        last = run("--phase=1", "--steps=30", f"--rate_penalty={penalty}", out=f"pays_{penalty}", sizes=PULSE)[-1]
        fired.append(sum(sum(block) if isinstance(block, list) else block for block in last["spikes"]))
    assert fired[1] < 0.8 * fired[0], fired


def test_a_run_whose_gradients_burst_leaves_nothing_behind(run, monkeypatch, tmp_path):
    """Whatever the loss of that step says: an infinite gradient, clipped, makes the weights NaN."""
    norm = torch.nn.utils.clip_grad_norm_
    steps = []

    def bursts(parameters, limit):
        steps.append(1)
        parameters = list(parameters)
        if len(steps) == 3:
            parameters[0].grad[0, 0] = math.inf
        return norm(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", bursts)
    with pytest.raises(InputError, match=r"the gradient is inf at step 3, the loss \d.*--fresh and a lower --lr than 0.004"):
        run("--phase=1", "--steps=3", "--save_interval=2")
    assert [file.name for file in (tmp_path / "run").glob("*.pt")] == ["last.pt"] and load_checkpoint(tmp_path / "run/last.pt")["step"] == 2
    steps += [1] * 9
    with pytest.raises(InputError, match="the gradient is nan at step .* and a lower --lr than 1000000000.0$"):
        run("--phase=1", "--steps=5", "--lr=1e9", out="fast")
    with pytest.raises(InputError, match="the gradient is .* and a lower --lr than 0.004 or --rate_penalty$"):
        run("--phase=1", "--steps=5", "--rate_penalty=1e30", out="dear", sizes=PULSE)
    assert not list((tmp_path / "fast").glob("*.pt"))


def test_weights_of_another_tokenizer_are_refused(run, finished, tmp_path):
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run/phase1.pt", load_checkpoint(finished / "phase1.pt") | {"tokenizer": "another"})
    with pytest.raises(InputError, match="phase1.pt was trained with another tokenizer than that of"):
        run("--phase=2", "--steps=1")


def test_a_run_can_start_from_another_s_weights(run, finished, tmp_path):
    log = run(f"--init={finished}", "--phase=1", "--steps=2", "--lr=1e-12", "--weight_decay=0")
    first, began = load_checkpoint(tmp_path / "run/phase1.pt"), load_checkpoint(finished / "phase3.pt")
    for name, weight in began["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-5, atol=1e-9)
    assert log[-1]["tokens"] == first["tokens"] == 2 * 4 * 32 and first["settings"]["init"] == str(finished)
    assert [line["step"] for line in log] == [0, 1, 2, 2]  # evaluated before the first step too, and with these rates as good as after
    assert log[0]["val_loss"] == pytest.approx(log[-1]["val_loss"], abs=1e-4)
    elsewhere = tmp_path / "elsewhere.pt"
    save_checkpoint(elsewhere, began)
    with pytest.raises(InputError, match="phase1.pt was trained with other settings .init is .* there, .*elsewhere.pt here"):
        run(f"--init={elsewhere}", "--phase=1", "--steps=2", "--lr=1e-12", "--weight_decay=0")
    del first["optimizer"]
    save_checkpoint(tmp_path / "run/phase1.pt", first)
    with pytest.raises(InputError, match="phase1.pt is a copy for sampling"):
        run(f"--init={finished}", "--steps=2", "--lr=1e-12", "--weight_decay=0")
    with pytest.raises(InputError, match=r"phase3.pt was trained with other settings .n_layer is 2 there, 3 here"):
        run(f"--init={finished}", "--n_layer=3", out="deeper")
    with pytest.raises(InputError, match="nowhere holds no checkpoint yet"):
        run("--init=nowhere", out="other")
    with pytest.raises(InputError, match="holds a flow: give --model=flow, or other first weights"):
        run(f"--init={finished}", sizes=PULSE, out="spiking")


def test_a_run_from_another_s_weights_goes_on_phase_by_phase(run, finished, tmp_path):
    """Given with every phase, --init is what the run began from; the weights of a later phase are those of the phase before."""
    options = [option for option in TINY if option not in SIZES]
    longer = "--max_seq_len=4096"  # as a later phase may want
    run(f"--init={finished}", "--phase=1", "--steps=2", sizes=options)
    log = run(f"--init={finished}", "--phase=2", "--steps=1", longer, "--lr=1e-12", "--weight_decay=0", sizes=options)
    one, two = (load_checkpoint(tmp_path / f"run/phase{n}.pt") for n in (1, 2))
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-9)
    assert [line["step"] for line in log if line["phase"] == 2] == [1, 1] and two["tokens"] > one["tokens"]
    assert two["config"]["max_seq_len"] == 4096
    with pytest.raises(InputError, match="phase2.pt is there, of a run that began from --init=.*: give that too, or name another --out"):
        run("--phase=3", "--steps=1")
    with pytest.raises(InputError, match="phase1.pt was trained with other settings .init is .* there, None here"):
        run("--phase=1", "--steps=2")
    run("--phase=1", "--steps=1", out="new")
    with pytest.raises(InputError, match="phase1.pt is there, of a run that began from new weights: leave --init out, or name another"):
        run(f"--init={finished}", "--phase=2", "--steps=2", out="new")


def test_first_weights_bring_their_sizes_along(run, finished, tmp_path):
    options = [option for option in TINY if option not in SIZES]
    run(f"--init={finished}", "--phase=1", "--steps=1", sizes=options)
    assert load_checkpoint(tmp_path / "run/phase1.pt")["config"] == load_checkpoint(finished / "phase3.pt")["config"]


@pytest.mark.parametrize("without", [None, "imported", "made_by"])
def test_first_weights_from_a_hugging_face_folder(run, finished, tmp_path, without):
    """If they came from elsewhere, or may have, that is not forgotten: the model has a licence of its own."""
    convert.main([f"--ckpt={finished}", "--to=hf", f"--out={tmp_path / 'hf'}"])
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["imported"] is False
    ours = without is None
    if not ours:
        del config["imported"]
        config.pop(without, None)
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    options = [option for option in TINY if option not in SIZES]
    run(f"--init={tmp_path / 'hf'}", "--phase=1", "--steps=2", "--lr=1e-12", "--weight_decay=0", sizes=options)
    first, began = load_checkpoint(tmp_path / "run/phase1.pt"), load_checkpoint(finished / "phase3.pt")
    for name, weight in began["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-5, atol=1e-9)
    assert first["imported"] is not ours and not load_checkpoint(finished / "phase3.pt")["imported"]
    convert.main([f"--ckpt={tmp_path / 'run'}", "--to=hf", f"--out={tmp_path / 'again'}"])
    run(f"--init={tmp_path / 'hf'}", "--phase=2", "--steps=1", sizes=options)
    assert load_checkpoint(tmp_path / "run/phase2.pt")["imported"] is not ours
    convert.main([f"--ckpt={tmp_path / 'again'}", "--to=hf", f"--out={tmp_path / 'thrice'}"])
    for name in ("again", "thrice"):
        assert ("license: mit" in (tmp_path / name / "README.md").read_text()) is ours
    assert "license: mit" in (tmp_path / "hf/README.md").read_text()


def test_first_weights_with_rows_that_have_no_token(run, finished, tmp_path):
    """As in many models from elsewhere, whose embeddings are padded to a round number."""
    checkpoint = load_checkpoint(finished / "phase3.pt")
    rows, config = checkpoint["config"]["vocab_size"] + 16, checkpoint["config"]
    for name in [n for n, w in checkpoint["weights"].items() if len(w) == config["vocab_size"]]:
        checkpoint["weights"][name] = torch.cat([checkpoint["weights"][name], torch.zeros(16, config["d_model"])])
    save_checkpoint(tmp_path / "padded.pt", checkpoint | {"config": config | {"vocab_size": rows}})
    log = run(f"--init={tmp_path / 'padded.pt'}", "--phase=1", "--steps=1")
    assert load_checkpoint(tmp_path / "run/phase1.pt")["config"]["vocab_size"] == rows and log[-1]["val_loss"] < math.log(rows)


def test_afterwards_ctrl_c_is_python_s_again(run):
    run("--phase=1", "--steps=1")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_first_weights_that_the_run_would_remove_are_refused(run, tmp_path):
    run("--phase=1", "--steps=1")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(InputError, match="--init=.*run lies in --out=.*run, which a run of its own needs: name another --out"):
        run(f"--init={tmp_path / 'run'}", "--fresh", "--phase=1", "--steps=2")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_the_batch_of_the_recipe(run, monkeypatch, capsys, ranks):
    """Within a tenth: base has 8 micro-steps, which three ranks cannot share evenly."""

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "StopNotice", stop)
    monkeypatch.setattr(device.Device, "__init__", several(ranks))
    monkeypatch.setattr(device.Device, "barrier", lambda self: None)
    monkeypatch.setattr(device.Device, "claim", lambda self, folder: None)  # nor given up
    monkeypatch.setattr(device.Device, "__exit__", lambda self, *failed: None)
    sizes = [option for option in TINY if not option.startswith("--batch_size")]
    for name in ("small", "base", "1b"):
        recipe = train.RECIPES[name]
        with pytest.raises(KeyboardInterrupt):
            run(f"--preset={name}", sizes=sizes)
        planned = int(re.search(r"plan: ([\d,]+) tokens", capsys.readouterr().out)[1].replace(",", ""))
        tokens = recipe.grad_accum * sum(steps * size for steps, size in zip(recipe.steps, recipe.micro_step_tokens))
        assert 0.9 * tokens <= planned <= tokens and (ranks == 3 or planned == tokens)


def several(ranks: int):
    """Device.__init__ of the first of so many ranks, none of which is there."""
    alone = device.Device.__init__

    def init(self, *arguments):
        alone(self, *arguments)
        self.ranks = ranks

    return init


def test_wandb_is_told_the_whole_plan_and_the_tokens(run, monkeypatch):
    told = {"logged": []}

    class Tracker:
        define_metric = staticmethod(lambda name, step_metric: told.update({name: step_metric}))
        log = staticmethod(told["logged"].append)
        finish = staticmethod(lambda: None)

    wandb = types.SimpleNamespace(init=lambda **options: told.update(options) or Tracker)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = run("--phase=2", "--steps=2", "--lr=0.003", "--wandb=mine")
    assert told["project"] == "mine" and told["name"] == told["id"] == "run" and told["resume"] == "allow" and told["*"] == "tokens"
    config = told["config"]
    assert config["phase2"] == {"seq_len": 32, "batch_size": 4, "grad_accum": 1, "steps": 2} and "phase1" not in config
    assert config["lr"] == 0.003 and config["n_layer"] == 2 and config["preset"] == "nano" and "data" in config
    json.dumps(config)
    assert told["logged"] == log


def test_quieten_and_shorten_that_would_do_nothing_are_refused(run):
    with pytest.raises(InputError, match="--quieten=0.5 acts at the start of phase 3, this command trains phase 1: leave it out"):
        run("--phase=1", "--quieten=0.5", sizes=PULSE)
    with pytest.raises(InputError, match="--shorten=0.5 acts at the start of phase 2, this command trains phase 3"):
        run("--phase=3", "--shorten=0.5", sizes=PULSE)
    with pytest.raises(InputError, match="--quieten=0.5 is for a trained Pulse, and .* holds no phase2.pt: train --phase=2 first"):
        run("--phase=3", "--quieten=0.5", sizes=PULSE)
    with pytest.raises(InputError, match="--shorten=0.5 is for a trained Pulse, and .* holds no phase1.pt: train --phase=1 first"):
        run("--phase=2", "--shorten=0.5", sizes=PULSE)


@pytest.mark.parametrize("hardware", [True, False])
def test_the_precision_can_be_chosen(run, monkeypatch, capsys, hardware):
    monkeypatch.setattr(device, "has_bf16", lambda _: hardware)
    sizes = [option for option in TINY if not option.startswith("--dtype")]
    losses = {}
    for name, options in {"default": [], "bf16": ["--dtype=bf16"], "fp32": ["--dtype=fp32"]}.items():
        losses[name] = run("--phase=1", "--steps=1", *options, out=name, sizes=sizes)[0]["loss"]
        said = "fp32" if name == "fp32" or (name == "default" and not hardware) else "bf16 matrix products over fp32 weights"
        said += ", which is only imitated here: fp32 is faster" * (name == "bf16" and not hardware)
        assert f"threads), {said}; peak" in capsys.readouterr().out
    assert losses["default"] == losses["bf16" if hardware else "fp32"] != losses["fp32" if hardware else "bf16"]
