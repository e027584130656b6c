"""Let a trained model write: continue a text, chat, or answer a file of prompts.

    python sample.py                                             # the newest run, from an empty page
    python sample.py --prompt="The function returns" --num_samples=3 --temperature=0.7
    python sample.py --prompt="Once" --stop "The end" --repetition_penalty=1.2    # up to one of these texts, in fewer circles
    python sample.py --chat                                      # a conversation: Ctrl-C ends an answer, Ctrl-D all of it
    python sample.py --chat --system="Answer in one sentence."   # which stays when old turns are forgotten
    python sample.py --model=pulse --prompt="The function returns" --raster=spikes.png --energy
    python sample.py --prompt="The function returns" --int8      # a larger model, faster on a CPU
    python sample.py --chat --prompts_file=questions.txt --output=answers.jsonl --temperature=0

Text goes to stdout as it is made, everything else to stderr. A checkpoint is all that is needed: the tokenizer is in it.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from tqdm import tqdm

import prepare
import spikes
from checkpoint import MODELS, check_tokens, find_checkpoint, for_writing, load_model
from decode import Decoder
from device import choose_device
from model import MAX_PENALTY, generate
from scripts import ArgumentParser, InputError, run, whole_file


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", help="a checkpoint file or the folder of a run (default: the newest in out/)")
    parser.add_argument("--model", choices=MODELS, help="take the newest run of this model")
    parser.add_argument("--prompt", help="the text to continue, or with --chat the one question to answer")
    parser.add_argument("--num_samples", type=int, default=1, help="how many different continuations (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length of one at most (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token always (default: 0.8)")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest tokens that make up this probability")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 tokens that were there are less likely (default: 1)")
    parser.add_argument("--stop", nargs="+", metavar="TEXT", default=[], help="end where one of these appears in the new text, without it")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument("--chat", action="store_true", help="prompts are questions to an assistant")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the conversation begins with this turn of the system")
    parser.add_argument("--prompts_file", type=Path, help="answer every line of this file; of a .jsonl its prompt or question")
    parser.add_argument("--output", type=Path, help="where the answers to --prompts_file go, as JSON lines")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences at a time with --prompts_file (default: 16)")
    parser.add_argument("--energy", action="store_true", help="instead of writing: the spikes and nanojoules that --prompt costs a Pulse")
    parser.add_argument("--raster", type=Path, help="instead of writing: draw the spikes of a Pulse reading --prompt into this picture")
    parser.add_argument("--int8", action="store_true", help="a Flow on a CPU with 8-bit weights: up to twice as fast from 10M weights on")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args(argv)
    for name in ("num_samples", "max_new_tokens", "top_k", "batch_size"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) < 2**31:
            raise InputError(f"--{name}={getattr(args, name)} must be at least 1 and below 2**31")
    if args.temperature < 0:
        raise InputError(f"--temperature={args.temperature} cannot be negative: 0 is greedy, 1 the model's own distribution")
    if args.temperature != 0 and not 0.01 <= args.temperature <= 100:
        raise InputError(f"--temperature={args.temperature} is out of range: expected 0 (greedy) or 0.01 to 100")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise InputError(f"--top_p={args.top_p} must be above 0 and at most 1")
    if not 1 <= args.repetition_penalty <= MAX_PENALTY:
        raise InputError(f"--repetition_penalty={args.repetition_penalty} is out of range: expected 1 (off) to {MAX_PENALTY}")
    for name, texts in (("stop", args.stop), ("system", [] if args.system is None else [args.system])):
        if not all(texts):
            raise InputError(f"--{name}='' is no text: leave it out")
        for text in texts:
            if not is_text(text):
                raise InputError(f"--{name}={text[:60]!a} is not UTF-8 text: convert it first")
    if args.system is not None and not args.chat:
        raise InputError(f"--system={args.system[:60]!r} is a turn of a conversation: add --chat or leave it out")
    if args.chat and args.num_samples > 1 and args.prompt is None and args.prompts_file is None:
        raise InputError(f"--num_samples={args.num_samples}: a conversation has one answer at a time, give --prompt or --prompts_file")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed={args.seed} must be at least 0 and below 2**63")
    if (args.energy or args.raster) and args.prompt is None:
        raise InputError("--energy and --raster look at a model that reads --prompt: give one")
    if args.raster and not args.raster.parent.is_dir():
        raise InputError(f"--raster={args.raster}: there is no folder {args.raster.parent}: make it first")
    if (args.prompts_file is None) != (args.output is None):
        raise InputError("--prompts_file and --output go together: one names the questions, the other where the answers go")
    if args.prompts_file and args.prompt is not None:
        raise InputError("--prompt and --prompts_file exclude each other: put the prompt into the file")
    return args


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: not with half a surrogate pair, Python's stand-in for what it cannot decode."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text to continue, as the beginning of a new document."""
    return [tokenizer.token_to_id("<|endoftext|>"), *prepare.plain_ids(tokenizer, text)]


