"""convert.py: the device's networks against the models, whole packages read back and run, the mistakes that conversion is known
for put back in, and what bad input gets. No Mac is needed: mil_numpy.py runs the packages."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import convert
import coreml_models
import coreml_verify
import predict
import prepare
from checkpoint import load_model, save_checkpoint
from coreml_models import FlowOnDevice, PulseOnDevice, rms_norm
from mil_numpy import CONSTEXPR, OPERATIONS, Package, unpack
from model import Flow, FlowConfig, generate
from scripts import InputError
from snn_model import Pulse, PulseConfig

CONTEXT = 192
SIZES = dict(vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, d_model=64, head_dim=16, d_ff=96, window=40, global_every=2)
FLOW = FlowConfig(**SIZES, max_seq_len=CONTEXT)
PULSE = PulseConfig(vocab_size=300, n_layer=3, d_model=64, d_hidden=96, d_ff=64, n_head=2)


def lively(model):
    """Larger weights than at the start, so that attention and memory matter and an error in them shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if isinstance(model, Flow) and p.ndim == 2:
                p.mul_(6)
            elif name.endswith(("decay.weight", "write.weight")):
                p.normal_(std=0.2)
            elif p.ndim == 1 and "leak" not in name:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(200)]
    made = prepare.train_tokenizer([" ".join(words[i] for i in rng.zipf(1.4, 5000) % 200)], 300)
    assert made.get_vocab_size() == 300
    return made


@pytest.fixture(scope="module")
def runs(tokenizer, tmp_path_factory):
    """A folder with a run of each model, random but lively."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("runs")
    for kind, model in (("flow", Flow(FLOW)), ("pulse", Pulse(PULSE))):
        (out / kind).mkdir()
        lively(model)
        content = {"model": kind, "config": dataclasses.asdict(model.config), "weights": model.state_dict(), "phase": 1, "step": 7}
        save_checkpoint(out / kind / "phase1.pt", content | {"tokenizer": tokenizer.to_str()})
    return out


@pytest.fixture
def call(runs, tmp_path, monkeypatch):
    """convert.main with options, in a folder of its own -> the folder it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(kind, *options):
        convert.main([f"--ckpt={runs / kind}", f"--out={tmp_path / 'made'}", *options])
        return tmp_path / "made"

    return run


def packages_and_contract(folder):
    contract = json.loads((folder / "config.json").read_text())
    return [Package(folder / part["file"]) for part in contract["packages"]], contract


