"""distill.py: local teachers against transformers, what a student is trained on, exact resume after SIGKILL, evaluation, and what bad
input gets."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, call_distill as call, distill_works as works, lines_of, write_problems
from tokenizers import Tokenizer

import convert
import distill
import prepare
import teachers
from checkpoint import find_checkpoint, load_checkpoint, load_model, save_checkpoint
from distill import Examples, distillation_loss
from exact_match import final_number, problem_key
from model import Flow, FlowConfig, generate
from prepare import render_chat
from scripts import InputError
from snn_model import Pulse, PulseConfig
from spikes import firing_rates
from teachers import INSTRUCTION, Answer, Job, question_ids
from word_problems import problems as word_problems

SHORT = ["--batch_size=4", "--log_interval=2", "--max_new_tokens=12", "--device=cpu"]
SIZES = dict(n_layer=2, d_model=32, n_head=2)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with problems, a tokenizer of 300 tokens, and untrained checkpoints of a tiny Flow and a tiny Pulse."""
    folder = tmp_path_factory.mktemp("distill")
    write_problems(folder / "train.jsonl", word_problems("train", 40))
    write_problems(folder / "val.jsonl", word_problems("val", 6))
    write_problems(folder / "new.jsonl", word_problems("test", 4))
    tokenizer = prepare.train_tokenizer((p["question"] + p["answer"] for p in word_problems("train", 200)), 300).to_str()
    torch.manual_seed(0)
    flow = Flow(FlowConfig(vocab_size=300, **SIZES, n_kv_head=1, head_dim=16, d_ff=48, window=8, global_every=2))
    pulse = Pulse(PulseConfig(vocab_size=300, **SIZES, d_hidden=64, d_ff=64, memory_every=2))
    for name, model in (("flow", flow), ("pulse", pulse)):
        (folder / "out" / name).mkdir(parents=True)
        state = {"model": name, "config": vars(model.config), "weights": model.state_dict(), "tokenizer": tokenizer, "phase": 3, "step": 0}
        save_checkpoint(folder / "out" / name / "phase3.pt", state)
    return folder


@pytest.fixture
def here(room, monkeypatch):
    monkeypatch.chdir(room)
    return room


def tokenizer_of(room):
    return Tokenizer.from_str(load_checkpoint(room / "out/flow/phase3.pt")["tokenizer"])


# ---- teachers ----


def test_a_checkpoint_answers_in_a_batch_what_it_answers_alone(room):
    for name in ("flow", "pulse"):
        path = room / "out" / name / "phase3.pt"
        jobs = [Job(problem_key(p["question"]), 0, p["question"]) for p in lines_of(room / "train.jsonl")[:7]]
        together = dict(teachers.checkpoint_teacher(path, "cpu", 4).answers(jobs, 0, 9, 0))
        model, tokenizer, _ = load_model(path)
        for job in jobs:
            ids = torch.cat(list(generate(model, [question_ids(tokenizer, job.question)], 9, 0, stop_ids=[0, 2]))).tolist()
            cut = ids[-1] not in (0, 2)
            assert together[job] == Answer(tokenizer.decode(ids if cut else ids[:-1]), len(ids), "length" if cut else "stop")


def test_a_teacher_has_one_name_in_every_precision(room, monkeypatch):
    """It writes in bf16 on a GPU; answers asked for there are as good on a CPU."""
    path = room / "out/flow/phase3.pt"
    name = teachers.checkpoint_teacher(path, "cpu", 4).name
    monkeypatch.setattr(teachers, "for_writing", lambda model: model.bfloat16())
    assert teachers.checkpoint_teacher(path, "cpu", 4).name == name


