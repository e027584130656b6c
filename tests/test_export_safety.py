"""What convert.py replaces and what it leaves alone, what it makes of foreign folders and tokenizers, and what its verification refuses."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from coremltools.proto import Model_pb2

import convert
import coreml_verify
import prepare
import sample
from checkpoint import load_model, save_checkpoint
from coreml_models import FlowOnDevice
from distill import Examples
from model import Flow, FlowConfig
from scripts import InputError

MODEL = "Data/com.apple.CoreML/model.mlmodel"
SIZES = dict(vocab_size=320, n_layer=2, n_head=4, n_kv_head=2, d_model=64, head_dim=16, d_ff=96, window=40, global_every=2)


def write_run(folder, tokenizer_json, phase=1, **sizes):
    """A run of a Flow at its random start, matrices enlarged so that they matter; its vocabulary has rows without a token."""
    torch.manual_seed(0)
    model = Flow(FlowConfig(**(SIZES | dict(max_seq_len=192) | sizes)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim == 2 else 1)
    folder.mkdir()
    content = {"model": "flow", "config": dataclasses.asdict(model.config), "weights": model.state_dict(), "phase": phase, "step": 7}
    save_checkpoint(folder / "phase1.pt", content | {"tokenizer": tokenizer_json})
    return folder


@pytest.fixture(scope="module")
def tokenizer_json():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(200)]
    return prepare.train_tokenizer([" ".join(words[i] for i in rng.zipf(1.4, 5000) % 200)], 300).to_str()


@pytest.fixture(scope="module")
def run(tokenizer_json, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "flow", tokenizer_json)


@pytest.fixture(scope="module")
def exported(run):
    """A Hugging Face folder of the run, to be copied."""
    convert.main([f"--ckpt={run}", "--to=hf", f"--out={run.parent / 'exported'}"])
    return run.parent / "exported"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- replacing a folder ----


@pytest.mark.parametrize("out", [".", "link"])
def test_the_folder_that_one_stands_in_and_the_one_behind_a_link_are_replaced(run, exported, tmp_path, monkeypatch, out):
    made = tmp_path / "made"
    shutil.copytree(exported, made)
    (made / "README.md").write_text("old")
    (tmp_path / "link").symlink_to(made)
    monkeypatch.chdir(made if out == "." else tmp_path)
    convert.main([f"--ckpt={run}", "--to=hf", f"--out={out}", "--overwrite"])
    monkeypatch.chdir(tmp_path)
    assert contents(made) == contents(exported) and (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "made"]


def test_what_cannot_be_moved_into_place_leaves_the_old_folder(run, exported, tmp_path, monkeypatch):
    shutil.copytree(exported, tmp_path / "made")
    (tmp_path / "made" / "README.md").write_text("old")
    rename = convert.Path.rename

    def refused(self, target):
        if self.name == ".made.partial":
            raise PermissionError(1, "Operation not permitted", str(self))
        return rename(self, target)

    monkeypatch.setattr(convert.Path, "rename", refused)
    with pytest.raises(PermissionError):
        convert.main([f"--ckpt={run}", "--to=hf", f"--out={tmp_path / 'made'}", "--overwrite"])
    assert [p.name for p in tmp_path.iterdir()] == ["made"] and (tmp_path / "made" / "README.md").read_text() == "old"


def test_what_a_killed_run_left_is_tidied_up(run, exported, tmp_path):
    shutil.copytree(exported, tmp_path / ".made.old")  # killed between the two renames
    (tmp_path / ".made.old" / "README.md").write_text("old")
    (tmp_path / ".made.partial").mkdir()
    command = [f"--ckpt={run}", "--to=hf", f"--out={tmp_path / 'made'}"]
    with pytest.raises(InputError, match="exists: add --overwrite"):
        convert.main(command)
    assert [p.name for p in tmp_path.iterdir()] == ["made"] and (tmp_path / "made" / "README.md").read_text() == "old"
    shutil.copytree(exported, tmp_path / ".made.old")  # killed while the old one was deleted
    convert.main([*command, "--overwrite"])
    assert [p.name for p in tmp_path.iterdir()] == ["made"] and contents(tmp_path / "made") == contents(exported)


def without_marker(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["made_by"], config["imported"]
    (folder / "config.json").write_text(json.dumps(config))


def trained_on_by_transformers(folder):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)


@pytest.mark.parametrize(
    "change, match",
    [
        (without_marker, "was not made by convert.py"),
        (trained_on_by_transformers, "was not made by convert.py"),
        (lambda folder: (folder / "config.json").write_text("{"), "was not made by convert.py"),
        (lambda folder: (folder / "notes.txt").write_text("mine"), "holds notes.txt, which was not made by convert.py"),
        (lambda folder: (folder / "model.safetensors.bak").mkdir(), "holds model.safetensors.bak"),
        (lambda folder: (folder / "predict.py").mkdir(), "holds predict.py"),
    ],
)
def test_overwrite_deletes_only_what_convert_wrote(run, exported, tmp_path, change, match):
    shutil.copytree(exported, tmp_path / "made")
    change(tmp_path / "made")
    before = contents(tmp_path / "made")
    with pytest.raises(InputError, match=match):
        convert.main([f"--ckpt={run}", "--to=hf", f"--out={tmp_path / 'made'}", "--overwrite"])
    assert [p.name for p in tmp_path.iterdir()] == ["made"] and contents(tmp_path / "made") == before


def test_the_folder_of_the_checkpoint_is_not_replaced(run, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "made")
    for ckpt, out in ((tmp_path / "made", tmp_path / "made"), (run / "phase1.pt", run)):
        with pytest.raises(InputError, match=f"--out={out} is where --ckpt lies"):
            convert.main([f"--ckpt={ckpt}", "--to=hf", f"--out={out}", "--overwrite"])
    assert contents(tmp_path / "made") == contents(exported)


def test_everybody_may_read_the_weights_who_may_read_the_rest(exported):
    assert len({os.stat(path).st_mode for path in exported.iterdir()}) == 1


def test_a_context_too_short_to_verify(tokenizer_json, tmp_path):
    short = write_run(tmp_path / "short", tokenizer_json, max_seq_len=64)
    with pytest.raises(InputError, match="the model's max_seq_len is 64: 128 is the least that can be verified"):
        convert.main([f"--ckpt={short}"])


# ---- imported models ----


def import_folder(exported, folder, tokenizer_json=None):
    """A folder as from elsewhere: no marker, another tokenizer."""
    shutil.copytree(exported, folder)
    without_marker(folder)
    if tokenizer_json:
        (folder / "tokenizer.json").write_text(tokenizer_json)
    return folder


def test_a_tokenizer_without_pad_gets_no_token_beyond_the_embedding(exported, tokenizer_json, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = import_folder(exported, tmp_path / "theirs", tokenizer_json.replace("<|pad|>", "<|unused|>"))
    convert.main([f"--ckpt={folder}", "--to=hf", f"--out={tmp_path / 'made'}"])
    model, tokenizer = (auto.from_pretrained(tmp_path / "made") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert len(tokenizer) == 300 and tokenizer.pad_token_id == model.config.pad_token_id == 0
    batch = tokenizer(["a", "a much longer text"], return_tensors="pt", padding=True)
    assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("target", ["coreml", "hf"])
@pytest.mark.parametrize("token", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
def test_a_tokenizer_without_ends_is_refused(exported, tokenizer_json, tmp_path, target, token):
    folder = import_folder(exported, tmp_path / "theirs", tokenizer_json.replace(token, "<|other|>"))
    with pytest.raises(InputError, match=f"its tokenizer has no {token}".replace("|", r"\|")):
        convert.main([f"--ckpt={folder}", f"--to={target}", f"--out={tmp_path / 'made'}"])
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_an_imported_model_may_lack_a_pad_but_no_end(exported, tokenizer_json, tmp_path):
    """Nothing is learned where an example is padded; a text without a beginning could not be written."""
    folder = import_folder(exported, tmp_path / "theirs", tokenizer_json.replace("<|pad|>", "<|unused|>"))
    x, y = Examples([("a", "b"), ("a", "much more")], load_model(folder)[1], 64).tensors(np.array([0, 1]), "cpu")
    padding = y[0] == -1
    assert padding[-1] and x[0, -1] == 2 and (y[1] != -1)[padding].any()
    (folder / "tokenizer.json").write_text(tokenizer_json.replace("<|endoftext|>", "<|unused|>"))
    with pytest.raises(InputError, match=r"theirs: its tokenizer has no <\|endoftext\|>, with which texts and turns begin"):
        load_model(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json.replace("<|im_start|>", "<|unused|>"))
    load_model(folder)  # goes on with a text as any other
    with pytest.raises(InputError, match=r"theirs: its tokenizer has no <\|im_start\|>, with which texts and turns begin"):
        sample.main([f"--ckpt={folder}", "--chat", "--prompt=a"])


def test_the_card_says_what_is_known(exported, tokenizer_json, tmp_path):
    ours = (exported / "README.md").read_text()
    assert "license: mit" in ours and "with sliding windows in 1 of 2 layers, trained with SLMS." in ours
    folder = import_folder(exported, tmp_path / "theirs")
    convert.main([f"--ckpt={folder}", "--to=hf", f"--out={tmp_path / 'made'}"])
    theirs = (tmp_path / "made" / "README.md").read_text()
    assert "windows in 1 of 2 layers." in theirs and not any(word in theirs for word in ("license", "trained with", "Every document"))
    convert.main([f"--ckpt={write_run(tmp_path / 'all', tokenizer_json, global_every=1)}", "--to=hf"])
    assert "the Qwen3 type, trained with SLMS." in (tmp_path / "all-hf" / "README.md").read_text()


def test_packages_of_an_imported_model(exported, tmp_path):
    """Its vocabulary has rows that are no token, as Qwen3's has; its licence is its own."""
    folder = import_folder(exported, tmp_path / "theirs")
    convert.main([f"--ckpt={folder}", f"--out={tmp_path / 'made'}"])
    contract = json.loads((tmp_path / "made" / "config.json").read_text())
    assert contract["model"]["vocab_size"] == 320 and "license" not in contract and contract["stop_ids"] == [0, 2]
    convert.main([f"--ckpt={folder}", f"--out={tmp_path / 'made'}", "--overwrite", "--to=hf"])  # one export in the place of another
    assert (tmp_path / "made" / "model.safetensors").exists() and not (tmp_path / "made" / "Flow.mlpackage").exists()