def test_verification_reads_validation_text_of_the_phase_or_writes_its_own(runs, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, _, checkpoint = load_model(runs / "flow" / "phase1.pt")
    fingerprint = prepare.tokenizer_fingerprint(checkpoint["tokenizer"])
    phases = {str(n): {"val": {"shards": [f"{n}.bin"]}} for n in (1, 2, 3)}
    (tmp_path / "meta.json").write_text(json.dumps({"fingerprint": "", "vocab_size": 300, "phases": phases}))
    for n in (1, 2, 3):
        prepare.write_shard(tmp_path / f"{n}.bin", np.full(200 if n < 3 else 20, n), 300, 400, fingerprint)
    for phase, token in ((1, 1), (2, 2), (4, 2)):  # 4 is what distill.py writes
        assert set(coreml_verify.validation_text(tmp_path, checkpoint | {"phase": phase}, model, tokenizer).tolist()) == {token}
    with pytest.raises(InputError, match="3.bin holds 20 tokens, verification needs 192"):
        coreml_verify.validation_text(tmp_path, checkpoint | {"phase": 3}, model, tokenizer)
    text = coreml_verify.validation_text(None, checkpoint, model, tokenizer)
    assert len(text) == CONTEXT and len(set(text.tolist())) > 1
    assert "text that the model writes itself (data/builtin holds no prepared data" in capsys.readouterr().out


# ---- the networks for the device, in PyTorch ----


@pytest.mark.parametrize("target", ["ane", "gpu"])
@pytest.mark.parametrize("kind", ["flow", "pulse"])
def test_the_networks_for_the_device_compute_the_models(runs, kind, target):
    """Two networks of some of the layers each, fed by Host: prefill and decode mixed, well beyond the window."""
    model, _, _ = load_model(runs / kind / "phase1.pt")
    Device, Q = (FlowOnDevice, 32) if kind == "flow" else (PulseOnDevice, 8)
    dtype = torch.float32 if kind == "flow" else torch.float64  # in fp32 a membrane could lie on the other side of its threshold
    model = model.to(dtype)
    lengths = {"prefill": Q, "decode": 1}
    nets = [{n: Device(model, target, q, CONTEXT, *part).to(dtype) for n, q in lengths.items()} for part in ((0, 1), (1, 3))]
    caches = [[torch.zeros(shape, dtype=dtype) for shape in pair["decode"].cache_shapes()] for pair in nets]
    parts = [{"functions": {n: net.input_shapes() for n, net in pair.items()}, "caches": {}, "logits": ["logits_0"]} for pair in nets]
    contract = {"target": target, "stateful": True, "context": CONTEXT, "prefill": Q, "packages": parts}
    contract["model"] = dataclasses.asdict(model.config)

    def run(number, function, inputs):
        outputs, caches[number] = nets[number][function](*(torch.from_numpy(x) for x in inputs.values()), *caches[number])
        return {"hidden" if number == 0 else "logits_0": outputs[0].numpy()}

    table = (model.input_table() if kind == "pulse" else model.token_embedding.weight).detach().numpy()
    host = predict.Host(contract, table, run, np.dtype(str(dtype).split(".")[1]))
    ids = torch.randint(0, 300, (1, 170))
    with torch.inference_mode():
        expected = model(ids)[0][0].numpy()
        position = 0
        for n in (Q, 1, 2 * Q + 3, 1, 1, 40):
            position += n
            logits = host.feed(ids[0, position - n : position].tolist())
            assert np.abs(logits - expected[position - 1]).max() < 1e-5


def test_rms_norm_in_numbers_that_fp16_holds():
    x = torch.randn(4, 64) * torch.tensor([[1e4], [1.0], [1e-3], [0.0]])
    expected = torch.nn.functional.rms_norm(x, (64,), eps=1e-6)
    root = torch.tensor([1e-3])
    assert torch.allclose(rms_norm(x, root, 1), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(rms_norm(x.half(), root.half(), 1).float(), expected, rtol=2e-2, atol=2e-3)  # 1e4² would be infinite
    assert torch.allclose(rms_norm(x, root * 8, 1, total=True), expected / 8, rtol=1e-5, atol=1e-6)


# ---- the interpreter ----


def test_operations_of_the_interpreter_are_torchs():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, 1, 5, generator=g), torch.randn(2, 8, 5, 6, generator=g)
    w, q, k = torch.randn(4, 8, 1, 1, generator=g), torch.randn(1, 2, 3, 8, generator=g), torch.randn(1, 2, 7, 8, generator=g)
    mask, F = torch.randn(1, 1, 3, 7, generator=g), torch.nn.functional
    calls = [
        ("conv", dict(x=x, weight=w, strides=np.ones(2), pad=np.zeros(4)), F.conv2d(x, w)),
        ("linear", dict(x=x[:, :, 0].mT, weight=w[:, :, 0, 0]), F.linear(x[:, :, 0].mT, w[:, :, 0, 0])),
        ("matmul", dict(x=y, y=x, transpose_x=True, transpose_y=True), None),
        ("softmax", dict(x=x, axis=1), x.softmax(1)),
        ("silu", dict(x=x * 20), F.silu(x * 20)),
        ("sigmoid", dict(x=x * 20), (x * 20).sigmoid()),
        ("rsqrt", dict(x=x.abs(), epsilon=0.5), (x.abs() + 0.5).rsqrt()),
        ("inverse", dict(x=x.abs(), epsilon=0.5), 1 / (x.abs() + 0.5)),
        ("clip", dict(x=x, alpha=-0.5, beta=1), x.clamp(-0.5, 1)),
        ("reduce_mean", dict(x=x, axes=[1], keep_dims=True), x.mean(1, keepdim=True)),
        ("scaled_dot_product_attention", dict(query=q, key=k, value=k, attn_mask=mask), F.scaled_dot_product_attention(q, k, k, mask)),
    ]
    for name, arguments, expected in calls:
        if name == "matmul":
            arguments["y"] = torch.randn(2, 8, 3, 5, generator=g)
            expected = y.mT @ arguments["y"].mT
        ours = OPERATIONS[name](**{n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()})
        assert np.allclose(ours, expected.numpy(), atol=1e-5), name


def test_slices_of_the_interpreter():
    x = np.arange(24).reshape(2, 3, 4)
    where = dict(begin=[0, 1, 2], end=[0, 3, 3], begin_mask=[True, False, False], end_mask=[True, False, False])
    assert np.array_equal(OPERATIONS["slice_by_index"](x, **where), x[:, 1:3, 2:3])
    assert OPERATIONS["slice_by_index"](x, begin=[1, 0, 0], end=[2, 3, 4], squeeze_mask=[True, False, False]).shape == (3, 4)
    changed = OPERATIONS["slice_update"](x, np.full((2, 2, 1), -1), **where)
    assert (changed[:, 1:3, 2] == -1).all() and (changed != x).sum() == 4 and x.min() == 0
    with pytest.raises(ValueError, match="beyond the end"):
        OPERATIONS["slice_update"](x, np.zeros((2, 3, 2)), begin=[0, 0, 3], end=[2, 3, 5])


@pytest.mark.parametrize("dtype, bits, low, high", [("UINT4", 4, 0, 16), ("UINT6", 6, 0, 64), ("INT4", 4, -8, 8), ("UINT1", 1, 0, 2)])
def test_packed_integers_come_out_as_they_went_in(dtype, bits, low, high):
    values = np.random.default_rng(0).integers(low, high, 24)
    stream = 0
    for i, value in enumerate(values):  # the lowest bits first, over the bytes' ends
        stream |= (int(value) % (1 << bits)) << (bits * i)
    raw = np.frombuffer(stream.to_bytes(24 * bits // 8, "little"), np.uint8)
    assert np.array_equal(unpack(raw, dtype, (4, 6)), values.reshape(4, 6))


def test_decompression_against_loops():
    rng = np.random.default_rng(0)
    data, scale, lut = rng.integers(-8, 8, (4, 6)), rng.random((4, 3)), rng.random((2, 1, 16, 1))
    shift = CONSTEXPR["constexpr_blockwise_shift_scale"](data, scale, offset=np.ones((4, 3)))
    palette = CONSTEXPR["constexpr_lut_to_dense"](data + 8, lut)
    for i in range(4):
        for j in range(6):
            assert shift[i, j] == pytest.approx((data[i, j] - 1) * scale[i, j // 2], rel=1e-6)
            assert palette[i, j] == lut[i // 2, 0, data[i, j] + 8, 0]


def test_a_palette_is_as_good_as_can_be():
    weight = np.random.default_rng(0).standard_normal(100_000).reshape(100, 1000)
    for nbits, distortion in ((2, 0.1175), (4, 0.009497)):  # of the best quantiser of a Gaussian (Max 1960)
        centres, indices = convert.palette(weight, nbits)
        assert np.square(centres[indices] - weight.ravel()).mean() == pytest.approx(distortion, rel=0.04)
        nearest = np.abs(weight.ravel()[:500, None] - centres).argmin(1)
        assert np.array_equal(indices[:500], nearest)
    centres, indices = convert.palette(np.zeros((4, 4), np.float16), 4)  # a matrix at its start may be all zero
    assert (centres[indices] == 0).all() and centres.dtype == np.float16


# ---- whole packages ----


def test_a_package_of_flow_is_verified_and_complete(call, runs, capsys):
    folder = call("flow")
    names = ["Flow.mlpackage", "config.json", "embeddings.bin", "example.swift", "predict.py", "report.json", "tokenizer.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert [p.name for p in folder.parent.iterdir()] == ["made"], "something was left behind"
    report = json.loads((folder / "report.json").read_text())
    assert report["exact"]["max_logit_difference"] < 1e-4 and report["exact"]["same_greedy_tokens"] == 64
    assert report["exact"]["prompt_tokens"] > FLOW.window + 32 and report["exact"]["prompt_tokens"] % 32
    assert report["rounded"]["kl"] < 1e-3 and report["rounded"]["argmax_agreement"] > 0.97
    assert report["lint"] == {"Flow.mlpackage": []}
    assert "exact (float32): logits within" in capsys.readouterr().out

    (package,), contract = packages_and_contract(folder)
    meta = package.spec.description.metadata
    assert json.loads(meta.userDefined["contract"]) == contract and meta.shortDescription.startswith("Flow")
    assert meta.userDefined["tokenizer"] == (folder / "tokenizer.json").read_text() and meta.license == "MIT"
    assert {f.name for f in package.spec.description.functions} == {"prefill", "decode"}
    assert all(i.shortDescription for f in package.spec.description.functions for i in [*f.input, *f.output, *f.state])
    # The two functions share their weights: hardly more than the model's own.
    assert package.blob.size < 2 * FLOW.num_params() * 1.1

    # Greedy text, all by what lies in the folder, is PyTorch's with these weights.
    model, _, _ = load_model(runs / "flow" / "phase1.pt")
    for p in model.parameters():
        p.data = p.data.half().float()
    prompt = list(range(5, 60))
    machine, _ = coreml_verify.host(folder, contract, [package], False, np.float32)
    text = list(machine.generate(prompt, 64, predict.sampler(0, seed=0)))
    theirs = [int(t) for t in generate(model, [prompt], 64, temperature=0, stop_ids=contract["stop_ids"]) if t >= 0]
    assert text == [t for t in theirs if t not in contract["stop_ids"]]  # the host keeps the token that ends it to itself
    with pytest.raises(ValueError, match="convert with a larger --context"):
        machine.feed(prompt * 3)


@pytest.mark.parametrize(
    "kind, options, problems",
    [
        ("flow", ["--compress=int8", "--chunks=3"], []),
        ("flow", ["--compress=palette4", "--group_size=8", "--no_state"], []),
        ("flow", ["--target=gpu", "--compress=int4"], ["weights with a scale per block"]),
        ("pulse", ["--compress=palette6"], []),
        ("pulse", ["--target=gpu", "--no_state", "--chunks=2"], []),
    ],
)
def test_every_kind_of_package_is_exact_but_for_its_weights(call, monkeypatch, capsys, kind, options, problems):
    monkeypatch.setattr(coreml_verify, "RUINED_LIMIT", (9.0, 0.0, 9.0))  # random weights have no structure that palettes could keep
    monkeypatch.setattr(coreml_verify, "SPIKING_LIMIT", (9.0, 0.0, 9.0))
    folder = call(kind, *options)
    report = json.loads((folder / "report.json").read_text())
    assert report["exact"]["max_logit_difference"] < 1e-4 and report["exact"]["same_greedy_tokens"] == 64
    for lines in report["lint"].values():
        assert all(line.startswith("states whose") or any(p in line for p in problems) for line in lines)
    assert all(any(p in str(report["lint"]) for p in problems) for p in problems)
    packages, contract = packages_and_contract(folder)
    assert contract["stateful"] == ("--no_state" not in options)
    assert bool(packages[0].function("decode").states) == contract["stateful"]
    errors = report["compression"]["errors"]
    if any("compress" in o for o in options):
        assert errors and max(errors.values()) < 0.3
        assert not any("norm" in name or "gain" in name or "leak" in name for name in errors)
        assert "left in fp16" in capsys.readouterr().out
    else:
        assert not errors


def test_a_ruined_model_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.setattr(coreml_verify, "RUINED_LIMIT", (1e-9, 0.0, 9.0))
    with pytest.raises(InputError, match="too far from the model: KL .* it was not written; try a weaker --compress"):
        call("flow", "--compress=palette4")
    assert list(tmp_path.iterdir()) == []


# ---- mistakes put back in ----


def dropped_state_write(monkeypatch):
    original = FlowOnDevice.remember

    def remember(self, layer, cache, new, position):
        if self.config.is_global(layer) or self.Q > 1:
            return original(self, layer, cache, new, position)
        _, seen = original(self, layer, cache, new, position)
        return cache, seen  # the rolled cache is looked at but not kept

    monkeypatch.setattr(FlowOnDevice, "remember", remember)


def plain_index(monkeypatch):
    """`cache[:, :, :, position] = x` is dropped by coremltools, or refused."""

    def remember(self, layer, cache, new, position, original=FlowOnDevice.remember):
        if not self.config.is_global(layer) or self.Q > 1:
            return original(self, layer, cache, new, position)
        cache[:, :, :, position] = new
        return cache, cache

    monkeypatch.setattr(FlowOnDevice, "remember", remember)


def baked_index(monkeypatch):
    def remember(self, layer, cache, new, position, original=FlowOnDevice.remember):
        return original(self, layer, cache, new, None if position is None else int(position))

    monkeypatch.setattr(FlowOnDevice, "remember", remember)


def mask_one_too_wide(monkeypatch):
    original = predict.Host.inputs

    def inputs(self, ids, shapes):
        made = original(self, ids, shapes)
        if "mask_window" in made and len(ids) > 1:
            made["mask_window"][..., 1:-1][made["mask_window"][..., 2:] == 0] = 0
        return made

    monkeypatch.setattr(predict.Host, "inputs", inputs)


def late_angles(monkeypatch):
    original = predict.Host.inputs

    def inputs(self, ids, shapes):
        made = original(self, ids, shapes)
        return made | {"sin": made["sin"] * np.float32(1.01)}

    monkeypatch.setattr(predict.Host, "inputs", inputs)


def norm_without_care(monkeypatch):
    """1 / m becomes Core ML's inverse, which adds 1e-4."""

    def norm(x, root_eps, axis, total=False):
        m = torch.maximum(x.abs().amax(axis, keepdim=True), root_eps)
        y, small = x * (1.0 / m), root_eps / m
        squares = (y * y).sum(axis, keepdim=True) if total else (y * y).mean(axis, keepdim=True)
        return x / m * torch.rsqrt(squares + small * small)

    monkeypatch.setattr(coreml_models, "rms_norm", norm)


@pytest.mark.parametrize("mistake", [dropped_state_write, plain_index, baked_index, mask_one_too_wide, late_angles, norm_without_care])
def test_a_mistake_in_the_conversion_of_flow_is_found(call, tmp_path, monkeypatch, mistake):
    mistake(monkeypatch)
    with pytest.raises((InputError, ValueError, RuntimeError)) as problem:
        call("flow")
    if mistake is not plain_index:
        assert "the package differs from PyTorch" in str(problem.value)
    assert list(tmp_path.iterdir()) == [], "a package was left behind"


def test_a_lost_membrane_of_pulse_is_found(call, tmp_path, monkeypatch):
    original = coreml_models.NeuronOnDevice.forward

    def forward(self, x, mem=None, gate=None):
        spikes, after = original(self, x, mem, gate)
        return spikes, after if after is None or self.Q > 1 else mem + 0 * after

    monkeypatch.setattr(coreml_models.NeuronOnDevice, "forward", forward)
    with pytest.raises(InputError, match="the package differs from PyTorch"):
        call("pulse")
    assert list(tmp_path.iterdir()) == []


def test_lint_finds_what_the_neural_engine_does_not_run(tmp_path):
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    types = ct.converters.mil.mil.types

    @mb.program(input_specs=[mb.TensorSpec((1, 64)), mb.TensorSpec((1,), dtype=types.int32)], opset_version=ct.target.iOS18)
    def program(x, i):
        table = mb.gather(x=np.ones((20_000, 64), np.float32), indices=i, axis=0)
        return mb.select(cond=mb.greater(x=x, y=np.float32(0)), a=x, b=table)

    with convert.quiet():
        kind = dict(minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32)
        ct.convert(program, **kind, skip_model_load=True).save(str(tmp_path / "bad.mlpackage"))
    package = Package(tmp_path / "bad.mlpackage")
    dimensions = package.operations("main")[-1].outputs[0].type.tensorType.dimensions  # coremltools would not write these
    for _ in range(4):
        dimensions.add().constant.size = 1
    dimensions.add().unknown.SetInParent()
    text = "\n".join(coreml_verify.lint(package, {"sum": 1e6}))
    problems = ["gather", "float32 tensors", "bool tensors", "more than 5 dimensions", "not fixed", "above 16,384", "fp16 cannot hold: 1"]
    assert all(problem in text for problem in problems), text


# ---- bad input ----


@pytest.mark.parametrize(
    "options, match",
    [
        (["--ckpt=nothing"], "holds no checkpoint yet"),
        (["--target=tpu"], "invalid choice: 'tpu'"),
        (["--context=100000"], "--context=100000 must be between 128 and 192"),
        (["--context=64"], "--context=64 must be between 128 and 192"),
        (["--chunks=9"], "--chunks=9 must be between 1 and the model's 3 layers"),
        (["--compress=int4"], "--target=gpu"),
        (["--group_size=8"], "needs --compress=palette4"),
        (["--push=me/it"], "add --to=hf"),
        (["--to=hf", "--compress=int8"], "--compress=int8 is for Core ML packages"),
        (["--context=0"], "--context=0 must be between 128 and 192"),
        (["--compress=palette4", "--group_size=7"], "--group_size=7 divides the rows of no matrix: choose a divisor of 64"),
        (["--data=nowhere"], "nowhere holds no prepared data"),
        (["--out=taken"], "taken exists: add --overwrite"),
        (["--out=taken", "--overwrite"], "taken was not made by convert.py"),
    ],
)
def test_bad_input_gets_one_line(runs, tmp_path, monkeypatch, capsys, options, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    ckpt = [] if options[0].startswith("--ckpt") else [f"--ckpt={runs / 'flow'}"]
    with pytest.raises(SystemExit) as end:
        prepare.run(lambda: convert.main([*ckpt, *options]))
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("parameters, phase 1")]
    assert end.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and match in errors[0], errors
    assert [p.name for p in tmp_path.iterdir()] == ["taken"] and (tmp_path / "taken" / "mine.txt").exists()


def test_the_script_as_a_user_runs_it(runs, tmp_path):
    for options, code in ((["--context=128", "--out=made"], 0), (["--context=128", "--out=made"], 2)):
        command = [sys.executable, str(ROOT / "convert.py"), f"--ckpt={runs / 'flow'}", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        lines = done.stderr.splitlines()
        assert done.returncode == code and not any("Traceback" in line or "coremltools" in line for line in lines), done.stderr
        assert len(lines) == 2 and lines[0].endswith("parameters, phase 1")
        assert lines[1].startswith("converted in" if code == 0 else "error: made exists: add --overwrite")
    assert (tmp_path / "made" / "report.json").exists()
    # What goes to the Mac needs nothing of the project.
    command = [sys.executable, "-I", "made/predict.py", "--help"]
    assert "--placement" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout
    for option, message in (("--temperature=-1", "must be 0 or more"), (f"--prompt={'x' * 999}", "the prompt has 1,000 tokens")):
        done = subprocess.run([*command[:-1], option], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2 and message in done.stderr
    for name in ("embeddings.bin", "tokenizer.json", "config.json"):
        os.truncate(tmp_path / "made" / name, 100)
        done = subprocess.run(command[:-1], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2 and "is not a whole folder of convert.py" in done.stderr and "Traceback" not in done.stderr


def test_a_broken_checkpoint_and_a_full_disk(runs, tmp_path, monkeypatch):
    broken = tmp_path / "phase1.pt"
    broken.write_bytes((runs / "flow" / "phase1.pt").read_bytes()[:5000])
    with pytest.raises(InputError, match="cut short or not a checkpoint"):
        convert.main([f"--ckpt={broken}"])
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="MB free that conversion needs"):
        convert.main([f"--ckpt={runs / 'flow'}", f"--out={tmp_path / 'made'}"])
    def fills_the_disk(*args):
        monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
        raise RuntimeError("write failed")

    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9}))
    monkeypatch.setattr(convert, "write_package", fills_the_disk)
    with pytest.raises(InputError, match="is full: free some space"):
        convert.main([f"--ckpt={runs / 'flow'}", f"--out={tmp_path / 'made'}"])
    assert [p.name for p in tmp_path.iterdir()] == ["phase1.pt"]


def test_a_damaged_package_is_not_read(call):
    folder = call("pulse", "--overwrite")
    weights = folder / "Pulse.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    weights.write_bytes(weights.read_bytes()[:-4000])
    with pytest.raises(ValueError, match="weight.bin is cut short|no weights at offset"):
        Package(folder / "Pulse.mlpackage").function("decode")
    with pytest.raises(ValueError, match="not an .mlpackage"):
        Package(folder)
