"""Hugging Face folders: written from a checkpoint, read again, and published on the Hub.

Flow goes out as a Qwen3ForCausalLM, which transformers loads without code of this project. Other engines that know Qwen3 may not know
that some layers have a sliding window (README, "To Hugging Face"). Pulse goes out as safetensors and config.json, which nothing but this
project reads.

    python convert.py --to=hf                           # writes out/<run>-hf
    python convert.py --to=hf --push=user/name          # and publishes it; log in first with `hf auth login`
"""

import errno
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from curves import read_log
from huggingface import hf_name, read_json, read_weights
from model import Flow, FlowConfig
from scripts import InputError
from shards import load_meta
from snn_model import Pulse, PulseConfig

# What prepare.render_chat writes, behind the <|endoftext|> with which every document begins.
CHAT_TEMPLATE = (
    "{{ '<|endoftext|>' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen3_config(config: FlowConfig, ends: list[int], start: int, pad: int) -> dict:
    """config.json of a Flow, in transformers' notation of today and in that before version 5."""
    layers = range(config.n_layer)
    slides = [not config.is_global(i) for i in layers]
    return {
        "made_by": "SLMS", "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "float32", "torch_dtype": "float32",
        "vocab_size": config.vocab_size, "hidden_size": config.d_model, "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim, "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "attention_bias": False,
        "attention_dropout": 0.0, "tie_word_embeddings": config.tie_embeddings, "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "use_sliding_window": any(slides), "sliding_window": config.window, "max_window_layers": config.n_layer,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
        "bos_token_id": start, "eos_token_id": ends, "pad_token_id": pad, "use_cache": True,
    }  # fmt: skip


def is_imported(checkpoint: dict) -> bool:
    """Whether a model, or the one that it was trained from, came from elsewhere: it has a licence and an author of its own."""
    return checkpoint.get("imported", not checkpoint["phase"])


def card(model: nn.Module, kind: str, figures: list[dict], imported: bool) -> str:
    """README.md of the folder: what the model is, how it did on validation text, how to run it. What an imported model was trained
    with, and its licence, are not known here."""
    trained = "" if imported else ", trained with SLMS"
    lines = ["---", *([] if imported else ["license: mit"]), "pipeline_tag: text-generation"]
    lines += ["library_name: transformers"] if kind == "flow" else []
    lines += ["---", "", f"# {kind.capitalize()}, {model.config.num_params():,} parameters", ""]
    if kind == "flow":
        n, start = model.config.n_layer, "" if imported else "<|endoftext|>"
        sliding = sum(not model.config.is_global(i) for i in range(n))
        windows = f" with sliding windows in {sliding} of {n} layers" if sliding else ""
        lines += [f"A transformer of the Qwen3 type{windows}{trained}.", ""]
        if sliding:
            lines += ["An engine that ignores `layer_types` of config.json attends to everything in every layer and writes worse.", ""]
        lines += ["```python"]
        lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += ["model = AutoModelForCausalLM.from_pretrained(FOLDER)", "tokenizer = AutoTokenizer.from_pretrained(FOLDER)"]
        lines += [f'ids = tokenizer("{start}The function", return_tensors="pt")']
        lines += ["print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))", "```"]
    else:
        lines += [f"A spiking neural network{trained}. SLMS is needed to run it:", "", "```python"]
        lines += ["from publish import read_folder", "", "model, tokenizer = read_folder(FOLDER)", "```"]
    if not imported:
        lines += ["", "Every document begins with `<|endoftext|>`, and so should a prompt; the chat template does it by itself."]
    if figures:
        lines += ["", "| phase | steps | tokens | validation loss (nats per token) | bits per byte |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {f['phase']} | {f['step']:,} | {f['tokens']:,} | {f['val_loss']:.3f} | {f['val_bpb']:.3f} |" for f in figures]
        lines += ["", "Each phase is measured on its own validation text."]
    lines += ["", "A small model: it imitates the form of its training text and is not a source of facts."]
    return "\n".join(lines) + "\n"


def measured(log: Path, phase: int, step: int) -> list[dict]:
    """The last evaluation of each phase in a run's log.jsonl, up to a step of a phase; none if there is no log."""
    last = {line["phase"]: line for line in read_log(log) if "val_bpb" in line and (line["phase"], line["step"]) <= (phase, step)}
    return [last[n] for n in sorted(last)]


def write_folder(folder: Path, model: nn.Module, checkpoint: dict, run: Path) -> None:
    """A Hugging Face folder of a model: config, weights, tokenizer, chat template, card. `run` is where the log lies."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from tokenizers import Tokenizer

    kind, tokenizer, imported = checkpoint["model"], Tokenizer.from_str(checkpoint["tokenizer"]), is_imported(checkpoint)
    start, _, turn_end, pad = (tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"))
    ends, pad_token = [start, turn_end], "<|endoftext|>" if pad is None else "<|pad|>"
    pad = start if pad is None else pad  # an imported tokenizer without <|pad|>: transformers would add one beyond the embedding

    def write(name: str, content: dict) -> None:
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    weights = {name: p.detach().contiguous() for name, p in model.state_dict().items()}
    if kind == "pulse" or model.config.tie_embeddings:
        del weights["lm_head.weight"]  # the same numbers as the embedding's, stored once
    if kind == "flow":
        weights = {hf_name(name): p for name, p in weights.items()}
        write("config.json", {"imported": imported} | qwen3_config(model.config, ends, start, pad))
        sampling = {"do_sample": False, "bos_token_id": start, "eos_token_id": ends, "pad_token_id": pad}
        write("generation_config.json", sampling)
    else:
        write("config.json", {"made_by": "SLMS", "imported": imported, "model_type": "pulse", **asdict(model.config)})
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as problem:  # no OSError, whatever went wrong
        raise OSError(errno.ENOSPC, f"cannot be written ({problem})", str(folder / "model.safetensors")) from problem
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets nobody but the owner read
    (folder / "tokenizer.json").write_text(checkpoint["tokenizer"], encoding="utf-8")
    write(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
            "pad_token": pad_token, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "add_bos_token": False,
            "clean_up_tokenization_spaces": False, "model_max_length": getattr(model.config, "max_seq_len", 1_000_000),
            "chat_template": CHAT_TEMPLATE,
        },
    )  # fmt: skip
    figures = measured(run / "log.jsonl", checkpoint["phase"], checkpoint["step"])
    (folder / "README.md").write_text(card(model, kind, figures, imported), encoding="utf-8")


def read_folder(folder: str | Path):
    """(model in eval mode, Tokenizer) of a folder that write_folder wrote. Raises InputError when something is missing or broken."""
    from tokenizers import Tokenizer

    folder = Path(folder)
    try:
        config = read_json(folder / "config.json")
        if config.get("model_type") == "pulse":
            config = {name: value for name, value in config.items() if name not in ("made_by", "imported", "model_type")}
            model = Pulse(PulseConfig(**config))
            if missing := vars(model.config).keys() - config.keys():  # they would be today's defaults
                raise ValueError(f"its config.json, of another version, lacks {', '.join(sorted(missing))}")
            weights = read_weights(folder, torch.float32)
            model.load_state_dict(weights | {"lm_head.weight": weights["token_embedding.weight"]})
        else:
            model = Flow.from_pretrained(folder)
        tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as problem:  # what a foreign or broken folder makes of a reader
        raise InputError(f"{folder} is not a folder of `convert.py --to=hf` ({problem})".splitlines()[0]) from problem
    try:
        return model.eval(), Tokenizer.from_str(tokenizer_json)
    except Exception as problem:  # tokenizers raises bare Exceptions
        raise InputError(f"{folder}/tokenizer.json is no tokenizer ({problem}): write the folder again") from problem


def push(folder: Path, name: str, kind: str = "model", card: str | None = None) -> None:
    """Publish a folder as the Hub's `name` (user/name) of kind "model" or "dataset", with `card` as its README.md if given.

    The token is huggingface_hub's own business: HF_TOKEN or what `hf auth login` stored. Raises InputError when the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

    api, again = HfApi(), f"{folder} is written"
    try:
        repo = api.create_repo(name, repo_type=kind, exist_ok=True, token=True)
        files = [CommitOperationAdd(p.name, p) for p in sorted(folder.iterdir()) if p.is_file()]
        files += [CommitOperationAdd("README.md", card.encode())] if card else []
        api.create_commit(repo.repo_id, files, commit_message="SLMS", repo_type=kind, token=True)
    except HFValidationError as problem:
        raise InputError(f"--push={name} is not a name of the form user/name: {again}") from problem
    except LocalTokenNotFoundError as problem:
        raise InputError(f"--push={name} needs a token: run `hf auth login` first; {again}") from problem
    except HfHubHTTPError as problem:
        why = problem.response.status_code
        raise InputError(f"--push={name} was refused by the Hub ({why}): check the name and `hf auth login`; {again}") from problem
    except (OSError, HTTPError) as problem:
        raise InputError(f"--push={name} did not reach the Hub ({type(problem).__name__}): {again}") from problem
    print(f"published {repo}")


def push_data(folder: str | Path, name: str) -> None:
    """Publish a data folder of prepare.py, with a card made of its meta.json. Raises InputError when there is none, or as push."""
    meta = load_meta(folder)
    lines = ["---", "license: other", "task_categories: [text-generation]", "---", "", f"# {name.split('/')[-1]}", ""]
    lines += [f"Token shards of SLMS: a header of 256 int32, then uint16 tokens of `tokenizer.json` ({meta['vocab_size']:,} tokens).", ""]
    lines += ["| phase | split | documents | bytes | tokens | sources |", "| --- | --- | --- | --- | --- | --- |"]
    for phase, splits in meta["phases"].items():
        for split, total in splits.items():
            counts = f"{total['documents']:,} | {total['bytes']:,} | {total['tokens']:,}"
            lines.append(f"| {phase} | {split} | {counts} | {', '.join(meta['sources'][phase])} |")
    lines += ["", "The licence is that of the sources; state it before you publish."]
    push(Path(folder), name, "dataset", "\n".join(lines) + "\n")
