"""The proof that a folder of Core ML packages computes what the model computes, and what it would lose on the device.

The packages are read back from disk and run by mil_numpy.py, fed by the Host of predict.py, so that what is verified is what is
shipped, the code around the network included. The parts:

    interface  names, types and shapes that config.json and each package's description promise are the program's
    matrices   those that were compressed against the model's, each within the limit of its --compress
    exact      the program's formulas in fp32 (Pulse: fp64) against PyTorch with the weights of the package: at most 1e-4 on the
               logits, and the same greedy text
    rounded    every result rounded to its declared type against the PyTorch model as it was trained: KL divergence, agreement of the
               likeliest token, bits per byte of validation text
    lint       what in the program would not run on the Neural Engine

Raises InputError, and so leaves no package, where a limit is not kept.
"""

import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from coremltools.proto.FeatureTypes_pb2 import ArrayFeatureType
from tokenizers import Tokenizer

import prepare
from checkpoint import PHASES
from coreml_models import ALIGN, MAX_DIM
from mil_numpy import FP16_MAX, Package, type_of
from model import generate
from predict import Host
from scripts import InputError
from snn_model import Neuron, Pulse

EXACT_LIMIT = 1e-4  # largest difference of a logit in exact arithmetic
GREEDY = 64  # tokens of greedy text that have to be the same
# Limits of the rounded run: mean KL divergence in nats, share of tokens whose likeliest successor is the same, loss per byte
# compared with PyTorch's.
FP16_LIMIT = (1e-3, 0.97, 1.01)
# fp16 flips spikes at the threshold, each a step of one in a count. bf16 matrix products in training do the same to the same degree.
SPIKING_LIMIT = (0.25, 0.0, 1.03)
RUINED_LIMIT = (0.5, 0.0, 1.1)  # compressed weights are worse by as much as they are; a model above this is not worth a package
# Distance of a stored matrix from the model's, relative to its norm. A Gaussian, and trained matrices nearly, lose 0.7 % in int8, 2.5 in
# palette6, 10 in palette4 and int4, heavier tails up to four times as much; a matrix of zeros is 100 % away.
MATRIX_LIMITS = {"none": 0.0, "int8": 0.05, "palette6": 0.12, "palette4": 0.25, "int4": 0.25}
SPECIFICATION = 9  # of iOS 18
PACKAGE_LIMIT = 1e9  # bytes; larger programs are refused by the Neural Engine of many devices (experience of others, not documented)