def room(config, n_prompt: int, args, where: str = "") -> int:
    """How many new tokens fit behind a prompt of this length; says so, and `where`, if that is less. Raises InputError when none does."""
    limit = getattr(config, "max_seq_len", None)  # Pulse has none
    if limit is None or n_prompt + args.max_new_tokens <= limit:
        return args.max_new_tokens
    if n_prompt >= limit:
        raise InputError(f"the prompt has {n_prompt:,} tokens, the model reads {limit:,} in all: shorten it")
    print(f"stopping at {limit - n_prompt:,} new tokens{where}: the model reads {limit:,} in all", file=sys.stderr)
    return limit - n_prompt


class Writing:
    """The text of token ids that come one by one, up to where the first of the strings in `stops` is complete; then `ended` is true.

    add() returns what has become certain: a character of several bytes comes when its last byte is there, and what may be the
    beginning of a stop string waits until it is more or something else. rest() is what waits when no more tokens come.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.tokenizer, self.stops, self.ended = tokenizer, stops, False
        self.decoder, self.ids, self.decoded, self.waiting = DecodeStream(skip_special_tokens=True), [], 0, ""

    def add(self, token: int) -> str:
        self.ids.append(token)
        return self.certain(self.decoder.step(self.tokenizer, token) or "")

    def rest(self) -> str:
        if self.ended:
            return ""
        unfinished = self.tokenizer.decode(self.ids, skip_special_tokens=True)[self.decoded :]  # a character that was never finished
        return self.certain(unfinished) + self.waiting

    def certain(self, piece: str) -> str:
        self.decoded += len(piece)
        text = self.waiting + piece
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:  # the one that is complete first, so that it does not matter how the text is cut into tokens
            self.ended, self.waiting = True, ""
            return text[: min(found)[1]]
        self.waiting = next(text[i:] for i in range(len(text) + 1) if any(stop.startswith(text[i:]) for stop in [*self.stops, ""]))
        return text[: len(text) - len(self.waiting)]


def stream(tokenizer: Tokenizer, ids: Iterator[int], stops: Sequence[str] = ()) -> Iterator[str]:
    """The text of token ids piece by piece, as far as Writing lets it through."""
    text = Writing(tokenizer, stops)
    for token in ids:
        if piece := text.add(token):
            yield piece
        if text.ended:
            return
    if rest := text.rest():
        yield rest


def drawing(args, stop_ids: list[int]) -> dict:
    """How generate() is to choose tokens."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    return {name: getattr(args, name) for name in names} | {"stop_ids": stop_ids}


def write(model, tokenizer: Tokenizer, ids: list[int], args, stop_ids: list[int], before: str = "", interruptible: bool = False) -> str:
    """Print one continuation of `before` as it is made; returns it. Raises InputError, with nothing printed, if it is too long.

    Ctrl-C ends one that is `interruptible` where it is, any other with KeyboardInterrupt.
    """
    new = room(model.config, len(ids), args)
    parts, count, start = [], 0, time.perf_counter()
    print(before, end="", flush=True)

    def tokens():
        nonlocal count
        for step in generate(model, [ids], new, **drawing(args, stop_ids)):
            count += 1
            yield int(step[0])

    try:
        for piece in stream(tokenizer, tokens(), args.stop):
            parts.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not interruptible:
            raise
    print(flush=True)
    report(count, time.perf_counter() - start)
    return "".join(parts)


