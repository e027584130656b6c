"""What only a GPU computes: skipped where there is none."""

import copy

import pytest
import torch

import model as flow
from bench import TINY_PULSE
from checkpoint import for_writing
from device import Device
from measure import TINY
from membranes import chunked_scan, scan
from model import Flow, generate
from muon import build_optimizers
from snn_model import Pulse
from train import compile_parts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NETWORKS = {"flow": lambda: Flow(TINY), "pulse": lambda: Pulse(TINY_PULSE)}


@pytest.mark.parametrize(("H", "K", "D", "T", "window"), [(4, 2, 32, 300, None), (4, 2, 32, 300, 128), (16, 8, 128, 1000, 128)])
def test_flash_attention(H, K, D, T, window):
    """Against the CPU's in fp64, with its gradients: bf16 is within a hundredth."""
    q, k, v = (torch.randn(2, T, h, D, dtype=torch.float64).transpose(1, 2) for h in (H, K, K))
    grad, results = torch.randn_like(q), []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        inputs = [x.to(device, dtype).detach().requires_grad_() for x in (q, k, v)]
        assert flow.flashes(*inputs[:2]) == (device == "cuda")
        out = flow.causal_attention(*inputs, window)
        out.backward(grad.to(device, dtype))
        results.append([out, *(x.grad for x in inputs)])
    for expected, got in zip(*results):
        assert (expected - got.cpu().double()).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_gradients_as_on_a_cpu(name):
    ours = NETWORKS[name]().double()
    theirs, x = copy.deepcopy(ours).cuda(), torch.randint(ours.config.vocab_size, (2, 101))
    for network, idx in ((ours, x), (theirs, x.cuda())):
        network(idx[:, :-1], idx[:, 1:])[1].backward()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert (p.grad - q.grad.cpu()).norm() <= 1e-6 * p.grad.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_writing(name):
    """In the precision of sample.py, a batch of unequal prompts: Flow in bf16, Pulse in fp32."""
    network = for_writing(NETWORKS[name]().eval().cuda())
    assert next(network.parameters()).dtype == (torch.bfloat16 if name == "flow" else torch.float32)
    steps = torch.stack(list(generate(network, [[1, 2, 3], [4, 5, 6, 7, 8]], 6, temperature=0)))
    assert (steps >= 0).sum(0).tolist() == [6, 6]


@pytest.mark.parametrize(("B", "T", "N"), [(2, 1, 5), (3, 70, 40), (2, 2048, 100)])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_scan_of_a_gpu(B, T, N, reverse):
    x, beta, carry = (torch.rand(shape, dtype=torch.float64, device="cuda") for shape in ((B, T, N), (B, T, N), (B, N)))
    expected = chunked_scan(x.cpu(), beta.cpu(), carry.cpu(), reverse)
    torch.testing.assert_close(scan(x, beta, carry, reverse).cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_blocks_train_like_plain_ones(name):
    device, losses = Device("cuda"), []
    plain = NETWORKS[name]().cuda()
    compiled, x = copy.deepcopy(plain), torch.randint(plain.config.vocab_size, (4, 65), device="cuda")
    compile_parts(compiled)
    for network in (plain, compiled):
        optimizers = build_optimizers(network, 1e-3)
        for _ in range(5):
            with device.autocast():
                loss = network(x[:, :-1], x[:, 1:])[1]
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            network.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=0.05) and losses[0] < 6.9