def validation_text(data: Path | None, checkpoint: dict, model, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens to verify with: validation text of the checkpoint's phase, or if there is no such data, text of the model itself."""
    folder = data or Path("data/builtin")
    phase = checkpoint["phase"] if checkpoint["phase"] in PHASES else 2  # a distilled model has learned problems, as in phase 2
    fingerprint = prepare.tokenizer_fingerprint(checkpoint["tokenizer"])
    try:
        path = prepare.shard_paths(folder, phase, "val")[0]
        tokens = np.asarray(prepare.read_shard(path, model.config.vocab_size, fingerprint)[1][:4096], np.int64)
        if len(tokens) < 3 * GREEDY:
            raise InputError(f"{path} holds {len(tokens)} tokens, verification needs {3 * GREEDY}")
        return tokens
    except InputError as problem:
        if data is not None:
            raise
        print(f"verifying with text that the model writes itself ({problem}); --data=FOLDER takes validation text")
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    limit = min(getattr(model.config, "max_seq_len", 1024), 1024)
    ids = [0] + [int(t) for t in generate(model, [[0]], limit - 1)]
    torch.set_rng_state(generator_state)
    return np.array(ids)


def described(features) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a package's description says of inputs, outputs or states: {name: (data type, shape)}."""
    arrays = {f.name: f.type.stateType.arrayType if f.type.WhichOneof("Type") == "stateType" else f.type.multiArrayType for f in features}
    return {name: (ArrayFeatureType.ArrayDataType.Name(array.dataType), tuple(array.shape)) for name, array in arrays.items()}


def interface(folder: Path, contract: dict, packages: list[Package], tokenizer_json: str) -> None:
    """Core ML goes by the description and programs by config.json: both have to say what the verified program has."""

    def check(what: str, found, expected):
        if found != expected:
            raise InputError(f"{what} is not what was verified: it was not written; this is a bug in the conversion, please report it")

    read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check("config.json", read, json.loads(json.dumps(contract)))
    check("tokenizer.json", (folder / "tokenizer.json").read_text(encoding="utf-8"), tokenizer_json)
    for package, part in zip(packages, read["packages"]):
        spec, where = package.spec, package.path.name
        check(f"{where}: the version", spec.specificationVersion, SPECIFICATION)
        check(f"{where}: the default function", spec.description.defaultFunctionName, "decode")
        meta = spec.description.metadata.userDefined
        check(f"{where}: the metadata", (meta["contract"], meta["tokenizer"]), (json.dumps(contract), tokenizer_json))
        functions = {f.name: f for f in spec.description.functions}
        check(f"{where}: the list of functions", (functions.keys(), set(package.functions)), (part["functions"].keys(),) * 2)
        caches = {name: ("FLOAT16", tuple(shape)) for name, shape in part["caches"].items()}
        travel, states = ({}, caches) if read["stateful"] else (caches, {})
        for name, shapes in part["functions"].items():
            program, told = package.function(name), functions[name]
            inputs = {n: ("INT32" if n == "position" else "FLOAT16", tuple(shape)) for n, shape in shapes.items()} | travel
            check(f"{where}: {name}'s inputs", (described(told.input), program.inputs), (inputs, inputs))
            check(f"{where}: {name}'s states", (described(told.state), program.states), (states, states))
            check(f"{where}: {name}'s outputs", described(told.output), program.outputs)
            check(f"{where}: {name}'s outputs", list(program.outputs), [*part["logits"], *(f"{cache}_new" for cache in travel)])


def host(folder: Path, contract: dict, packages: list[Package], rounded: bool, dtype) -> tuple[Host, list]:
    """A Host that runs the packages by numpy, and the functions it runs."""
    functions = [{n: p.function(n, rounded, dtype) for n in ("prefill", "decode")} for p in packages]
    states = [f["decode"].init_state() for f in functions]
    embeddings = np.fromfile(folder / "embeddings.bin", np.float16).reshape(contract["embeddings"])

    def run(number: int, function: str, inputs: dict) -> dict:
        return functions[number][function](inputs, states[number])

    return Host(contract, embeddings, run, np.float16 if rounded else dtype), [f for pair in functions for f in pair.values()]


def package_weights(model, packages: list[Package], nets: list, dtype) -> tuple[torch.nn.Module, dict]:
    """(the model with the weights that the packages hold, what compression did to each matrix).

    Weights in fp16 are the model's, rounded. A matrix that was compressed is taken out of the package: the network of
    coreml_models.py shares the memory of the model's weights and has the names that the program's constants have.
    """
    # The package holds sqrt(eps) in fp16 too: a difference of 4e-4 that would flip a spike now and then.
    root_eps = float(np.float16(model.config.norm_eps**0.5))
    reference = type(model)(dataclasses.replace(model.config, norm_eps=root_eps**2))
    reference.load_state_dict(model.state_dict())
    # The head is compressed, the rows of the embedding are not.
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())
    if isinstance(reference, Pulse):  # what was mapped is rounded to fp16, not the map
        reference.token_embedding.weight = torch.nn.Parameter(model.input_table().detach())
        torch.nn.init.eye_(reference.input_map)
    # Of a leak that no gate changes the package holds 1 - beta, not the logit that is learned.
    ungated = [m for m in reference.modules() if isinstance(m, Neuron) and m.leaky and m.gate_gain is None]
    steps = [1 - neuron.leak.detach().sigmoid() for neuron in ungated]
    for p in reference.parameters():
        p.data = p.data.half().float()
    if isinstance(reference, Pulse):  # of the token's shares the package holds how much is added from block to block
        first, more = model.token_share.detach()[:1], model.token_share.detach().diff()
        reference.token_share.data = torch.cat([first, more]).half().float().cumsum(0)
    errors, kept = {}, []
    for package, make in zip(packages, nets):
        held = package.function("decode").constants
        net = make(1, model=reference)
        matrices = {n: p for n, p in net.named_parameters() if n.endswith("weight")}
        before = {n: p.detach().clone() for n, p in matrices.items()}
        for name, p in matrices.items():
            # coremltools stores equal weights once, under the name of one of them.
            names = [name, *(n for n in before if n != name and torch.equal(before[n], before[name]))]
            prefixes = [f"net_{n.replace('.', '_')}_to_fp16" for n in names]
            found = [held[n] for prefix in prefixes for n in held if n == prefix or n.startswith(f"{prefix}_")]
            weights = next((w for w in found if w.shape == tuple(p.shape)), None)
            if weights is None:
                raise InputError(f"{package.path.name} has no weights called {prefixes[0]}: this is a bug, please report it")
            new = torch.from_numpy(np.array(weights))
            error = float((new - p).norm() / p.norm().clamp(min=1e-12))  # a matrix may be all zero
            if error != 0:  # nan too
                errors[f"{package.path.name} {name}"] = error
            else:
                kept.append(f"{package.path.name} {name}")
            p.data.copy_(new)
    reference.to(dtype)
    for neuron, step in zip(ungated, steps):
        neuron.leak.data = -step.half().to(dtype).logit()
    return reference.eval(), {"errors": errors, "kept": kept}