# ---- what the verification refuses ----


@pytest.fixture(scope="module")
def verified(tokenizer_json, tmp_path_factory):
    """A run of which one matrix is all zero, as it may be at the start, and a folder with its packages."""
    out = tmp_path_factory.mktemp("verified")
    run = write_run(out / "flow", tokenizer_json)
    checkpoint = torch.load(run / "phase1.pt", weights_only=True)
    checkpoint["weights"]["layers.1.attn.o_proj.weight"].zero_()
    save_checkpoint(run / "phase1.pt", checkpoint)
    convert.main([f"--ckpt={run}", "--compress=int8", f"--out={out / 'made'}", "--context=128"])
    return run, out / "made"


@pytest.fixture
def verify(verified, tmp_path):
    """The verification of a copy that was changed: `change(spec, package, folder)` may edit the package's protobuf and its files."""
    model, _, checkpoint = load_model(verified[0] / "phase1.pt")
    text = np.random.default_rng(0).integers(4, 300, 128)

    def make(Q, model=model):
        return FlowOnDevice(model, "ane", Q, 128, 0, model.config.n_layer).eval()

    def call(change):
        folder = tmp_path / "made"
        shutil.copytree(verified[1], folder)
        contract = json.loads((folder / "config.json").read_text())
        file, spec = folder / "Flow.mlpackage" / MODEL, Model_pb2.Model()
        spec.ParseFromString(file.read_bytes())
        change(spec, folder / "Flow.mlpackage", folder)
        file.write_bytes(spec.SerializeToString())
        return coreml_verify.verify(folder, contract, model, [make], text, checkpoint["tokenizer"])

    return call


