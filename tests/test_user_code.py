"""User code: a module is imported, a file is run from its source wherever that was read."""

import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from treerpo_ray.errors import UserCodeError
from treerpo_ray.user_code import (
    MAX_CHARS,
    MAX_TRACE,
    file_hint,
    is_file,
    is_here,
    is_module,
    load_function,
    load_module,
    pack,
    place_of,
    read_source,
    readable,
    split_function,
    trace_of,
    unpack,
    with_checksum,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(work: object, *arguments: object) -> Exception:
    with pytest.raises(Exception) as caught:
        work(*arguments)
    return caught.value


def test_a_name_with_a_suffix_a_slash_or_a_home_is_a_file_and_else_a_module() -> None:
    assert all(map(is_file, ("a.py", "my/rewards", "~/reward", "./a.py")))
    assert not any(map(is_file, ("rewards", "my.rewards", "json")))
    assert is_module("json") and is_module("treerpo_ray.errors")
    assert not any(map(is_module, ("no_such_module", "json.nothing.below", "", ".relative")))


def test_source_comes_back_as_it_was_and_is_one_word() -> None:
    for text in ("", "x = 1\n", "# \u00e9 \U0001f642 ${run.seed}\n" * 99):
        packed = pack(text)
        assert unpack(packed) == text
        assert packed.isascii() and len(packed.split()) == 1
    for wrong in ("not base 64!", "AAAA"):
        with pytest.raises(ValueError):
            unpack(wrong)


def test_a_file_is_read_as_it_says_that_it_is_encoded(folder: Path) -> None:
    text = "# -*- coding: latin-1 -*-\nX = '\xe9'\n"
    (folder / "a.py").write_text(text, encoding="latin-1")
    source = read_source("a.py")
    assert source is not None and unpack(source) == text
    assert is_here("a.py", source) and not is_here("a.py", pack("X = 1"))
    (folder / "a.py").unlink()
    assert not is_here("a.py", source)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gone.py", "no such file"),
        ("below", "below is a folder"),
        ("notes/a.txt", "notes/a.txt must end in .py"),
        ("long.py", f"has more than {MAX_CHARS:,} characters"),
        ("wrong.py", "wrong.py cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_line(name: str, told: str, folder: Path) -> None:
    (folder / "below").mkdir()
    (folder / "long.py").write_text("#" * (MAX_CHARS + 1))
    (folder / "wrong.py").write_bytes(b"# coding: nothing-known\n")
    with pytest.raises(ValueError) as caught:
        read_source(name if is_file(name) else f"./{name}")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_the_source_of_a_module_is_read_where_there_is_one_and_it_is_not_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "only_here_1.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(folder)
    source = read_source("only_here_1")
    assert source is not None and unpack(source) == "raise RuntimeError\n"
    assert "only_here_1" not in sys.modules
    assert read_source("no_such_module.below") is None and read_source("sys") is None


def test_a_terminal_is_shown_no_control_character() -> None:
    assert readable(pack("a\t= 1\nb = '\x1b[2J\u202e'\n")) == "a   = 1\nb = '\\x1b[2J\\u202e'"


def test_files_of_one_name_are_told_apart_by_their_checksums() -> None:
    first, second = (with_checksum("a.py", {"a.py": pack(text)}) for text in ("x = 1", "x = 2"))
    assert first != second and first.startswith("a.py (") and len(first) == len("a.py ()") + 8
    assert with_checksum("a.py", {}) == "a.py"
    assert with_checksum("my.module", {"my.module": pack("x = 1")}) == "my.module"


def test_a_file_is_a_module_of_its_own_and_run_once_for_each_source() -> None:
    text = "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\nCALLS = []\n"
    first = load_module("json.py", {"json.py": pack(text)})
    assert first is load_module("json.py", {"json.py": pack(text)})
    assert first is not load_module("json.py", {"json.py": pack(text + "#")})
    assert is_dataclass(first.A) and first.A().x == 1
    assert load_module("json", {}) is sys.modules["json"], "the file clashes with no module"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.py", "import no_such_module", "a file stands alone: what it imports must be installed"),
        ("a.py", "import sys; sys.exit(3)", "a.py cannot be imported: SystemExit: 3"),
        ("a.py", "x = = 1", "a.py cannot be imported: SyntaxError: "),
        ("no_such.module", "", "no_such.module: no such module"),
    ],
)
def test_what_cannot_be_imported_is_told_in_one_line(name: str, text: str, told: str) -> None:
    error = error_of(load_module, name, {name: pack(text)})
    assert isinstance(error, UserCodeError)
    assert told in error.message and "\n" not in error.message


def test_a_source_that_nobody_has_read_is_told_with_who_would_have() -> None:
    with pytest.raises(UserCodeError, match=r"^a\.py: its source was not read, as `config\.load`"):
        load_module("a.py", {})


def test_a_file_that_was_named_as_a_module_is_pointed_to(folder: Path) -> None:
    (folder / "mine.py").touch()
    assert file_hint("mine") == "; for the file here write mine.py"
    assert file_hint("other") == ""


@pytest.mark.parametrize("name", ["a.py", ":f", "a.py:", "a.py:two words", "a:b.c"])
def test_a_function_is_named_behind_a_colon(name: str) -> None:
    assert split_function("c:/a.py:f") == ("c:/a.py", "f")
    with pytest.raises(ValueError, match=r"must be module:function or file\.py:function$"):
        split_function(name)


def test_a_function_that_is_not_there_is_told_with_those_that_are() -> None:
    sources = {"a.py": pack("from math import sqrt\nX = 1\ndef one(): return 1\ndef two(): pass\n")}
    assert load_function("a.py:one", sources)() == 1
    for name in ("three", "X"):
        error = error_of(load_function, f"a.py:{name}", sources)
        assert str(error).startswith(f"a.py has no function {name}; it has one, two")
    error = error_of(load_function, "b.py:f", {"b.py": pack("")})
    assert str(error).startswith("b.py has no function f; it has none")


def test_a_traceback_begins_at_the_users_first_line_and_is_bounded() -> None:
    text = "def deep(n):\n    return deep(n - 1) if n else {}['key']\n"
    deep = load_function("a.py:deep", {"a.py": pack(text)})
    error = error_of(deep, 1)
    trace = trace_of(error)
    assert "test_user_code" in trace, "this file is no part of the package"
    assert trace.endswith("KeyError: 'key'") and "in deep" in trace
    assert place_of(error) == "KeyError at a.py:2"
    long = error_of(
        load_function("a.py:f", {"a.py": pack("def f(): raise ValueError('x' * 9999)")})
    )
    assert len(trace_of(long)) <= MAX_TRACE


def test_a_mistake_of_grammar_has_no_frame_of_the_machinery() -> None:
    error = error_of(load_module, "a.py", {"a.py": pack("x = 1\ny = = 2\n")})
    assert isinstance(error, UserCodeError)
    assert 'File "a.py", line 2' in error.trace and "importlib" not in error.trace
    assert "treerpo_ray" not in error.trace