@pytest.mark.parametrize("name", ["flow", "pulse"])
def test_an_exported_model_teaches_as_its_checkpoint_does(room, tmp_path, name):
    """Without the instruction that models of others are given."""
    path = room / "out" / name / "phase3.pt"
    convert.main([f"--ckpt={path}", "--to=hf", f"--out={tmp_path / 'hf'}"])
    jobs = [Job(str(i), 0, p["question"]) for i, p in enumerate(lines_of(room / "train.jsonl")[:3])]
    theirs, ours = (teachers.open_teacher(str(where), "cpu", 3, None, 1) for where in (tmp_path / "hf", path))
    assert dict(theirs.answers(jobs, 0, 9, 0)) == dict(ours.answers(jobs, 0, 9, 0)) and theirs.stop_ids == ours.stop_ids
    assert theirs.name.rpartition("@")[2] == ours.name.rpartition("@")[2] != ""


def test_a_hugging_face_folder_with_other_weights_is_another_teacher(qwen, tmp_path):
    shutil.copytree(qwen, tmp_path / "qwen")
    before = teachers.open_teacher(str(tmp_path / "qwen"), "cpu", 1, None, 1).name
    assert teachers.open_teacher(str(tmp_path / "qwen"), "cpu", 1, None, 1).name == before
    weights = tmp_path / "qwen/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert teachers.open_teacher(str(tmp_path / "qwen"), "cpu", 1, None, 1).name != before


def test_traces_may_be_of_a_teacher_whose_name_is_test(here, tmp_path):
    """distill.py names them so itself; any other file that calls itself a test split is refused."""
    lines = [teachers.trace_of(Job(problem_key(p["question"]), 0, p["question"]), Answer(p["answer"], 9, "stop"), final_number(p["answer"]))
             for p in lines_of(here / "train.jsonl")]  # fmt: skip
    for name in ("traces_out_test.jsonl", "gsm8k_test.jsonl"):
        write_problems(tmp_path / name, [line | {"teacher": "out/test"} for line in lines])
    options = ["--student=out/flow", "--eval", "val.jsonl", "--num_eval=1", "--epochs=0.2", *SHORT]
    distill.main([f"--traces={tmp_path / 'traces_out_test.jsonl'}", f"--out={tmp_path / 'new'}", *options])
    assert (tmp_path / "new/last.pt").exists()
    refused("gsm8k_test.jsonl is a test split", f"--traces={tmp_path / 'gsm8k_test.jsonl'}", *options)