def feature(kind, change):
    return lambda spec, package, folder: [change(getattr(function, kind)[0]) for function in spec.description.functions]


def without_a_state(spec, package, folder):
    del spec.description.functions[0].state[0]


def other_contract(spec, package, folder):
    contract = json.loads((folder / "config.json").read_text())
    contract["packages"][0]["functions"]["decode"]["x"][1] += 1
    (folder / "config.json").write_text(json.dumps(contract))


def other_tokenizer(spec, package, folder):
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("<|pad|>", "<|none|>"))


def manifest_of_another(spec, package, folder):
    (package / "Manifest.json").write_text((package / "Manifest.json").read_text().replace("model.mlmodel", "other.mlmodel"))


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda spec, package, folder: (package / "Manifest.json").unlink(), "not an .mlpackage that can be read"),
        (manifest_of_another, "not an .mlpackage that can be read"),
        (lambda spec, package, folder: setattr(spec, "specificationVersion", 8), "the version is not what was verified"),
        (lambda spec, package, folder: setattr(spec.description, "defaultFunctionName", "prefil"), "the default function"),
        (lambda spec, package, folder: spec.description.ClearField("functions"), "the list of functions"),
        (lambda spec, package, folder: spec.description.metadata.userDefined.clear(), "the metadata"),
        (feature("input", lambda f: setattr(f.type.multiArrayType, "dataType", 65568)), "(decode|prefill)'s inputs"),
        (feature("input", lambda f: f.type.multiArrayType.shape.append(1)), "(decode|prefill)'s inputs"),
        (feature("input", lambda f: setattr(f, "name", "wrong")), "(decode|prefill)'s inputs"),
        (feature("state", lambda f: f.type.stateType.arrayType.shape.append(1)), "(decode|prefill)'s states"),
        (without_a_state, "(decode|prefill)'s states"),
        (feature("output", lambda f: setattr(f, "name", "wrong")), "(decode|prefill)'s outputs"),
        (other_contract, "config.json is not what was verified"),
        (other_tokenizer, "tokenizer.json is not what was verified"),
    ],
)
def test_an_interface_that_is_not_the_programs_is_refused(verify, change, match):
    with pytest.raises((InputError, ValueError), match=match):
        verify(change)