def report(count: int, seconds: float):
    print(f"[{count:,} tokens, {count / seconds:,.0f} tokens/s]", file=sys.stderr)


def batch(model, tokenizer: Tokenizer, prompts: list[list[int]], new: list[int], args, stop_ids: list[int]) -> tuple[list[str], int]:
    """(the continuation of every prompt by at most as many tokens as `new` says, tokens made in all)"""
    texts, parts, busy = [Writing(tokenizer, args.stop) for _ in prompts], [[] for _ in prompts], set(range(len(prompts)))
    for step in generate(model, prompts, max(new), **drawing(args, stop_ids)):
        for i, token in enumerate(step.tolist()):
            if token >= 0 and i in busy:
                parts[i].append(texts[i].add(token))
                if texts[i].ended or token in stop_ids or len(texts[i].ids) == new[i]:
                    busy.remove(i)
        if not busy:  # generate() does not know of stop strings and would go on
            break
    return ["".join(pieces) + text.rest() for text, pieces in zip(texts, parts)], sum(len(text.ids) for text in texts)


def read_prompts(path: Path) -> list[str]:
    """Its lines without spaces around them and without empty ones, of a .jsonl the prompt or else the question of each. InputError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as problem:
        raise InputError(f"{path} is not UTF-8 at byte {problem.start}: convert it first") from problem
    texts = [(f"{path}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise InputError(f"{path} holds no prompts: write one per line")
    return [prompt_of(where, text) if path.suffix.lower() == ".jsonl" else text for where, text in texts]


def prompt_of(where: str, line: str) -> str:
    remedy = 'expected {"prompt": "..."} or {"question": "..."}: mend or drop the line, or name a file of plain lines otherwise than .jsonl'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{where}: malformed JSON ({problem}), {remedy}") from None
    if not isinstance(record, dict) or not record.keys() & {"prompt", "question"}:
        found = ", ".join(map(repr, record))[:100] if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where}: holds {found or 'nothing'}, {remedy}")
    name = "prompt" if "prompt" in record else "question"
    text = record[name]
    if not isinstance(text, str) or not text.strip() or not is_text(text):
        found = f"{text[:60]!a}" if isinstance(text, str) else type(text).__name__
        raise InputError(f"{where}: {name} is {found}, which is no text, {remedy}")
    return text


def answer_file(model, tokenizer: Tokenizer, encode, args, stop_ids: list[int]):
    """One JSON line {"prompt", "completion"} per line of the file and sample; the file is there when it is whole."""
    if args.output.exists():
        raise InputError(f"{args.output} exists: remove it or name another --output")
    prompts = [prompt for prompt in read_prompts(args.prompts_file) for _ in range(args.num_samples)]
    encoded = [encode(prompt) for prompt in prompts]
    longest = max(encoded, key=len)
    try:
        least = room(model.config, len(longest), args, " behind the longest prompt")
    except InputError as problem:
        raise InputError(f"{args.prompts_file}, {prompts[encoded.index(longest)][:30]!r}...: {problem}") from problem
    new = [min(args.max_new_tokens, least + len(longest) - len(ids)) for ids in encoded]
    count, start = 0, time.perf_counter()
    with whole_file(args.output) as file, tqdm(total=len(prompts), unit="prompts") as bar:
        for i in range(0, len(prompts), args.batch_size):
            texts, made = batch(model, tokenizer, *(part[i : i + args.batch_size] for part in (encoded, new)), args, stop_ids)
            for prompt, text in zip(prompts[i:], texts):
                file.write(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(texts))
            count += made
    report(count, time.perf_counter() - start)


def chat(model, tokenizer: Tokenizer, args, stop_ids: list[int], system: list[dict]):
    """A conversation on stdin and stdout that begins with the turns in `system`, none or one. The oldest turns behind it are forgotten
    when all no longer fits what the model reads."""
    sys.stdin.reconfigure(errors="surrogateescape")  # a question that is not UTF-8 is refused below, without an end to the conversation
    limit, messages = getattr(model.config, "max_seq_len", None), []
    terminal = sys.stdin.isatty()
    print("Ask something; " + ("Ctrl-C ends an answer, Ctrl-D the conversation." if terminal else "Ctrl-D ends."), file=sys.stderr)
    while True:
        try:
            question = input("> " if terminal else "").strip()
        except EOFError:
            return
        if not question:
            continue
        turns = [*messages, {"role": "user", "content": question}]
        try:
            ids = prepare.conversation_ids(tokenizer, [*system, *turns])
            while limit and len(turns) > 1 and len(ids) + min(args.max_new_tokens, limit // 2) > limit:
                turns = turns[2:]
                ids = prepare.conversation_ids(tokenizer, [*system, *turns])
            text = write(model, tokenizer, ids, args, stop_ids, interruptible=terminal)
        except InputError as problem:  # such as a question longer than the model reads: the conversation goes on without it
            print(f"error: {problem}", file=sys.stderr)
            continue
        if len(turns) <= len(messages):
            print(f"[the oldest {(len(messages) + 1 - len(turns)) // 2} of the turns no longer fit and are forgotten]", file=sys.stderr)
        messages = [*turns, {"role": "assistant", "content": text}]


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args.device)
    path = find_checkpoint(args.ckpt, args.model)
    model, tokenizer, checkpoint = load_model(path, device, args.model)
    if args.chat:
        check_tokens(path, tokenizer, "<|im_start|>", "<|im_end|>")
    model = for_writing(model)
    if args.int8 and (device.type != "cpu" or checkpoint["model"] != "flow" or args.energy or args.raster):
        raise InputError("--int8 is for text from a Flow on a CPU: leave it out, or add --device=cpu")
    print(f"{path}: {checkpoint['model']}, {model.config.num_params():,} parameters, phase {checkpoint['phase']}", file=sys.stderr)
    if args.int8:
        model = Decoder(model, int8=True)
    torch.manual_seed(args.seed)
    ends = ("<|endoftext|>", "<|im_end|>") if args.chat else ("<|endoftext|>",)
    stop_ids = [tokenizer.token_to_id(token) for token in ends]

    system = [{"role": "system", "content": args.system}] if args.system else []
    limit = getattr(model.config, "max_seq_len", None)
    if system and limit and (least := len(prepare.conversation_ids(tokenizer, system))) >= limit:
        raise InputError(f"--system={args.system[:30]!r}... takes {least:,} tokens, the model reads {limit:,} in all: shorten it")

    def encode(text: str) -> list[int]:
        return prepare.conversation_ids(tokenizer, [*system, {"role": "user", "content": text}]) if args.chat else text_ids(tokenizer, text)

    prompt = args.prompt or ""
    before = "" if args.chat else prompt  # what is printed before its continuation
    if args.energy or args.raster:
        ids = encode(args.prompt)
        if args.energy:
            print(spikes.energy_table(spikes.energy(model, torch.tensor([ids], device=device))))
        if args.raster:
            spikes.raster(model, tokenizer, ids, args.raster)
            print(args.raster)
    elif args.prompts_file:
        answer_file(model, tokenizer, encode, args, stop_ids)
    elif args.chat and args.prompt is None:
        chat(model, tokenizer, args, stop_ids, system)
    elif args.num_samples == 1:
        write(model, tokenizer, encode(prompt), args, stop_ids, before)
    else:
        ids, start = encode(prompt), time.perf_counter()
        new, n = room(model.config, len(ids), args), args.num_samples
        texts, count = batch(model, tokenizer, [ids] * n, [new] * n, args, stop_ids)
        for text in texts:
            print(before + text, end="\n---\n")
        report(count, time.perf_counter() - start)


if __name__ == "__main__":
    run(main)