def test_an_evaluation_goes_where_it_is_told(here, tmp_path, capsys):
    options = ["--evaluate", "--student=out/flow", "--eval", "val.jsonl", *SHORT]
    distill.main([*options, f"--out={tmp_path / 'new'}", "--num_eval=2"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["eval_phase3_val.jsonl"]
    assert "val.jsonl: 6 problems, of which the first 2 are taken" in capsys.readouterr().out
    for name in ("teacher", "problems", "traces"):
        refused(f"--evaluate only measures the student: leave --{name} out", *options, f"--{name}=out/flow")


def test_an_answer_ends_where_the_context_does(room):
    jobs = [Job(str(i), 0, p["question"][: 10 + 12 * i]) for i, p in enumerate(lines_of(room / "train.jsonl")[:6])]
    teacher = teachers.checkpoint_teacher(room / "out/flow/phase3.pt", "cpu", 4)
    teacher.stop_ids = set()
    lengths = {job: len(question_ids(teacher.tokenizer, job.question)) for job in jobs}
    limit = sorted(lengths.values())[3] + 5
    teacher.model.config = dataclasses.replace(teacher.model.config, max_seq_len=limit)
    answers = dict(teacher.answers(jobs, 0, 9, 0))
    assert len(answers) == 6 and {answer.finish for answer in answers.values()} == {"length"}
    assert [answers[job].tokens for job in jobs] == [max(0, min(9, limit - lengths[job])) for job in jobs]
    for job in jobs:
        teacher.model.config = dataclasses.replace(teacher.model.config, max_seq_len=1000)
        whole = dict(teacher.answers([job], 0, max(1, answers[job].tokens), 0))[job]
        assert answers[job] == whole or answers[job] == Answer("", 0, "length") and lengths[job] >= limit


@pytest.fixture(scope="module")
def qwen(room, tmp_path_factory):
    """A tiny random Qwen3 folder as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("qwen")
    config = transformers.Qwen3Config(
        vocab_size=310, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=512, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_of(room).to_str(), encoding="utf-8")
    return folder


def test_a_hugging_face_folder_answers_as_transformers_does(room, qwen):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(qwen)
    ends = [2, *range(4, 300, 11)]  # so that some answers stop
    (qwen / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    questions = [p["question"][: 20 + 9 * i] for i, p in enumerate(lines_of(room / "train.jsonl")[:6])]  # unequal lengths
    jobs = [Job(str(i), 0, question) for i, question in enumerate(questions)]
    finishes = set()
    for size in (1, 6):
        teacher = teachers.open_teacher(str(qwen), "cpu", size, None, 1)
        answers = dict(teacher.answers(jobs, 0, 24, 0))
        for job in jobs:
            text = render_chat([{"role": "user", "content": f"{job.question}\n\n{INSTRUCTION}"}], open_turn=True)
            ids = torch.tensor([teacher.tokenizer.encode(text).ids])
            made = theirs.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=ends, pad_token_id=3)[0, ids.size(1) :].tolist()
            stopped = made[-1] in ends
            expected = Answer(teacher.tokenizer.decode(made[:-1] if stopped else made), len(made), "stop" if stopped else "length")
            assert answers[job] == expected
            finishes.add(expected.finish)
    assert finishes == {"stop", "length"}


# ---- what a student is trained on ----


def test_targets_are_the_answer_and_its_end_behind_the_prompt_of_generation(room):
    tokenizer = tokenizer_of(room)
    pairs = [(p["question"], p["answer"]) for p in lines_of(room / "train.jsonl")]
    examples = Examples(pairs, tokenizer, 1000)
    x, y = examples.tensors(np.array([3, 0, 5]), "cpu")
    for row, n in enumerate((3, 0, 5)):
        question, answer = pairs[n]
        text = "<|endoftext|>" + render_chat([{"role": "user", "content": question}], open_turn=True)
        prompt = tokenizer.encode(text).ids
        assert prompt == question_ids(tokenizer, question)
        whole = prompt + tokenizer.encode(answer).ids + [tokenizer.token_to_id("<|im_end|>")]
        T = len(whole) - 1
        assert x[row, :T].tolist() == whole[:-1] and set(x[row, T:].tolist()) <= {tokenizer.token_to_id("<|pad|>")}
        assert y[row].tolist() == [-1] * (len(prompt) - 1) + whole[len(prompt) :] + [-1] * (x.size(1) - T)
    few = Examples(pairs, tokenizer, int(np.median(examples.lengths)))
    assert len(few.rows) + few.too_long == 40 and few.too_long > 5 and few.lengths.max() <= np.median(examples.lengths)


def test_nothing_leaks_from_one_example_into_another(room):
    examples = Examples([(p["question"], p["answer"]) for p in lines_of(room / "train.jsonl")[:6]], tokenizer_of(room), 1000)
    for name in ("flow", "pulse"):
        model, _, _ = load_model(room / "out" / name / "phase3.pt")
        with torch.no_grad():
            together = model(*examples.tensors(np.arange(6), "cpu"))[1]
            alone = torch.stack([model(*examples.tensors(np.array([n]), "cpu"))[1] for n in range(6)])
        torch.testing.assert_close(together, (alone * torch.from_numpy(examples.answer_lengths)).sum() / examples.answer_lengths.sum())


def test_an_epoch_sees_every_example_once_in_batches_of_like_length(room):
    examples = Examples([(p["question"], p["answer"]) for p in lines_of(room / "train.jsonl")], tokenizer_of(room), 1000)
    steps = [examples.batch(5, step, 4) for step in range(20)]
    assert sorted(np.concatenate(steps[:10])) == sorted(np.concatenate(steps[10:])) == list(range(40))
    assert not all((a == b).all() for a, b in zip(steps[:10], steps[10:]))
    assert (examples.batch(5, 13, 4) == steps[13]).all() and len(set(np.concatenate([examples.batch(5, s, 7) for s in range(5)]))) == 35
    ordered = np.sort(examples.lengths).reshape(10, 4)
    padding = 1 - ordered.sum() / (ordered.max(1) * 4).sum()
    assert examples.padding(5, 4) == pytest.approx(padding)


def test_distillation_loss_against_loops():
    torch.manual_seed(0)
    logits, teacher, targets = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5), torch.tensor([[1, -1, 4], [-1, 0, 2]])
    expected = []
    for b in range(2):
        for t in range(3):
            if targets[b, t] >= 0:
                p, q = ((x[b, t] / 3).softmax(-1) for x in (logits, teacher))
                kl = sum(q[v] * (q[v] / p[v]).log() for v in range(5))
                expected.append(0.7 * -logits[b, t].log_softmax(-1)[targets[b, t]].item() + 0.3 * 9 * kl.item())
    loss = distillation_loss(logits, teacher, targets, 0.3, 3.0)
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)
    loss.backward()
    assert (logits.grad[targets < 0] == 0).all() and (logits.grad[targets >= 0] != 0).all()


# ---- the script ----


def test_a_student_learns_solutions_and_is_measured_before_and_after(room):
    options = ["--student=out/flow", "--problems=train.jsonl", "--eval", "val.jsonl", "new.jsonl", "--epochs=4", "--out=out/a", *SHORT]
    output = works(*options, cwd=room)
    out = room / "out/a"
    names = {f"eval_{when}_{split}.jsonl" for when in ("before", "after") for split in ("val", "new")}
    assert {f.name for f in out.iterdir()} == {"last.pt", "log.jsonl", "curves.png", *names}
    assert output.count("/6 = ") == output.count("/4 = ") == 2 and "40 steps of 4 examples" in output and "of a batch is padding" in output
    log = lines_of(out / "log.jsonl")
    train, val = [x for x in log if "loss" in x], [x for x in log if "val_loss" in x]
    assert set(train[0]) == {"step", "phase", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"}
    assert set(val[0]) == {"step", "phase", "tokens", "seconds", "val_loss", "val_bpb"}
    assert [x["step"] for x in train] == list(range(2, 41, 2)) and [x["step"] for x in val] == [0, 40]
    assert val[1]["val_loss"] < val[0]["val_loss"] - 1
    transcript = lines_of(out / "eval_after_val.jsonl")
    assert [t["question"] for t in transcript] == [p["question"] for p in lines_of(room / "val.jsonl")]
    assert set(transcript[0]) == {"question", "reference", "answers", "final", "correct"} and len(transcript[0]["answers"]) == 1
    checkpoint = load_checkpoint(find_checkpoint(str(out)))  # what sample.py will load
    assert checkpoint["step"] == 40 and checkpoint["model"] == "flow" and "optimizer" in checkpoint
    assert "training is finished" in works(*options, cwd=room) and lines_of(out / "log.jsonl") == log
    done = call(*options, "--lr=0.1", cwd=room)
    assert done.returncode == 2 and "lr is " in done.stderr and "0.1 here" in done.stderr and "--fresh" in done.stderr
    output = works("--evaluate", "--student=out/a", "--eval", "val.jsonl", "--votes=3", *SHORT, cwd=room)
    assert "majority of 3 at temperature 0.7" in output
    assert len(lines_of(out / "eval_last_val.jsonl")[0]["answers"]) == 3


def test_flow_teaches_pulse_by_answers_and_logits(room):
    options = ["--student=out/pulse", "--teacher=out/flow", "--problems=train.jsonl", "--eval", "val.jsonl", "--epochs=1", *SHORT]
    output = works(*options, "--samples=0", "--out=out/kl", cwd=room)
    assert "KL weight 0.5" in output and not list(room.glob("out/traces*"))
    settings = load_checkpoint(room / "out/kl/last.pt")["settings"]
    assert settings["kl_weight"] == 0.5 and settings["teacher"].startswith("out/flow/phase3.pt@")
    output = works(*options, "--keep=all", "--samples=2", "--trace", "--traces=many.jsonl", cwd=room)
    assert len(lines_of(room / "many.jsonl")) == 80 and "0 of 80 answers are in many.jsonl" in output
    assert "80 of 80 answers are in" in works(*options, "--keep=all", "--samples=2", "--trace", "--traces=many.jsonl", cwd=room)
    done = call(*options, "--samples=0", "--out=out/no", "--teacher=out/pulse", "--kl_weight=0", cwd=room)
    assert done.returncode == 0 and load_checkpoint(room / "out/no/last.pt")["settings"]["teacher"] is None


def test_a_folder_of_hugging_face_is_a_student_too(room):
    command = [sys.executable, ROOT / "convert.py", "--ckpt=out/flow", "--to=hf"]
    subprocess.run(command, cwd=room, check=True, capture_output=True)
    options = ["--problems=train.jsonl", "--eval", "val.jsonl", "--num_eval=2", "--epochs=1", *SHORT]
    works("--student=out/flow-hf", *options, cwd=room)
    works("--student=out/flow", "--out=out/direct", *options, cwd=room)
    one, two = (load_checkpoint(room / name / "last.pt")["weights"] for name in ("out/flow-hf_distilled", "out/direct"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_evaluation_files_of_one_name(room):
    (room / "other").mkdir()
    write_problems(room / "other/val.jsonl", lines_of(room / "new.jsonl"))
    files = ["val.jsonl", "other/val.jsonl", f"../{room.name}/other/val.jsonl", "./other/val.jsonl", "./val.jsonl"]
    output = works("--evaluate", "--student=out/pulse", "--eval", *files, *SHORT, cwd=room)
    names = ["val", "other_val", f"{room.name}_other_val", "other_val_2", "val_2"]
    assert all(f"phase3 {name}: " in output for name in names)
    assert [len(lines_of(room / f"out/pulse/eval_phase3_{name}.jsonl")) for name in names] == [6, 4, 4, 4, 6]


def test_pulse_pays_for_its_spikes_in_distillation_too(room):
    options = ["--student=out/pulse", "--problems=train.jsonl", "--eval", "val.jsonl", "--num_eval=1", "--epochs=4", *SHORT]
    spikes, runs = [], {"spares": ["--rate_penalty=20"], "default": [], "wastes": ["--rate_penalty=0"]}
    for name, penalty in runs.items():
        works(*options, *penalty, f"--out=out/{name}", cwd=room)
        model, tokenizer, checkpoint = load_model(room / f"out/{name}/last.pt")
        assert checkpoint["settings"]["rate_penalty"] == {"spares": 20, "default": 0.1, "wastes": 0}[name]
        text = "".join(p["question"] for p in lines_of(room / "val.jsonl"))
        rates = firing_rates(model, torch.tensor([tokenizer.encode(text).ids]))
        spikes.append(sum(rate["spikes"] * rate["neurons"] for rate in rates.values()))
    assert spikes[0] < 0.9 * spikes[2], spikes
    losses = []
    for name, batches in {"at_once": ["--batch_size=8"], "micro_steps": ["--batch_size=2", "--grad_accum=4"]}.items():
        works(*options, "--rate_penalty=20", *batches, f"--out=out/{name}", cwd=room)
        losses.append([x["loss"] for x in lines_of(room / f"out/{name}/log.jsonl") if "loss" in x][-1])
    assert losses[1] == pytest.approx(losses[0], abs=0.05)  # charged in every micro-step four times too much it is off by 0.3
    works(*options, "--student=out/spares", "--out=out/spares_again", cwd=room)  # as it was trained
    assert load_checkpoint(room / "out/spares_again/last.pt")["settings"]["rate_penalty"] == 20


def test_a_traces_file_alone_trains_a_student(room):
    traces = []
    for n, problem in enumerate(lines_of(room / "train.jsonl")):
        job, answer = Job(problem_key(problem["question"]), 0, problem["question"]), Answer(problem["answer"], 9, "stop")
        traces.append(teachers.trace_of(job, answer, final_number(problem["answer"]) + (n % 2)) | {"teacher": "x", "temperature": 0})
    write_problems(room / "half.jsonl", traces)
    output = works("--student=out/flow", "--traces=half.jsonl", "--eval", "val.jsonl", "--epochs=1", "--out=out/half", *SHORT, cwd=room)
    assert "20 of 40 answers right (50.0%)" in output and "20 examples of" in output


def test_killed_in_training_the_same_command_ends_in_the_same_weights(room):
    base = ["--problems=train.jsonl", "--eval", "val.jsonl", "--num_eval=2", *SHORT]
    base += ["--epochs=5", "--save_interval=10", "--eval_interval=20"]
    for student in ("flow", "pulse"):
        options = [f"--student=out/{student}", *base]
        works(*options, f"--out=out/{student}_whole", cwd=room)
        out = room / f"out/{student}_cut"
        command = [sys.executable, ROOT / "distill.py", *options, f"--out={out}"]
        process = subprocess.Popen(command, cwd=room, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / "last.pt").exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert load_checkpoint(out / "last.pt")["step"] < 50
        assert "continuing" in works(*options, f"--out={out}", cwd=room)
        one, two = (load_checkpoint(room / f"out/{student}_{kind}/last.pt") for kind in ("whole", "cut"))
        assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
        logs = (lines_of(room / f"out/{student}_{kind}/log.jsonl") for kind in ("whole", "cut"))
        one, two = ([(x["step"], x.get("loss"), x.get("val_loss")) for x in log] for log in logs)
        assert one == two


def test_two_processes_train_as_one(room):
    options = ["--student=out/flow", "--problems=train.jsonl", "--eval", "val.jsonl", "--epochs=1", "--num_eval=2", *SHORT]
    works(*options, "--batch_size=8", "--out=out/one", cwd=room)
    works(*options, "--batch_size=4", "--out=out/two", ranks=2, cwd=room)
    works(*options, "--batch_size=2", "--grad_accum=4", "--out=out/accum", cwd=room)
    one, *others = ([x["loss"] for x in lines_of(room / f"out/{name}/log.jsonl") if "loss" in x] for name in ("one", "two", "accum"))
    assert len(one) == 3
    for other in others:
        assert other == pytest.approx(one, abs=2e-3)
    assert (room / "out/two/eval_after_val.jsonl").exists()


def test_ctrl_c_saves_and_the_newest_run_goes_on(room, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path)
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow/phase3.pt").write_bytes((room / "out/flow/phase3.pt").read_bytes())
    options = [f"--problems={room / 'train.jsonl'}", "--eval", room / "val.jsonl", "--epochs=60", "--num_eval=1", *SHORT]
    process = subprocess.Popen([sys.executable, ROOT / "distill.py", *options, "--fresh"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step") and "loss" in line and "validation" not in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait() == 130 and "the same command without --fresh goes on from there" in rest
    assert "continuing out/flow_distilled/last.pt" in works(*options, cwd=tmp_path)


# ---- bad input ----


def refused(match, *options):
    with pytest.raises(InputError, match=match) as caught:
        distill.main([*options, "--device=cpu"])
    assert "\n" not in str(caught.value)


def test_training_on_what_is_evaluated_is_refused(here):
    write_problems(here / "both.jsonl", lines_of(here / "train.jsonl") + lines_of(here / "val.jsonl")[:3])
    for name in ("test.jsonl", "gsm8k_test.jsonl", "test-00000-of-00001.jsonl"):
        (here / name).write_bytes((here / "train.jsonl").read_bytes())
        refused("is a test split: it may measure a model", "--student=out/flow", f"--problems={name}", "--eval", "val.jsonl")
    folder = here / "test/fold"  # a folder of problems is judged by what is in it, not by what is above it
    (folder / "test").mkdir(parents=True)
    write_problems(folder / "train.jsonl", lines_of(here / "train.jsonl"))
    options = ["--student=out/flow", "--eval", "val.jsonl", "--epochs=1", "--num_eval=1", "--out=out/fold", *SHORT]
    distill.main([f"--problems={folder}", *options])
    for name in ("test.jsonl", "gsm8k_test.jsonl", "test/data.jsonl"):
        (folder / name).write_bytes((here / "train.jsonl").read_bytes())
        refused(f"test/fold/{name} is a test split", f"--problems={folder}", *options, "--skip_bad")
        (folder / name).unlink()
    (folder / "train.jsonl").rename(folder / "test/train.jsonl")
    refused("test/fold/test/train.jsonl is a test split", f"--problems={folder / 'test'}", *options)
    done = call("--student=out/flow", "--problems=both.jsonl", "--eval", "val.jsonl", cwd=here)
    assert done.returncode == 2 and done.stderr == (
        "error: 3 of the 6 questions of val.jsonl are in both.jsonl too: train on other problems\n"
    )


def test_impossible_commands(here):
    base = ["--student=out/flow", "--problems=train.jsonl", "--eval", "val.jsonl"]
    refused("--problems needs --eval", "--problems=train.jsonl")
    refused("--traces needs --eval", "--traces=t.jsonl")
    refused("--trace asks a --teacher", "--trace")
    for option in ("--problems=train.jsonl", "--num_problems=3", "--samples=2", "--samples=0"):
        refused(f"--traces holds .*: leave {option.split('=')[0]} out", "--traces=t.jsonl", "--eval", "val.jsonl", option)
    refused("--traces holds .*: leave --samples out", "--traces=t.jsonl", "--teacher=out/flow", "--samples=0", *base)
    refused("--epochs=0.0 must be positive and below 1000", *base, "--epochs=0")
    refused("--temperature=0.0 must be", *base, "--temperature=0", "--samples=2")
    refused("--kl_weight=2.0 must be between 0 and 1", *base, "--kl_weight=2")
    refused("--kl_weight=0.5 compares logits", *base, "--kl_weight=0.5")
    refused("--out=out/flow holds the student", *base, "--out=out/flow")
    refused("--seed=18446744073709551616", *base, "--seed=18446744073709551616")
    refused("no web address", *base, "--teacher=http://[::1/v1")
    refused("typo.jsonl does not exist", "--student=out/flow", "--traces=typo.jsonl", "--eval", "val.jsonl")
    refused("--rate_penalty=0.1 is for a Pulse", *base, "--rate_penalty=0.1")
    refused("--rate_penalty=-1.0 must be 0 or more", *base, "--rate_penalty=-1")
    refused("40 examples of at most 1,024 tokens, a step takes 64", *base, "--batch_size=64")
    refused("0 examples of at most 8 tokens", *base, "--seq_len=8")
    refused("data/builtin/problems_val.jsonl does not exist", "--student=out/flow")
    refused("out/none holds no checkpoint yet", "--evaluate", "--student=out/none", "--eval", "val.jsonl")
    refused("--teacher=nowhere does not exist", *base, "--teacher=nowhere")
    refused("holds more than an address: a key belongs into OPENAI_API_KEY", *base, "--teacher=http://me:secret@localhost/v1")


def test_checkpoints_that_are_not_this_runs_are_left_alone(here):
    base = ["--student=out/flow", "--problems=train.jsonl", "--eval", "val.jsonl"]
    (here / "out/begun").mkdir()
    unfinished = here / "out/begun/last.pt"
    save_checkpoint(unfinished, load_checkpoint(here / "out/pulse/phase3.pt") | {"phase": 2})
    before = unfinished.read_bytes()
    for fresh in ([], ["--fresh"]):
        refused("--out=out/begun holds a run of train.py, unfinished: name another folder", *base, "--out=out/begun", *fresh)
        refused("--out=out/pulse holds a run of train.py: name another folder", *base, "--out=out/pulse", *fresh)
    assert unfinished.read_bytes() == before
    for teacher in ("out/begun", "out/begun/last.pt"):
        refused("--out=out/begun holds the teacher, whose last.pt the run would replace", *base, "--out=out/begun", f"--teacher={teacher}")
    (here / "out/flow_distilled").mkdir(exist_ok=True)
    refused("--out=out/flow_distilled holds the teacher", *base, "--teacher=out/flow_distilled")
    unfinished.write_bytes(before[:999])
    refused("is cut short or not a checkpoint", *base, "--out=out/begun")
    refused("--teacher=nowhere does not exist", *base, "--out=out/begun", "--fresh", "--teacher=nowhere")  # later: --fresh replaces it


def test_a_student_learns_no_more_than_it_can_read(here, capsys):
    state = load_checkpoint(here / "out/flow/phase3.pt")
    (here / "out/narrow").mkdir()
    save_checkpoint(here / "out/narrow/phase3.pt", state | {"config": state["config"] | {"max_seq_len": 160}})
    rows = Examples([(p["question"], p["answer"]) for p in lines_of(here / "train.jsonl")], tokenizer_of(here), 160)
    assert 4 < len(rows.rows) < 36
    options = ["--problems=train.jsonl", "--eval", "val.jsonl", "--num_eval=3", "--epochs=1", *SHORT]
    distill.main(["--student=out/narrow", *options])
    said = capsys.readouterr().out
    assert "--seq_len=160, not 1024: the student reads no more" in said
    assert f"{len(rows.rows)} examples of" in said and f"; {rows.too_long} longer than --seq_len=160 left out" in said
    distill.main(["--student=out/pulse", "--teacher=out/narrow", "--samples=0", "--out=out/from_narrow", *options])
    assert "--seq_len=160, not 1024: student or teacher reads no more" in capsys.readouterr().out


def test_teachers_that_do_not_fit(here, qwen, tmp_path):
    base = ["--student=out/flow", "--problems=train.jsonl", "--eval", "val.jsonl"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    refused("is a 'llama' model, Flow reads model_type 'qwen3' only", *base, f"--teacher={other}")
    for path in qwen.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "tokenizer.json").write_text("{}")
    refused("tokenizer.json is no tokenizer", *base, f"--teacher={other}")
    (other / "tokenizer.json").write_text(prepare.train_tokenizer([p["question"] for p in word_problems("train", 400)], 340).to_str())
    refused("its tokenizer has 340 tokens, the model 310: they do not belong together", *base, f"--teacher={other}")
    (other / "tokenizer.json").unlink()
    refused("tokenizer.json is missing", *base, f"--teacher={other}")
    state = load_checkpoint(here / "out/flow/phase3.pt")
    state["tokenizer"] = prepare.train_tokenizer([p["question"] for p in word_problems("train", 400)], 320).to_str()
    save_checkpoint(tmp_path / "wrong.pt", state)
    refused("its tokenizer has 320 tokens, the model 300", f"--student={tmp_path / 'wrong.pt'}", *base[1:])
    refused("needs a local --teacher with the tokenizer of", *base, f"--teacher={qwen}", "--samples=0", "--kl_weight=1")
    refused("--samples=0 leaves the logits of .*, which has another tokenizer or none here", *base, f"--teacher={qwen}", "--samples=0")