def exact(folder: Path, contract: dict, packages: list[Package], reference, prompt: list[int]) -> dict:
    """A prompt longer than the window, then greedy text, against PyTorch at every step."""
    dtype = np.float64 if contract["kind"] == "pulse" else np.float32  # in fp32 a membrane can lie on the other side of the threshold
    machine, functions = host(folder, contract, packages, False, dtype)
    with torch.inference_mode():
        state = reference.init_state(1, len(prompt) + GREEDY)
        logits, worst, ids, text = None, 0.0, prompt, []
        for _ in range(GREEDY):
            logits = machine.feed(ids)
            expected = reference(torch.tensor([ids]), state=state)[0][0, -1].numpy()
            worst = max(worst, float(np.abs(logits - expected).max()) if np.isfinite(logits).all() else math.inf)
            text.append((int(logits.argmax()), int(expected.argmax())))
            ids = [text[-1][1]]
    same = sum(ours == theirs for ours, theirs in text)
    result = {"prompt_tokens": len(prompt), "greedy_tokens": GREEDY, "same_greedy_tokens": same, "max_logit_difference": worst,
              "arithmetic": np.dtype(dtype).name}
    if not worst <= EXACT_LIMIT or same < GREEDY:
        raise InputError(
            f"the package differs from PyTorch: logits by {worst:.2g} (at most {EXACT_LIMIT:g}), {same} of {GREEDY} greedy tokens the "
            "same: it was not written; this is a bug in the conversion, please report it"
        )
    return result | {"peaks": peaks(functions)}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max()
    return logits - np.log(np.exp(logits).sum())


def rounded(folder: Path, contract: dict, packages: list[Package], model, ids: list[int], n_prompt: int, n_bytes: np.ndarray) -> dict:
    """Text token by token behind a prompt, in the arithmetic of the device, against the model as trained."""
    machine, functions = host(folder, contract, packages, True, np.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids]))[0][0].double().log_softmax(-1).numpy()
    kl, agree, nats, nats_torch, size = [], [], 0.0, 0.0, 0
    for t in range(n_prompt, len(ids)):
        logits = machine.feed(ids[:t] if t == n_prompt else ids[t - 1 : t])
        if not np.isfinite(logits).all():
            raise InputError(f"the package computes {logits[~np.isfinite(logits)][0]} in fp16 after {t} tokens: it was not written")
        ours, theirs = log_softmax(logits), expected[t - 1]
        kl.append(float((np.exp(theirs) * (theirs - ours)).sum()))
        agree.append(int(ours.argmax()) == int(theirs.argmax()))
        nats, nats_torch, size = nats - ours[ids[t]], nats_torch - theirs[ids[t]], size + int(n_bytes[ids[t]])
    bits = math.log(2) * max(size, 1)
    result = {"tokens": len(kl), "kl": float(np.mean(kl)), "kl_max": float(np.max(kl)), "argmax_agreement": float(np.mean(agree)),
              "bits_per_byte": nats / bits, "bits_per_byte_torch": nats_torch / bits}
    limit = RUINED_LIMIT if contract["compress"] != "none" else SPIKING_LIMIT if contract["kind"] == "pulse" else FP16_LIMIT
    if result["kl"] > limit[0] or result["argmax_agreement"] < limit[1] or nats > limit[2] * nats_torch:
        raise InputError(
            f"the package is too far from the model: KL {result['kl']:.2g} (at most {limit[0]:g}), the same likeliest token in "
            f"{result['argmax_agreement']:.1%} (at least {limit[1]:.0%}), loss {nats / nats_torch - 1:+.1%} (at most {limit[2] - 1:+.0%}): "
            "it was not written; try a weaker --compress"
        )
    return result | {"peaks": peaks(functions)}


def peaks(functions: list) -> dict[str, float]:
    """The largest magnitudes of fp16 results that occurred, those that a softmax takes left out."""
    everything = {}
    for function in functions:
        for name, value in function.peaks.items():
            everything[name] = max(everything.get(name, 0.0), value)
    return dict(sorted(everything.items(), key=lambda item: -item[1])[:5])


# ---- what would fall off the Neural Engine ----


