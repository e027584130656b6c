"""Hugging Face folders: what transformers makes of Flow's, the way back of both models, and publishing, at a Hub on the loopback."""

import base64
import dataclasses
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT

import convert
import prepare
import publish
from checkpoint import load_model, save_checkpoint
from huggingface import hf_name
from model import Flow, FlowConfig, generate
from scripts import InputError
from snn_model import Pulse, PulseConfig

FLOW = dict(n_layer=3, n_head=4, n_kv_head=2, d_model=64, head_dim=16, d_ff=96, window=40, global_every=2, max_seq_len=192)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of each model, at its random start, but Flow's matrices enlarged so that attention matters."""
    torch.manual_seed(0)
    rng, out = np.random.default_rng(0), tmp_path_factory.mktemp("runs")
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(200)]
    tokenizer = prepare.train_tokenizer([" ".join(words[i] for i in rng.zipf(1.4, 5000) % 200)], 300)
    flow = Flow(FlowConfig(vocab_size=300, **FLOW))
    pulse = Pulse(PulseConfig(vocab_size=300, n_layer=3, d_model=64, d_hidden=96, d_ff=64, n_head=2))
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(6 if p.ndim == 2 else 1)
    for kind, model in (("flow", flow), ("pulse", pulse)):
        (out / kind).mkdir()
        content = {"model": kind, "config": dataclasses.asdict(model.config), "weights": model.state_dict(), "phase": 1, "step": 7}
        save_checkpoint(out / kind / "phase1.pt", content | {"tokenizer": tokenizer.to_str()})
    return out


def test_a_flow_folder_is_what_transformers_reads(runs, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    line = {"step": 7, "phase": 1, "tokens": 99, "val_loss": 3.25, "val_bpb": 1.5}
    lines = [line, line | {"step": 9, "val_loss": 4.5}]  # the checkpoint is of step 7, and a kill came while the last line was written
    (runs / "flow" / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 1')
    convert.main([f"--ckpt={runs / 'flow'}", "--to=hf", f"--out={tmp_path / 'hf'}"])
    ours, tokenizer, _ = load_model(runs / "flow" / "phase1.pt")
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = torch.randint(4, 300, (2, 120))  # without <|pad|>, which transformers would mask
    with torch.inference_mode():
        assert (theirs(ids).logits - ours(ids)[0]).abs().max() < 1e-4
        greedy = theirs.generate(ids[:1, :50], max_new_tokens=64, do_sample=False, eos_token_id=None)[0, 50:]
    assert greedy.tolist() == [int(t) for t in generate(ours, ids[:1, :50], 64, temperature=0)]

    messages = [{"role": "user", "content": "abcd efgh?\nYes."}, {"role": "assistant", "content": "aa"}, {"role": "user", "content": "b"}]
    rendered = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert rendered == [0, *prepare.chat_ids(tokenizer, messages, open_turn=True)]
    assert "| 1 | 7 | 99 | 3.250 | 1.500 |" in (tmp_path / "hf" / "README.md").read_text()

    again = Flow.from_pretrained(tmp_path / "hf")
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))


