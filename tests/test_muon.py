"""Muon against an SVD, against torch.optim.Muon, and two ranks against one."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import HERE, ROOT
from torch.optim._muon import _zeropower_via_newtonschulz as newton_schulz

import muon
from model import Flow, FlowConfig
from muon import Muon, build_optimizers, orthogonalise
from snn_model import Pulse, PulseConfig

TINY = FlowConfig(vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, d_model=32, head_dim=16, d_ff=80, window=8, global_every=3)


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48), (5, 24, 40), (1, 7)])
def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    X = orthogonalise(G).float()
    core = U.mT @ X @ V.mT  # in the basis of G's singular vectors the result is diagonal
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    large = S > 0.05 * S.amax(-1, keepdim=True)
    assert ((diagonal > 0.65) & (diagonal < 1.2))[large].all()
    assert (core - torch.diag_embed(diagonal)).abs().max() < 0.08  # bf16 noise
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape, dtype=torch.bfloat16))


def polynomial(G, coefficients, bound):
    """U p(S / bound) Vᵀ in fp64: what an iteration of these quintics is without rounding."""
    U, S, V = torch.linalg.svd(G.double(), full_matrices=False)
    x = S / bound(S)
    for a, b, c in coefficients:
        x = a * x + b * x**3 + c * x**5
    return U @ torch.diag(x) @ V


@pytest.mark.parametrize("shape", [(32, 32), (96, 40), (40, 96), (7, 1)])
def test_orthogonalise_is_its_polynomial_about_as_exactly_as_torch_s_is(shape):
    """bf16 rounds both; four steep steps may lose twice what five flat ones do, whatever the spectrum."""
    torch.manual_seed(0)
    U, S, V = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    for decay in (0.0, 0.5, 1.5):
        G = U @ torch.diag(S.numel() ** -torch.linspace(0, decay, S.numel())) @ V
        exact = polynomial(G, muon.NS_COEFFICIENTS, lambda S: S.pow(8).sum() ** 0.125 * 1.01)
        ours = (orthogonalise(G) - exact).norm() / exact.norm()
        assert (orthogonalise(G, torch.float32) - exact).norm() < 1e-4 * exact.norm()
        exact = polynomial(G, [(3.4445, -4.7750, 2.0315)] * 5, lambda S: S.norm())
        theirs = (newton_schulz(G, (3.4445, -4.7750, 2.0315), 5, 1e-7) - exact).norm() / exact.norm()
        assert ours < max(2 * theirs, 4e-3), (ours, theirs)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_orthogonalise_does_not_depend_on_the_scale(scale):
    G = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalise(G * scale), orthogonalise(G), atol=0.03, rtol=0)


def test_equals_torch_muon(monkeypatch):
    """In all but the polynomial: momentum, Nesterov, weight decay and scale."""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda G, *_: orthogonalise(G))
    torch.manual_seed(0)
    shapes = [(32, 32), (32, 32), (80, 32), (32, 80), (80, 32), (1, 9)]
    ours = [torch.randn(s).requires_grad_() for s in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    settings = dict(lr=0.02, momentum=0.95, weight_decay=0.1)
    a, b = Muon(ours, **settings), torch.optim.Muon(theirs, **settings, nesterov=True, ns_steps=5, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        for p, q, old in zip(ours, theirs, before):
            update = (p - old).norm()
            assert (p - q).norm() < 1e-3 * p.norm() and (p - q).norm() < 1e-3 * update
            with torch.no_grad():
                q.copy_(p)  # bf16 rounding of the batched and the single product differs; it must not add up here


def test_the_update_has_the_rms_of_adamw():
    p = torch.zeros(64, 256, requires_grad=True)
    p.grad = torch.randn(64, 256)
    Muon([p], lr=1.0, weight_decay=0.0).step()
    assert 0.15 < p.detach().square().mean().sqrt() < 0.25


def test_large_matrices_go_in_several_batches(monkeypatch):
    torch.manual_seed(0)
    shapes = [(16, 16)] * 5 + [(8, 32)] * 3
    grads = [torch.randn(s) for s in shapes]

    def updated(elements):
        monkeypatch.setitem(muon.BATCH_ELEMENTS, "cpu", elements)
        params = [torch.zeros(s, requires_grad=True) for s in shapes]
        optimizer = Muon(params, lr=0.1)
        for p, g in zip(params, grads):
            p.grad = g.clone()
        optimizer.step()
        return params, len(optimizer.batches)

    (whole, n_whole), (parts, n_parts) = updated(2**24), updated(2 * 256)
    assert (n_whole, n_parts) == (2, 5)
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_state_survives_saving():
    torch.manual_seed(0)

    def steps(optimizers, model, n, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()

    model = Flow(TINY)
    optimizers = build_optimizers(model, 0.01)
    steps(optimizers, model, 3, seed=1)
    twin = Flow(TINY)
    twin.load_state_dict(model.state_dict())
    restored = build_optimizers(twin, 0.01)
    for new, old in zip(restored, optimizers):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    steps(optimizers, model, 2, seed=2)
    steps(restored, twin, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_every_parameter_has_exactly_one_optimizer():
    model = Flow(TINY)
    muon, adamw = build_optimizers(model, 0.01)
    matrices = [p for g in muon.param_groups for p in g["params"]]
    rest = [p for g in adamw.param_groups for p in g["params"]]
    assert {id(p) for p in matrices} | {id(p) for p in rest} == {id(p) for p in model.parameters()}
    assert len(matrices) == 3 * 7 and len(matrices) + len(rest) == len(list(model.parameters()))
    assert [g["weight_decay"] > 0 for g in adamw.param_groups] == [True, False]
    assert all(p.ndim == 1 for p in adamw.param_groups[1]["params"])
    for group in adamw.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.95), 1e-10, 0.01)


def test_muon_gets_pulses_big_matrices_and_nothing_small_decays():
    sizes = dict(vocab_size=61, n_layer=2, d_model=16, d_hidden=24, d_ff=20, n_head=2, memory_every=2)
    model = Pulse(PulseConfig(**sizes))
    names = {id(p): name for name, p in model.named_parameters()}
    linears = ("in_proj", "gate_proj", "out_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    expected = {"input_map", *(name for name in names.values() if "." in name and name.split(".")[-2] in linears)}
    assert {names[id(p)] for p in model.muon_params()} == expected and len(expected) == 15
    decaying = {
        names[id(p)] for optimizer in build_optimizers(model, 0.01) for group in optimizer.param_groups
        if group["weight_decay"] for p in group["params"]
    }  # fmt: skip
    more = ("token_embedding.weight", "layers.1.memory.decay.weight", "layers.1.memory.write.weight")
    assert decaying == expected | set(more)
    assert sum(name.endswith("leak") for name in names.values()) == 4  # betas are learned: two blocks, q and k


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="shape .3,.: give it to AdamW"):
        Muon([torch.zeros(3, requires_grad=True)], lr=0.1)


WORKER = """
import sys, torch
from device import Device
from muon import Muon
with Device("cpu") as device:
    torch.manual_seed(0)
    shapes = [(16, 16)] * 5 + [(8, 24)] * 2 + [(24, 8)]
    params = [torch.randn(s).requires_grad_() for s in shapes]
    optimizer = Muon(params, lr=0.05)
    for step in range(4):
        if step == 2:  # a state that went through saving must go on the same way
            state = optimizer.state_dict()
            optimizer = Muon(params, lr=0.05)
            optimizer.load_state_dict(state)
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    held = sum("momentum" in optimizer.state[p] for p in params)
    result = {"params": [p.detach() for p in params], "state": optimizer.state_dict(), "held": held}
    torch.save(result, f"{sys.argv[1]}/{device.rank}.pt")
    device.barrier()
"""


def test_two_ranks_equal_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    results = {}
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            "--master_port=0",
            *HERE,
            script,
            folder,
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        results[ranks] = [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(ranks)]
    one = results[1][0]
    for ranks in (2, 3):
        for result in results[ranks]:
            for a, b in zip(result["params"], one["params"]):
                torch.testing.assert_close(a, b, atol=4e-3, rtol=0)  # bf16 products of other batch sizes round differently
            for a, b in zip(result["state"]["momentum"], one["state"]["momentum"]):
                torch.testing.assert_close(a, b)
        assert all(torch.equal(a, b) for r in results[ranks][1:] for a, b in zip(results[ranks][0]["params"], r["params"]))
        assert sum(r["held"] for r in results[ranks]) == 8 and max(r["held"] for r in results[ranks]) < 8, json.dumps(
            [r["held"] for r in results[ranks]]
        )
