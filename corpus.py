"""The built-in corpus: English that is already on the reader's disk, and generated arithmetic word problems.

The prose comes from the docstrings and longer comments of Python's standard library and of the packages that requirements.txt
installs (their files are parsed, never imported); the word problems are those of word_problems.py. So a first run needs no
download, and the text depends on nothing but the installed versions. prepare.py reads it.

    python corpus.py 1      shows ten documents of phase 1 (15 to 30 s on two cores); 2 and 3 likewise
"""
import ast
import functools
import importlib.util
import inspect
import itertools
import random
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from word_problems import Problem, problems
from workers import WORKERS, chunks, ordered_map

Document = str | list[Problem]  # prose, or one or more word problems

STDLIB = "the standard library"
# What requirements.txt installs on every platform. Optional packages such as matplotlib are left out on purpose, so that two
# machines with the same versions have the same corpus.
PACKAGES = (STDLIB, "torch", "functorch", "torchgen", "snntorch", "tokenizers", "huggingface_hub", "numpy", "coremltools", "tqdm",
            "safetensors", "sympy", "mpmath", "networkx", "jinja2", "fsspec", "filelock", "packaging", "attr", "cattrs", "yaml",
            "click", "anyio", "setuptools")
VAL_SHARE = 25  # one module in 25 is validation text
SHORT, LONG = 300, 6000  # characters of a document in phase 1: shorter neighbours are joined, longer ones cut between paragraphs
WINDOW = 8000  # least characters of a document in phase 3: 2,048 tokens of up to 4 characters
TRAIN_PROBLEMS, VAL_PROBLEMS = 20_000, 600  # in phase 2, and others in phase 3: about 4 MB, as much as phase 2's prose
GROUP = (8, 20)  # problems in one document of phase 3


def documents(phase: int, packages: tuple[str, ...] = PACKAGES) -> Iterator[tuple[str, Document]]:
    """The documents of one phase, each with its split, "train" or "val".

    Phase 1: prose, 300 to 6,000 characters each. Phase 2: every second one of those, and word problems, one per document.
    Phase 3: the prose of whole modules, small ones joined, at least 8,000 characters each, and groups of 8 to 20 other problems.
    A module is in the same split in every phase. Raises ValueError for another phase. The first call parses the packages in a
    pool of processes: a script that calls this needs the usual guard around its main part.
    """
    if phase not in (1, 2, 3):
        raise ValueError(f"there is no phase {phase}: 1, 2 or 3")
    for split, count in (("train", TRAIN_PROBLEMS), ("val", VAL_PROBLEMS)):
        texts = [module.units for module in modules(packages) if module_split(module.name) == split]
        if phase == 3:
            yield from ((split, text) for text in pack(map(itertools.chain.from_iterable, texts), WINDOW))
            rng = random.Random(split)
            others = itertools.islice(problems(split, 2 * count), count, None)  # not those of phase 2
            while group := list(itertools.islice(others, rng.randint(*GROUP))):
                yield split, group
        else:
            prose_texts = pack(itertools.chain.from_iterable(texts), SHORT, LONG)
            yield from ((split, text) for text in itertools.islice(prose_texts, 0, None, phase))  # 1: all, 2: every second
            if phase == 2:
                yield from ((split, [problem]) for problem in problems(split, count))


# Prose: files -> modules -> docstrings -> paragraphs


class Module(NamedTuple):
    name: str  # "torch/nn/modules/conv"
    units: list[list[str]]  # paragraphs, one list per class or function, in the order of the source


SKIPPED = re.compile(r"(^|/)(tests?|testing|test_[^/]*|[^/]*_tests?|conftest|_?vendor(ed)?|_distutils|idlelib|lib2to3|turtledemo|"
                     r"site-packages|dist-packages|__pycache__)(/|\.py|$)")


