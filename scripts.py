"""What all scripts share: errors that a user can mend, options, and files that are never half there."""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


class InputError(Exception):
    """What the user can mend: one line that names the value, what was expected and the remedy; exit code 2."""


class ArgumentParser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        """Raises InputError for an empty value, as an unset variable of the shell leaves one: of texts alone it can be meant."""
        given = sys.argv[1:] if args is None else args
        for option, value in [*zip(given, given[1:]), *(word.split("=", 1) for word in given if "=" in word)]:
            if value == "" and re.fullmatch(r"--\w+", option) and option not in ("--prompt", "--system", "--stop"):
                raise InputError(f"nothing stands behind {option}, as with an unset variable of the shell: give a value or leave it out")
        return super().parse_args(args, namespace)

    def error(self, message):
        self.exit(2, f"error: {message} (python {self.prog} --help lists the options)\n")


def run(main: Callable):
    """main(), with the errors a user can mend as one line on stderr: exit code 2, or 130 after Ctrl-C."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    allow_many_files()
    try:
        main()
        sys.stdout.flush()  # so that a closed pipe is noticed here
        return
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    except InputError as error:
        code, line = 2, f"error: {error}"
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        code, line = 2, f"error: the memory ran out ({str(error).splitlines()[0][:100]}): take less at a time, or a smaller model"
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if error.filename is None and not full:
            raise
        where = "" if error.filename is None else f"{error.filename}: "  # a write through an open file does not know its name
        code, line = 2, f"error: {where}{error.strerror}" + ": free some space or write elsewhere" * full
    print(line, file=sys.stderr)
    sys.exit(code)


def out_of_memory(problem: Exception) -> bool:
    """Whether an error means that memory ran out: a GPU's has a type of its own, torch's for a CPU and Apple's GPU have not."""
    words = "out of memory", "can't allocate memory"
    return isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError" or any(word in str(problem) for word in words)


def allow_many_files():
    """As many open files as the system grants: every shard that is mapped is one, and macOS starts with 256."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (10_240 if most == resource.RLIM_INFINITY else min(most, 10_240), most))


def locked(lock: Callable, file) -> bool:
    """Whether fcntl's `lock`, flock or lockf, has given a file to this process alone. Where the file system has no locks, as some of
    clusters and network drives, nobody else can be told, and it is true."""
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:
        if problem.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    return True


def lock_folder(folder: Path, given: Path | None = None) -> int:
    """A descriptor of a folder that keeps other runs out until it is closed, at the latest by the system when this process ends. Raises
    InputError, which names it as the user has `given` it, when another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    if not locked(fcntl.flock, descriptor):
        os.close(descriptor)
        raise InputError(f"{given or folder} is being written by another run: wait for it or name another folder")
    return descriptor


def json_object(text: str) -> dict:
    """An option's value that is a JSON object."""
    try:
        if isinstance(value := json.loads(text), dict):
            return value
    except (ValueError, RecursionError):
        pass
    raise argparse.ArgumentTypeError(f"{text} is no JSON object: expected one such as {{\"top_p\": 0.9}}")


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write that takes the place of `path` when it is whole: at any moment `path` is the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written, {path.parent} is no folder: make it, or name another file")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
