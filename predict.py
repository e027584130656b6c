"""Let a converted model write on a Mac. convert.py puts this file beside its packages; it needs nothing else of the project.

    pip install coremltools tokenizers numpy
    python predict.py --prompt="Once upon a time"
    python predict.py --placement           # which operations run on the Neural Engine, the GPU or the CPU

What happens around the network stands in Host: rows of the embedding, RoPE's angles, masks, chunks of the prompt. The same code ran
when the packages were verified, with a numpy interpreter in the place of Core ML. What needs Core ML, the rest of this file, was
never run by its makers, who had no Mac.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

MASKED = -1e4  # exp of it is 0 in fp16 and fp32, and a score added to it does not overflow


class Host:
    """Feeds tokens to the packages of a folder.

    `contract` is the folder's config.json; `embeddings` [V, C]; `run(package, function, inputs) -> outputs` executes one function;
    `dtype` is the type of the inputs, fp16 on the device.
    """

    def __init__(self, contract: dict, embeddings: np.ndarray, run: Callable[[int, str, dict], dict], dtype=np.float16):
        self.contract, self.embeddings, self.run, self.dtype, self.position = contract, embeddings, run, dtype, 0
        # Without states the caches travel: they are zero at first, and what comes out goes in again.
        travel = [{} if contract["stateful"] else part["caches"] for part in contract["packages"]]
        self.caches = [{name: np.zeros(shape, dtype) for name, shape in caches.items()} for caches in travel]

    def inputs(self, ids: list[int], shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
        """The inputs of a function for these tokens, all but what the package before gives."""
        model, Q, start = self.contract["model"], len(ids), self.position
        made = {"position": np.array([start], np.int32)}
        rows = self.embeddings[ids].astype(self.dtype)  # [Q, C]
        channels_first = self.contract["target"] == "ane"
        made["x"] = made["token"] = rows.T if channels_first else rows
        if "cos" in shapes:
            D = model["head_dim"]
            frequency = np.float32(model["rope_theta"]) ** -(np.arange(0, D, 2, dtype=np.float32) / np.float32(D))
            angles = np.arange(start, start + Q, dtype=np.float32)[:, None] * frequency  # [Q, D/2]
            angles = angles.T if channels_first else angles
            made["cos"], made["sin"] = np.cos(angles), np.sin(angles)
        query = np.arange(start, start + Q)[:, None]
        for name, window in (("mask_full", None), ("mask_window", model.get("window"))):
            if name in shapes:
                # A full cache has token p at place p; a sliding one ends with the newest token.
                S = shapes[name][-1]
                key = np.arange(S) if window is None else np.arange(start + Q - S, start + Q)
                seen = (key >= 0) & (key <= query) & (True if window is None else key > query - window)
                made[name] = np.where(seen, 0, MASKED)
        return {n: made[n].reshape(s).astype(np.int32 if n == "position" else self.dtype) for n, s in shapes.items()}

    def step(self, ids: list[int]) -> np.ndarray:
        """One chunk through all packages -> logits [V] of its last token."""
        function = "decode" if len(ids) == 1 else "prefill"
        x = None
        for number, (package, caches) in enumerate(zip(self.contract["packages"], self.caches)):
            shapes = package["functions"][function]
            inputs = self.inputs(ids, shapes)
            if x is not None:
                inputs["x"] = x.astype(self.dtype).reshape(shapes["x"])
            outputs = self.run(number, function, inputs | caches)
            self.caches[number] = {name: outputs[f"{name}_new"].astype(self.dtype) for name in caches}
            x = outputs.get("hidden")
        self.position += len(ids)
        return np.concatenate([np.asarray(outputs[name]).ravel() for name in package["logits"]])

    def feed(self, ids: list[int]) -> np.ndarray:
        """Read tokens, in whole chunks as long as there are any, then one by one -> logits [V] of the last one.

        A chunk filled up with padding would spoil a rolling cache or a membrane, so there is none. Raises ValueError when the
        context is full.
        """
        context, chunk, logits = self.contract["context"], self.contract["prefill"], None
        if context is not None and self.position + len(ids) > context:
            raise ValueError(f"{self.position + len(ids)} tokens, the packages were made for {context}: convert with a larger --context")
        if not ids:
            raise ValueError("no tokens: begin with <|endoftext|>")
        while ids:
            n = chunk if len(ids) >= chunk else 1
            logits, ids = self.step(ids[:n]), ids[n:]
        return logits

    def generate(self, ids: list[int], new: int, choose: Callable[[np.ndarray], int]) -> Iterator[int]:
        """Token ids behind a prompt, `new` at most, up to a stop token."""
        logits = self.feed(ids)
        for n in range(new):
            token = choose(logits)
            if token in self.contract["stop_ids"]:
                return
            yield token
            if n + 1 < new:
                logits = self.feed([token])


def sampler(temperature: float, seed: int) -> Callable[[np.ndarray], int]:
    """Logits [V] -> a token id: the likeliest at temperature 0, else drawn."""
    rng = np.random.default_rng(seed)

    def choose(logits: np.ndarray) -> int:
        if temperature == 0:
            return int(logits.argmax())
        p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
        return int(rng.choice(len(p), p=p / p.sum()))

    return choose


def coreml(folder: Path, contract: dict) -> Callable[[int, str, dict], dict]:
    """`run` for Host by Core ML. Untested: there was no Mac."""
    import coremltools as ct

    units = ct.ComputeUnit.CPU_AND_NE if contract["target"] == "ane" else ct.ComputeUnit.CPU_AND_GPU
    paths = [str(folder / package["file"]) for package in contract["packages"]]
    loaded = [{f: ct.models.MLModel(p, compute_units=units, function_name=f) for f in ("prefill", "decode")} for p in paths]
    states = [models["decode"].make_state() if contract["stateful"] else None for models in loaded]

    def run(number: int, function: str, inputs: dict) -> dict:
        return loaded[number][function].predict(inputs, state=states[number])

    return run


def placement(folder: Path, contract: dict) -> None:
    """Print how many operations of each function Core ML would run where. Untested: there was no Mac."""
    import coremltools as ct

    for package in contract["packages"]:
        compiled = ct.models.utils.compile_model(str(folder / package["file"]))
        plan = ct.models.compute_plan.MLComputePlan.load_from_path(compiled, compute_units=ct.ComputeUnit.ALL)
        for name, function in plan.model_structure.program.functions.items():
            usage = [plan.get_compute_device_usage_for_mlprogram_operation(op) for op in function.block.operations]
            devices = Counter(type(u.preferred_compute_device).__name__ for u in usage if u is not None)
            print(f"{package['file']} {name}: " + ", ".join(f"{n} operations on {device}" for device, n in devices.most_common()))


def main():
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompt", default="", help="the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="length at most (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token always (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--placement", action="store_true", help="print where the operations run, and end")
    args = parser.parse_args()
    if not 0 <= args.temperature < np.inf or args.max_new_tokens < 1:
        parser.error("--temperature must be 0 or more and --max_new_tokens at least 1")
    folder = Path(__file__).resolve().parent
    try:
        contract = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        embeddings = np.fromfile(folder / "embeddings.bin", np.float16).reshape(contract["embeddings"])
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as problem:  # the tokenizers library raises nothing more exact
        parser.error(f"{folder} is not a whole folder of convert.py ({problem}): copy it again, or convert again")
    if args.placement:
        return placement(folder, contract)
    ids = [tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode(args.prompt, add_special_tokens=False).ids]
    context = contract["context"] or np.inf
    if len(ids) > context:
        parser.error(f"the prompt has {len(ids):,} tokens, the packages read {context:,} in all: shorten it")
    host = Host(contract, embeddings, coreml(folder, contract))
    new = min(args.max_new_tokens, context - len(ids) + 1)  # the last token is not read any more
    written, shown = [], ""
    for token in host.generate(ids, new, sampler(args.temperature, args.seed)):
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # a character of several bytes is not whole yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


if __name__ == "__main__":
    main()