def source_files(packages: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(module name, path) of every Python file worth reading, sorted; says in one line which packages are absent."""
    files, absent = [], []
    for package in packages:
        if package == STDLIB:
            prefix, roots = "", [sysconfig.get_path("stdlib")]
        else:
            spec = importlib.util.find_spec(package)  # of a top-level name: looks without importing
            prefix, roots = f"{package}/", (spec.submodule_search_locations or []) if spec else []
            absent += [] if spec else [package]
        for root in map(Path, roots):
            paths = [path for path in root.rglob("*.py*") if path.suffix in (".py", ".pyi") and path.is_file()]
            names = ((path.relative_to(root).as_posix(), path) for path in paths)
            files += sorted((prefix + name.rsplit(".", 1)[0], path) for name, path in names if not SKIPPED.search(name))
    if absent:
        print(f"not installed, so not in the built-in corpus: {', '.join(absent)}", file=sys.stderr)
    return files


@functools.cache  # the three phases are made from it
def modules(packages: tuple[str, ...]) -> list[Module]:
    """The prose of all packages. A paragraph that occurs twice is kept in its first place only, so that none is in a training
    module and in a validation module."""
    seen: set[str] = set()
    found = []
    for batch in ordered_map(read_modules, chunks(source_files(packages), 16, lambda _: 1), WORKERS):
        for name, units in batch:
            fresh = []
            for unit in units:
                fresh.append([text for text in dict.fromkeys(unit) if text not in seen])
                seen.update(unit)
            found.append(Module(name, [unit for unit in fresh if unit]))
    return found


def module_split(name: str) -> str:
    return "val" if zlib.crc32(name.encode()) % VAL_SHARE == 0 else "train"


def pack(units: Iterable[Iterable[str]], least: int, most: float = float("inf")) -> Iterator[str]:
    """Joins neighbouring units to documents of at least `least` characters, cut between paragraphs where they would exceed
    `most`. What remains at the end is dropped if it is shorter than `least`."""
    text = ""
    for unit in units:
        for paragraph in unit:
            if len(text) >= least and len(text) + 2 + len(paragraph) > most:
                yield text
                text = ""
            text += "\n\n" + paragraph if text else paragraph
        if len(text) >= least:
            yield text
            text = ""


def read_modules(files: list[tuple[str, Path]]) -> list[Module]:
    return list(map(read_module, files))


def read_module(file: tuple[str, Path]) -> Module:
    name, path = file
    source = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # templates, files for other versions of Python, or nested too deep
        return Module(name, [])
    units = [[text for doc in docs for text in paragraphs(doc)] for docs in docstrings(tree)]
    return Module(name, [*units, list(comments(source.decode(errors="replace")))])


def docstrings(tree: ast.Module) -> Iterator[list[str]]:
    """The docstrings of a module, one list per class or function at its top level. Long strings in other statements too: there
    torch and numpy document their compiled functions, and pydoc the language itself."""
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def within(node) -> list[str]:
        doc = ast.get_docstring(node, clean=False)
        return ([doc] if doc else []) + [doc for child in node.body if isinstance(child, definitions) for doc in within(child)]

    own = ast.get_docstring(tree, clean=False)
    yield [own] if own else []
    for statement in tree.body[1 if own else 0:]:
        if isinstance(statement, definitions):
            yield within(statement)
        elif isinstance(statement, (ast.Expr, ast.Assign)):
            for node in ast.walk(statement):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= SHORT and "\n" in node.value:
                    yield [node.value]


def comments(source: str) -> Iterator[str]:
    """Blocks of comment lines that are prose; short ones say little without the code below them."""
    for is_comment, lines in itertools.groupby(map(str.strip, source.splitlines()), lambda line: line.startswith("#")):
        if is_comment:
            for block in "\n".join(line.lstrip("#:").strip() for line in lines).split("\n\n"):
                text = prose(block)
                if len(text) >= 80:
                    yield text


# Titles of sections that hold tables or code, underlined (numpy's style) or with a colon (Google's)
TABLES = re.compile(r"(?i)((other|keyword|optional|method|constructor|class|supported|type) )*(parameter|arg|argument|param|kwarg|option|"
                    r"return|yield|receive|raise|warn|exception|attribute|propertie|example|usage|reference|method|input|output|shape|"
                    r"signature|author|version|constraint|type|field|see also|command|syntax|format|link|todo)s?")
ADMONITION = re.compile(r"(?i)\.\. (note|warning|tip|important|caution|attention|hint)::\s*")
LEFT_OUT = re.compile(r":\w[^:`]*:(?!`)|@\w+|\.\.( |$)")  # fields, directives and comments of reStructuredText
BULLET = re.compile(r"([-*+•]|\(?(\d{1,2}|[a-z])[.)])\s+(?=\S)")


def paragraphs(doc: str) -> Iterator[str]:
    """The prose of a docstring, one line per paragraph or list item, without code, tables and markup. Knows as much of
    reStructuredText, Markdown, numpy's and Google's styles as it takes to leave things out."""
    blocks: list[str] = []
    block: list[str] = []  # the lines of the block that is being read
    block_indent = 0
    skip = None  # lines indented deeper than this belong to something that is left out
    code = fence = table = False  # leave out until an empty line, the closing fence, the next underlined title

    def close_block() -> None:
        if block and not table:
            blocks.append(" ".join(block))
        block.clear()

    for line in [*inspect.cleandoc(doc).split("\n"), ""]:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text.startswith(("```", "~~~")):
            close_block()
            fence = not fence
        elif not text:
            if block and block[-1].endswith("::"):
                skip = block_indent
            close_block()
            code = False
        elif fence or code or (skip is not None and indent > skip):
            continue
        elif text.startswith((">>>", "$ ", "%", "In [")):
            close_block()
            code = True
        elif len(text) >= 3 and not any(map(str.isalnum, text)):  # an underline
            title = block.pop() if block else ""
            close_block()
            table = bool(TABLES.fullmatch(title.rstrip(": ")))
        elif LEFT_OUT.match(text) and not ADMONITION.match(text) or text[-1] == ":" and TABLES.fullmatch(text.rstrip(": ")):
            close_block()
            skip = indent
        else:
            skip = None
            if note := ADMONITION.match(text):
                close_block()
                text, indent = text[note.end():], indent + 3
            if bullet := BULLET.match(text):
                close_block()
                text, indent = text[bullet.end():], indent + bullet.end()
            if indent != block_indent:
                close_block()
            block_indent = indent
            block += [text] if text else []
    return filter(None, map(prose, blocks))


MARKUP = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r":[\w:+-]+:`~[^`]*?([^`.]*)`", r"\1"),  # :class:`~torch.nn.Linear` -> Linear
    (r":(?!math)[\w:+-]+:`!?([^`<]*?)(\s*<[^`]*>)?`", r"\1"),
    (r"`([^`<]+?)\s*<[^`]*>`__?", r"\1"),  # `text <address>`_ -> text
    (r"\[([^]]+)\]\([^)\s]*\)", r"\1"),  # [text](address) -> text
    (r"``(.+?)``", r"\1"), (r"(?<!:)`([^`]+)`_?", r"\1"), (r"\*\*([^*]+)\*\*", r"\1"), (r"(?<!\w)\*([^*\s][^*]*)\*(?!\w)", r"\1"),
    (r"\s*\[\w+\]_", ""), (r"\s+", " "), (r"(?i)^ ?(note|warning|returns?|example|nb|summary)s?\s*:+ *", ""))]
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')]))(?<!e\.g\.)(?<!i\.e\.)\s+(?=[\"'(]?[A-Z])")
NOT_PROSE = re.compile(r"(?i)://|www\.|[\\{}|^~<>@#$%`*]|==|::| = |:\w+:|\bdef \w+\(|copyright|licen[cs]e|warrant[yi]|rights reserved|"
                       r"spdx|todo|fixme|xxx|noqa|pylint|type: ignore")
FUNCTION_WORD = re.compile(r"(?i)\b(a|an|and|are|as|at|be|been|but|by|can|do|does|for|from|has|have|if|in|into|is|it|its|may|more|must|no|"
                           r"not|of|on|one|only|or|other|should|so|some|such|than|that|the|their|them|then|there|these|they|this|those|to|used|"
                           r"was|we|when|where|which|will|with|would|you)\b")


def prose(text: str) -> str:
    """The text on one line without inline markup, up to its first sentence that is not plain English; "" if little remains."""
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if text[-1:].isalnum() and not FUNCTION_WORD.fullmatch(text.split()[-1]):
        text += "."  # many one-line docstrings and comments lack it
    kept = []
    for sentence in SENTENCE_END.split(text):
        n_words, n_signs = sentence.count(" ") + 1, len(re.sub("[A-Za-z ]+", "", sentence))
        if (n_words < 3 or n_signs > 0.12 * len(sentence) or len(FUNCTION_WORD.findall(sentence)) < 0.15 * n_words
                or NOT_PROSE.search(sentence) or not sentence.isascii() or sentence[-1] not in ".!?)\"'"
                or sentence.count("(") != sentence.count(")")):
            break
        kept.append(sentence)
    text = " ".join(kept)
    return text if len(text) >= 40 and (text[0].isupper() or text[0] in "\"'(") else ""


if __name__ == "__main__":
    if sys.argv[1:] not in (["1"], ["2"], ["3"]):
        print("error: which phase? python corpus.py 1, 2 or 3", file=sys.stderr)
        sys.exit(2)
    for _, item in random.sample(list(documents(int(sys.argv[1]))), 10):
        text = item if isinstance(item, str) else "\n\n".join(f"{problem['question']}\n{problem['answer']}" for problem in item)
        print(text, end="\n\n---\n\n")