def test_a_pulse_folder_comes_back(runs, tmp_path):
    convert.main([f"--ckpt={runs / 'pulse'}", "--to=hf", f"--out={tmp_path / 'hf'}"])
    ours, tokenizer, _ = load_model(runs / "pulse" / "phase1.pt")
    again, their_tokenizer = publish.read_folder(tmp_path / "hf")
    assert again.config == ours.config and their_tokenizer.to_str() == tokenizer.to_str()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "rheobase"}))
    with pytest.raises(InputError, match="of another version, lacks rheobase"):
        publish.read_folder(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    for tokenizer in ("{}", None):
        (tmp_path / "hf" / "tokenizer.json").write_text(tokenizer) if tokenizer else (tmp_path / "hf" / "tokenizer.json").unlink()
        with pytest.raises(InputError, match="tokenizer.json"):
            publish.read_folder(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json holds no JSON object"):
        publish.read_folder(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="is not a folder of"):
        publish.read_folder(tmp_path / "hf")


# ---- folders from elsewhere ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A Qwen3 folder of two files of weights."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("whole")
    model = Flow(FlowConfig(vocab_size=60, n_layer=2, n_head=2, n_kv_head=1, d_model=16, head_dim=8, d_ff=24, window=8, global_every=2))
    (folder / "config.json").write_text(json.dumps(publish.qwen3_config(model.config, ends=[0], start=0, pad=0)))
    weights = {hf_name(name): p.detach().clone() for name, p in model.state_dict().items() if name != "lm_head.weight"}
    names, index = sorted(weights), {}
    for file, part in (("a.safetensors", names[:5]), ("b.safetensors", names[5:])):
        save_file({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(Flow.from_pretrained(folder).norm.weight, model.norm.weight)
    return folder


GONE = object()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected dict"),
        ({"rope_parameters": GONE, "rope_scaling": "linear"}, 'rope_scaling is "linear", expected dict'),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "scaled RoPE"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, 'rope_theta is "x", expected float'),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta=0.0 must be above 0"),
        ({"num_attention_heads": 0, "head_dim": GONE}, "num_attention_heads is 0, expected at least 1"),
        ({"num_hidden_layers": GONE}, "num_hidden_layers is missing, expected int"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, expected int"),
        ({"hidden_size": "16"}, 'hidden_size is "16", expected int'),
        ({"vocab_size": True}, "vocab_size is true, expected int"),
        ({"intermediate_size": None}, "intermediate_size is missing, expected int"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing, expected float"),
        ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps is "1e-6", expected float'),
        ({"rms_norm_eps": float("nan")}, "norm_eps=nan must be above 0"),
        ({"max_position_embeddings": "256"}, 'max_position_embeddings is "256", expected int'),
        ({"sliding_window": "8"}, 'sliding_window is "8", expected int'),
        ({"sliding_window": 8.5}, "sliding_window is 8.5, expected int"),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false", expected bool'),
        ({"attention_bias": 0}, "attention_bias is 0, expected bool"),
        ({"layer_types": 7}, "layer_types is 7, expected list"),
        ({"layer_types": [[1], [2]]}, "layer_types .* for 2 layers"),
    ],
)
def test_a_config_with_wrong_fields(whole, tmp_path, change, message):
    folder = tmp_path / "folder"
    shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not GONE}))
    with pytest.raises(ValueError, match=message):
        Flow.from_pretrained(folder)
    with pytest.raises(InputError, match=message):
        convert.main([f"--ckpt={folder}", "--to=hf"])
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("weight_map", [["a"], None, {"norm": 1}, {"norm": ["a.safetensors"]}, {"norm": "."}])
def test_an_index_without_names_of_files(whole, tmp_path, weight_map):
    folder = tmp_path / "folder"
    shutil.copytree(whole, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises((ValueError, FileNotFoundError), match="download the folder again"):
        Flow.from_pretrained(folder)


def test_json_too_deep_to_read(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json is not JSON"):
        Flow.from_pretrained(tmp_path / "folder")


# ---- publishing ----


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs; what was committed is kept in `files`, what was asked in `seen`."""

    def answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer({"id": "me/it", "sha": "0" * 40, "siblings": [], "private": False, "tags": []})

    do_HEAD = do_GET

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub = self.server
        hub.seen.append((self.path, self.headers.get("Authorization")))
        if hub.refuses:
            return self.answer({"error": "no"}, 403)
        if self.path == "/api/repos/create":
            hub.created = json.loads(body)
            return self.answer({"url": f"http://localhost:{hub.server_port}/me/it"})
        if "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(body)["files"]]
            return self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        if "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.answer({"commitUrl": f"http://localhost:{hub.server_port}/me/it/commit/{'0' * 40}", "commitOid": "0" * 40})
        return self.answer({})


@pytest.fixture
def hub():
    with http.server.ThreadingHTTPServer(("localhost", 0), Hub) as server:
        server.files, server.seen, server.refuses = {}, [], False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def call(hub, command, home, token, cwd):
    """A command with the Hub at the loopback, and a token where huggingface_hub looks for it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    env |= {"HF_ENDPOINT": f"http://localhost:{hub.server_port}", "HF_HOME": str(home / "home"), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_TOKEN": token} if token else {}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120, env=env)


def push(hub, run, name, folder, token="hf_secret"):
    command = [sys.executable, str(ROOT / "convert.py"), "--to=hf", f"--ckpt={run}", f"--out={folder / 'hf'}", f"--push={name}"]
    return call(hub, command, folder, token, cwd=folder)


def test_a_folder_is_published(hub, runs, tmp_path):
    done = push(hub, runs / "flow", "me/it", tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.files == {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    assert all(token == "Bearer hf_secret" for _, token in hub.seen) and hub.created["name"] == "it"
    assert "hf_secret" not in done.stdout + done.stderr and not any(b"hf_secret" in content for content in hub.files.values())


@pytest.mark.parametrize("name, token, refuses, match", [
    ("me/it", "hf_secret", True, "--push=me/it was refused by the Hub (403)"),
    ("me/it/too", "hf_secret", False, "--push=me/it/too is not a name"),
    ("me/it", None, False, "run `hf auth login` first"),
])  # fmt: skip
def test_a_push_that_fails_says_why(hub, runs, tmp_path, name, token, refuses, match):
    hub.refuses = refuses
    done = push(hub, runs / "flow", name, tmp_path, token)
    assert done.returncode == 2 and match in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "hf" / "model.safetensors").exists()


def test_data_is_published_with_a_card(hub, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    counts = {"documents": 2, "bytes": 30, "tokens": 9}
    phases = {"1": {split: counts | {"shards": [f"phase1_{split}_00000.bin"]} for split in ("train", "val")}}
    meta = {"fingerprint": "ab", "vocab_size": 300, "phases": phases, "sources": {"1": ["mybook.txt"]}}
    (folder / "meta.json").write_text(json.dumps(meta))
    for split in ("train", "val"):
        (folder / f"phase1_{split}_00000.bin").write_bytes(b"tokens")
    code = f"import publish; publish.push_data({str(folder)!r}, 'me/it')"
    done = call(hub, [sys.executable, "-c", code], tmp_path, "hf_secret", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert hub.created["type"] == "dataset" and set(hub.files) == {"README.md", *(p.name for p in folder.iterdir())}
    assert "| 1 | train | 2 | 30 | 9 | mybook.txt |" in hub.files["README.md"].decode()


def test_prepare_publishes_what_it_made(hub, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"The {n}th cat of {n % 7} sat on mat {n * n}.\n" for n in range(3000)))
    command = [sys.executable, str(ROOT / "prepare.py"), "text.txt", "--out=data", "--vocab_size=300", "--push=me/it"]
    done = call(hub, command, tmp_path, "hf_secret", cwd=tmp_path)
    assert done.returncode == 0 and "published as me/it" in done.stdout, done.stderr
    assert {"tokenizer.json", "meta.json", "phase1_train_00000.bin"} <= hub.files.keys()


@pytest.mark.parametrize("kind", ["flow", "pulse"])
def test_sample_reads_a_folder_that_was_written(hub, runs, tmp_path, kind):
    command = [sys.executable, str(ROOT / "convert.py"), "--to=hf", f"--ckpt={runs / kind}", f"--out={tmp_path / 'hf'}"]
    assert call(hub, command, tmp_path, None, cwd=tmp_path).returncode == 0
    texts = []
    for ckpt in (runs / kind, tmp_path / "hf"):
        command = [sys.executable, str(ROOT / "sample.py"), f"--ckpt={ckpt}", "--prompt=the", "--max_new_tokens=20", "--temperature=0"]
        done = call(hub, command, tmp_path, None, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1] and len(texts[0]) > 4
