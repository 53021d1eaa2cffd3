"""User code: Python that a setting names, by import path or by file, on whatever node it is used.

`my_package.rewards` is imported, and so must be installed on every node. `my_reward.py` is a file
of whoever starts the run: its source is read once, there, and travels with the settings. It is run
as a module of its own that no other can clash with, and stands alone: what it imports must be
installed.
"""

import base64
import importlib
import importlib.util
import linecache
import os
import sys
import tokenize
import traceback
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType

from treerpo_ray.errors import UserCodeError, one_line

PACKAGE = Path(__file__).parent
MACHINERY = ("/asyncio/", "/importlib/", "<frozen importlib")
"""What the files have in their names, beside those of this package, whose frames are above the
user's own."""
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable that Ray sets for the command of a job."""
MAX_CHARS = 1_000_000
"""Of a file: its source is written into every `config.yaml` and sent to every worker."""
MAX_TRACE = 4000


def is_file(name: str) -> bool:
    """Whether a setting means a file, and not a module by its import path."""
    return name.endswith(".py") or "/" in name or name.startswith("~")


def is_module(name: str) -> bool:
    """Whether a module of that import path can be found."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def read_source(name: str) -> str | None:
    """Packed source of the file, or of the module's file; None for a module that has none here.

    Raises:
        ValueError: there is no such file, or it is none of Python.
    """
    if is_file(name):
        return pack(_read(Path(name).expanduser(), name))
    try:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None else spec.origin
        return pack(_read(Path(origin), name)) if origin and origin.endswith(".py") else None
    except Exception:  # of a package that holds it: told where the module is needed
        return None


def _read(path: Path, name: str) -> str:
    if path.is_dir():
        raise ValueError(f"{name} is a folder; name one file in it, or a module as package.module")
    if path.suffix != ".py":
        raise ValueError(f"{name} must end in .py, or be a module as package.module")
    if not path.is_file():
        job = "; a Ray job sees what its --working-dir holds" if RAY_JOB in os.environ else ""
        raise ValueError(f"no such file ({path.absolute()}){job}")
    try:
        with tokenize.open(path) as file:  # as the file says that it is encoded
            text = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read: {one_line(error)}") from error
    if len(text) > MAX_CHARS:
        raise ValueError(f"{name} has more than {MAX_CHARS:,} characters; install it as a package")
    return text


def pack(text: str) -> str:
    """Source as one word, which no configuration takes for anything else."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpack(source: str) -> str:
    """The inverse of `pack`.

    Raises:
        ValueError: it is not packed.
    """
    try:
        return zlib.decompress(base64.b64decode(source, validate=True)).decode()
    except zlib.error as error:
        raise ValueError(f"not the packed source of a file: {error}") from error


def is_here(name: str, source: str) -> bool:
    """Whether the file of that name on this machine holds just that packed source."""
    try:
        here = read_source(name)
    except ValueError:
        return False
    return here is not None and unpack(here) == unpack(source)


def readable(source: str) -> str:
    """Packed source as a terminal can show it, whoever wrote it."""
    lines = unpack(source).expandtabs(4).splitlines()
    return "\n".join(
        "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)
        for line in lines
    )


def with_checksum(name: str, sources: Mapping[str, str]) -> str:
    """A file's name with the checksum of its source: two that differ have other names."""
    if name not in sources or not is_file(name):
        return name
    return f"{name} ({zlib.crc32(sources[name].encode()):08x})"


def load_module(name: str, sources: Mapping[str, str]) -> ModuleType:
    """The module that a setting names.

    Args:
        name: A file, or the module's import path.
        sources: Packed sources by name; that of a file must be there.

    Raises:
        UserCodeError: it cannot be imported; one line, and the user's own traceback.
    """
    if is_file(name) and name not in sources:
        raise UserCodeError(f"{name}: its source was not read, as `config.load` does")
    try:
        return _run(name, sources[name]) if is_file(name) else importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if not is_file(name) and (name == missing or name.startswith(f"{missing}.")):
            raise UserCodeError(f"{name}: no such module{file_hint(name)}") from error
        raise _failed_import(name, error) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an import may do anything, such as exit
        raise _failed_import(name, error) from error


def _failed_import(name: str, error: BaseException) -> UserCodeError:
    alone = ""
    if is_file(name) and isinstance(error, ModuleNotFoundError):
        alone = " (a file stands alone: what it imports must be installed)"
    return UserCodeError(
        f"{name} cannot be imported: {type(error).__name__}: {one_line(error)}{alone}",
        trace_of(error),
    )


def file_hint(name: str) -> str:
    """What to write for a file of the working folder that has the name of a module."""
    file = f"{name.replace('.', '/')}.py"
    return f"; for the file here write {file}" if Path(file).is_file() else ""


@cache
def _run(name: str, source: str) -> ModuleType:
    """A file as a module under a name of its own, whose tracebacks show its lines anywhere."""
    text = unpack(source)
    module = ModuleType(f"treerpo_user_{Path(name).stem}_{zlib.crc32(source.encode()):08x}")
    module.__file__ = str(Path(name).expanduser().absolute())
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    sys.modules[module.__name__] = module  # data classes look their module up
    try:
        exec(compile(text, name, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def split_function(name: str) -> tuple[str, str]:
    """Module or file, and the name of its function.

    >>> split_function("my form.py:form")
    ('my form.py', 'form')

    Raises:
        ValueError: it is not of the form `module:function`.
    """
    module, colon, function = name.rpartition(":")
    if not colon or not module or not function.isidentifier():
        raise ValueError(f"{name}: must be module:function or file.py:function")
    return module, function


def load_function(name: str, sources: Mapping[str, str]) -> Callable[..., object]:
    """The function that `module:function` names.

    Raises:
        UserCodeError: there is none; one line, with the user's own traceback where it has one.
    """
    module_name, function_name = split_function(name)
    module = load_module(module_name, sources)
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [
            each
            for each, part in vars(module).items()
            if isinstance(part, FunctionType) and part.__module__ == module.__name__
        ]
        raise UserCodeError(
            f"{module_name} has no function {function_name}; it has {', '.join(own) or 'none'}"
        )
    return function


def trace_of(error: BaseException) -> str:
    """Traceback of an error from the user's first frame on, of bounded length."""
    found = traceback.TracebackException.from_exception(error)
    theirs = [n for n, frame in enumerate(found.stack) if not _is_machinery(frame.filename)]
    if not theirs and found.stack and found.exc_type is not SyntaxError:
        return "".join(found.format())[-MAX_TRACE:]  # the code is of this package
    del found.stack[: theirs[0] if theirs else len(found.stack)]
    lines = found.format() if theirs else found.format_exception_only()
    return "".join(lines)[-MAX_TRACE:].rstrip()


def place_of(error: BaseException) -> str:
    """Kind of an error and the line of the user's that it comes from: the same for each answer."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not _is_machinery(frame.filename)] or frames
    last = f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    return f"{type(error).__name__}{last}"


def _is_machinery(file: str) -> bool:
    return file.startswith(f"{PACKAGE}/") or any(part in file for part in MACHINERY)
