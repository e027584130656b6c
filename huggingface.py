"""Qwen3 folders of Hugging Face in Flow's terms: what config.json says as the fields of a FlowConfig, the names and the weights.

Flow.from_pretrained reads a folder with these functions; nothing here knows the model itself.
"""

import json
from pathlib import Path

import torch
from torch import Tensor


def hf_name(name: str) -> str:
    """The name of one of Flow's weights in a Qwen3ForCausalLM."""
    for ours, theirs in (
        ("token_embedding.", "model.embed_tokens."),
        ("layers.", "model.layers."),
        (".attn_norm.", ".input_layernorm."),
        (".mlp_norm.", ".post_attention_layernorm."),
        (".attn.", ".self_attn."),
    ):
        name = name.replace(ours, theirs)
    return f"model.{name}" if name == "norm.weight" else name


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path} is not JSON ({problem}): download the folder again") from problem
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: download the folder again")
    return content


def typed(fields: dict, name: str, kind: type, *default):
    """A field of this type, whole numbers for float too. Raises ValueError when it is another, or is missing or null without a default."""
    value = fields.get(name)
    if value is None and default:
        return default[0]
    if type(value) is not kind and not (kind is float and type(value) is int):  # a bool is no number here
        found = "missing" if value is None else json.dumps(value)[:60]
        raise ValueError(f"{name} is {found}, expected {kind.__name__}: download the folder again")
    return kind(value)


def config_from_hf(folder: Path) -> dict:
    """The fields of a FlowConfig from the config.json of a Qwen3 model, old notation or new.

    Raises FileNotFoundError when there is none, ValueError for what Flow cannot do and for fields that are missing or of a wrong type.
    """
    hf = read_json(folder / "config.json")
    if hf.get("model_type") != "qwen3":
        raise ValueError(f"{folder} is a {hf.get('model_type')!r} model, Flow reads model_type 'qwen3' only")
    rope = typed(hf, "rope_parameters", dict, None) or typed(hf, "rope_scaling", dict, {})
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default" or any(isinstance(v, dict) for v in rope.values())
    if scaled or typed(hf, "attention_bias", bool, False) or hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder} uses scaled RoPE, attention biases or another activation than SiLU, which Flow does not have")
    n_layer, n_head, d_model = (typed(hf, name, int) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    if n_head < 1:
        raise ValueError(f"num_attention_heads is {n_head}, expected at least 1: download the folder again")
    sliding_window, max_seq_len = typed(hf, "sliding_window", int, None), typed(hf, "max_position_embeddings", int)
    types = typed(hf, "layer_types", list, None)
    if types is None:  # before layer_types: the layers from max_window_layers on slide, when sliding is switched on at all
        slides = typed(hf, "use_sliding_window", bool, False) and sliding_window
        slide_from = typed(hf, "max_window_layers", int, 28) if slides else n_layer
        types = ["full_attention" if i < slide_from else "sliding_attention" for i in range(n_layer)]
    global_layers = tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    if any(kind not in ("full_attention", "sliding_attention") for kind in types) or len(types) != n_layer:
        kinds = "full_attention and sliding_attention"
        raise ValueError(f"{folder} has layer_types {sorted(set(map(str, types)))} for {n_layer} layers, Flow knows {kinds}")
    # The usual pattern keeps its short name, so that export and import give the same config.
    every = global_layers[0] + 1 if global_layers else n_layer + 1
    regular = global_layers == tuple(i for i in range(n_layer) if (i + 1) % every == 0)
    return dict(
        vocab_size=typed(hf, "vocab_size", int),
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=typed(hf, "num_key_value_heads", int, None) or n_head,
        d_model=d_model,
        head_dim=typed(hf, "head_dim", int, None) or d_model // n_head,
        d_ff=typed(hf, "intermediate_size", int),
        window=sliding_window or max_seq_len,
        global_every=every,
        rope_theta=typed(rope, "rope_theta", float, typed(hf, "rope_theta", float, 10_000.0)),
        norm_eps=typed(hf, "rms_norm_eps", float),
        max_seq_len=max_seq_len,
        tie_embeddings=typed(hf, "tie_word_embeddings", bool, False),
        global_layers=None if regular else global_layers,
    )


def read_weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of a folder's safetensors files, sharded or not, under their Hugging Face names.

    Raises FileNotFoundError when a file is missing, ValueError when one is cut short or the index names no files.
    """
    from safetensors import SafetensorError, safe_open

    index, shards, weights = folder / "model.safetensors.index.json", ["model.safetensors"], {}
    if index.exists():
        shards = list(typed(read_json(index), "weight_map", dict).values())
        if not all(isinstance(shard, str) for shard in shards):
            raise ValueError(f"{index} names a file that is no text: download the folder again")
    for shard in sorted(set(shards)):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard} is missing: download the folder again")
        try:
            with safe_open(folder / shard, framework="pt") as file:
                weights.update((name, file.get_tensor(name).to(dtype)) for name in file.keys())
        except SafetensorError as problem:
            raise ValueError(f"{folder / shard} is not a whole safetensors file ({problem}): download it again") from problem
    return weights