def lint(package: Package, overflow: dict[str, float]) -> list[str]:
    """One line per kind of thing in the program that the Neural Engine does not run, or runs badly."""
    found = {}

    def note(problem: str, where: str):
        found.setdefault(problem, []).append(where)

    for function in package.functions:
        states = {i.name: type_of(i.type) for i in package.functions[function].inputs if i.type.WhichOneof("type") == "stateType"}
        for name, (dtype, shape) in states.items():
            if dtype != "FLOAT16":
                note("states that are not fp16", f"{function}/{name}")
            if shape[-1] % ALIGN:
                note(f"states whose last dimension is no multiple of {ALIGN}", f"{function}/{name}")
        for op in package.operations(function):
            for out in op.outputs:
                dtype, shape = type_of(out.type)
                where = f"{function}/{out.name}"
                if op.type == "constexpr_blockwise_shift_scale":
                    scale = type_of(op.inputs["scale"].arguments[0].value.type)[1] if "scale" in op.inputs else ()
                    if sum(n > 1 for n in scale) > 1:
                        note("weights with a scale per block", where)
                if op.type == "const" and len(shape) < 2:
                    continue
                if op.type != "const" and shape and dtype in ("FLOAT32", "BOOL"):
                    note(f"{dtype.lower()} tensors", where)
                if len(shape) > 5:
                    note("tensors of more than 5 dimensions", where)
                if None in shape:
                    note("dimensions that are not fixed", where)
                if any(n and n > MAX_DIM for n in shape):
                    note(f"dimensions above {MAX_DIM:,}", where)
                if op.type.startswith("gather") or op.type == "cast":
                    note(f"the operation {op.type}", where)
    if package.size() > PACKAGE_LIMIT:
        note(f"a package of {package.size() / 1e9:.1f} GB: convert with more --chunks", package.path.name)
    for name, value in overflow.items():
        if value > FP16_MAX:
            note("values that fp16 cannot hold", f"{name} ({value:.3g})")
    return [f"{problem}: {len(places)}, such as {places[0]}" for problem, places in found.items()]


# ---- all of it ----


def verify(folder: Path, contract: dict, model, nets: list, text: np.ndarray, tokenizer_json: str) -> dict:
    """Run all parts on the packages of a folder, print and return the report. Raises InputError when a limit is not kept."""
    start = time.perf_counter()
    packages = [Package(folder / part["file"]) for part in contract["packages"]]
    interface(folder, contract, packages, tokenizer_json)
    large = model.config.num_params() > 20e6
    # Beyond the window, with whole chunks and a remainder.
    window = getattr(model.config, "window", 64)
    n_prompt = min(window + contract["prefill"] + 3, (contract["context"] or math.inf) - GREEDY, len(text) - GREEDY)
    n_text = min(n_prompt + (GREEDY if large else 4 * GREEDY), contract["context"] or math.inf, len(text))
    ids = text[:n_text].tolist()
    dtype = torch.float64 if contract["kind"] == "pulse" else torch.float32
    reference, compression = package_weights(model, packages, nets, dtype)
    errors, limit = compression["errors"], MATRIX_LIMITS[contract["compress"]]
    if far := [name for name in errors if not errors[name] <= limit]:
        remedy = "try a weaker --compress" if limit else "this is a bug, please report it"
        raise InputError(f"{far[0]} is {errors[far[0]]:.1%} away from the model's (at most {limit:.0%}): it was not written; {remedy}")
    report = {"files": {p.path.name: p.size() for p in packages}, "contract": {k: v for k, v in contract.items() if k != "packages"}}
    report["exact"] = exact(folder, contract, packages, reference, ids[:n_prompt])
    del reference
    n_bytes = prepare.token_bytes(Tokenizer.from_str(tokenizer_json))
    n_bytes = np.pad(n_bytes, (0, max(0, model.config.vocab_size - len(n_bytes))))  # rows without a token, of imported models
    report["rounded"] = rounded(folder, contract, packages, model, ids, n_prompt, n_bytes)
    overflow = report["exact"]["peaks"] | report["rounded"]["peaks"]
    report["compression"] = compression
    report["lint"] = {p.path.name: lint(p, overflow) for p in packages}
    report["seconds"] = time.perf_counter() - start
    show(report, contract)
    return report


def show(report: dict, contract: dict) -> None:
    size, e, r, c = sum(report["files"].values()), report["exact"], report["rounded"], report["compression"]
    print(f"{', '.join(report['files'])}: {size / 1e6:.2f} MB, {8 * size / contract['parameters']:.1f} bits per parameter")
    print(f"exact ({e['arithmetic']}): logits within {e['max_logit_difference']:.1e} of PyTorch over {e['prompt_tokens']} + "
          f"{e['greedy_tokens']} tokens, {e['same_greedy_tokens']} greedy tokens the same")
    print(f"rounded: KL {r['kl']:.1e}, likeliest token the same in {r['argmax_agreement']:.1%} of {r['tokens']}, "
          f"{r['bits_per_byte']:.4f} bits per byte (PyTorch {r['bits_per_byte_torch']:.4f})")
    if contract["compress"] != "none":
        mean = np.mean(list(c["errors"].values())) if c["errors"] else 0
        print(f"compressed: {len(c['errors'])} matrices, mean relative error {mean:.1%}; left in fp16: {', '.join(c['kept']) or 'none'}")
    problems = [f"{file}: {line}" for file, lines in report["lint"].items() for line in lines]
    print("Neural Engine: nothing in the program speaks against it" if not problems else "Neural Engine: " + "; ".join(problems))