def zeros_in(name):
    """Zeroes the bytes of a compressed matrix, as a write that failed would."""

    def change(spec, package, folder):
        blob, done = np.memmap(package / "Data/com.apple.CoreML/weights/weight.bin", np.uint8, "r+"), 0
        for function in spec.mlProgram.functions.values():
            for op in next(iter(function.block_specializations.values())).operations:
                if op.type.startswith("constexpr_") and name in op.outputs[0].name:
                    offset = op.inputs["data"].arguments[0].value.blobFileValue.offset
                    size, start = (int(n) for n in blob[offset + 8 : offset + 24].view("<u8"))
                    blob[start : start + size] = 0
                    done += 1
        assert done == 2, "once in each function"

    return change


@pytest.mark.parametrize("name", ["blocks_0_q_proj", "blocks_1_up_proj"])
def test_a_ruined_matrix_is_refused_though_the_whole_may_still_do(verify, monkeypatch, name):
    monkeypatch.setattr(coreml_verify, "RUINED_LIMIT", (99.0, 0.0, 99.0))
    with pytest.raises(InputError, match=f"Flow.mlpackage {name.replace('_', '.', 2)}.*is 100.0% away from the model's .at most 5%"):
        verify(zeros_in(name))


def test_unchanged_packages_pass_and_lose_little(verify):
    errors = verify(lambda spec, package, folder: None)["compression"]["errors"]
    assert 0.003 < min(errors.values()) and max(errors.values()) < 0.01 and not any("1.o_proj" in name for name in errors)
