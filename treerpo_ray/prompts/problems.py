"""Problems: questions with their accepted answers, from data sets or an embedded task."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from math import isfinite

from treerpo_ray.config.data import DataConfig
from treerpo_ray.errors import one_line
from treerpo_ray.prompts.chats import (
    Message,
    has_answer,
    is_chat,
    question_of,
    read_chat,
    split_answer,
    with_question,
)
from treerpo_ray.prompts.columns import Row, Template, cell_of, has_column, unknown_column
from treerpo_ray.prompts.hub import Unreachable, is_unreachable
from treerpo_ray.prompts.rows import Rows, read_rows
from treerpo_ray.quickstart import exercises

QUICKSTART = "quickstart:"
DEFAULT_TASK = "chains4"
QUICKSTART_SEED = 0
THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
DEFAULT_ANSWER = DataConfig().answer_column
"""Column that need not be there where a chat holds the answer."""


Asked = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question and the answers that count as correct, as the data set writes them."""

    id: str
    question: str
    answers: tuple[str, ...]
    messages: tuple[Message, ...] = ()
    """What the model is asked, where it is more than the question alone: a chat or a filled
    template, without the system prompt of the configuration."""
    row: str = "{}"
    """The whole row of the data set as JSON, without what is binary; empty if no check asks for
    it."""

    @property
    def chat(self) -> tuple[Message, ...]:
        """What the model is asked."""
        return self.messages or (Message("user", self.question),)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of the rows of a data set."""

    path: str
    num_rows: int
    num_empty_answers: int
    """Rows left out because nothing could be graded."""
    num_duplicates: int
    """Rows left out because an earlier row asks the same."""
    num_problems: int
    """Problems in use, at most `num_problems` of the configuration."""
    num_files: int = 1

    def told(self, num_too_long: int | None) -> str:
        """In one line, with the prompts that are too long, if they were counted."""
        files = f" ({self.num_files} files)" if self.num_files > 1 else ""
        answered = self.num_rows - self.num_empty_answers
        left_out = {
            "without an answer": self.num_empty_answers,
            "asked by an earlier row": self.num_duplicates,
            "beyond num_problems": answered - self.num_duplicates - self.num_problems,
            "too long": num_too_long or 0,
        }
        why = ", ".join(f"{number:,} {what}" for what, number in left_out.items() if number)
        used = self.num_problems - (num_too_long or 0)
        return (
            f"{self.path}{files}: {used:,} problems in use of {self.num_rows:,} rows"
            f"{f'; left out: {why}' if why else ''}"
        )


def load_problems(
    config: DataConfig, section: str = "prompts", *, keeps_rows: bool = False
) -> tuple[list[Problem], DataReport]:
    """Load a data set; rows without an answer and repeated questions are left out and counted.

    Args:
        config: The data set; see the keys of `DataConfig`.
        section: Where `config` stands in the configuration, for messages.
        keeps_rows: Whether problems keep their whole rows, which may be large.

    Raises:
        ValueError: nothing to read, a corrupt row, an unknown column, a template that does not
            fit or an empty data set; one line with the key, the file, the row and what to do.
            `Unreachable` if a Hugging Face id could not be looked up.
    """
    if not config.path:
        raise ValueError(f"{section}.path is empty: give a file, a URI or a Hugging Face id")
    if config.num_problems is not None and config.num_problems < 1:
        raise ValueError(f"{section}.num_problems={config.num_problems} must be at least 1")
    template = None if config.prompt_template is None else Template(config.prompt_template)
    try:
        if template is not None:
            template.check(config.question_column)
    except ValueError as error:
        raise ValueError(f"{section}.prompt_template={config.prompt_template!r} {error}") from error
    try:
        rows, num_files = _read(config, template, section, keeps_rows)
        answered = [row for row in rows if row.answers]
        different = _drop_duplicates(answered)
        _check_problems(rows, different, config)
    except (OSError, ValueError) as error:
        if is_unreachable(error):
            raise Unreachable(f"{section}.path={config.path}") from error
        raise ValueError(f"{section}.path={config.path}: {one_line(error)}") from error
    used = different[: config.num_problems]
    return used, DataReport(
        path=config.path,
        num_rows=len(rows),
        num_empty_answers=len(rows) - len(answered),
        num_duplicates=len(answered) - len(different),
        num_problems=len(used),
        num_files=num_files,
    )


def load_together(
    sections: Mapping[str, DataConfig], *, keeps_rows: bool = False
) -> dict[str, tuple[list[Problem], DataReport]]:
    """Load data sets that are trained on together; a question stays in the first that has it.

    Args:
        sections: The data sets by their keys of the configuration.
        keeps_rows: As of `load_problems`.

    Raises:
        ValueError: as `load_problems`, or the sets before have all questions of one.
    """
    loaded, seen = {}, set[Asked]()
    for section, config in sections.items():
        problems, report = load_problems(config, section, keeps_rows=keeps_rows)
        new = [problem for problem in problems if _asked(problem) not in seen]
        if not new:
            raise ValueError(
                f"{section}.path={config.path}: the other data sets have all of its questions; "
                "leave it out"
            )
        seen.update(map(_asked, new))
        again = len(problems) - len(new)
        report = replace(
            report, num_problems=len(new), num_duplicates=report.num_duplicates + again
        )
        loaded[section] = (new, report)
    return loaded


def _drop_duplicates(rows: list[Problem]) -> list[Problem]:
    first: dict[Asked, Problem] = {}
    for row in rows:
        first.setdefault(_asked(row), row)
    return list(first.values())


def _asked(problem: Problem) -> Asked:
    """What makes two problems the same."""
    if not problem.messages:
        return problem.question.strip()
    return tuple(Message(each.role, each.content.strip()) for each in problem.chat)


def _check_problems(rows: list[Problem], kept: list[Problem], config: DataConfig) -> None:
    if not rows:
        raise ValueError("the data set is empty")
    if not kept and config.answer_column is None:
        raise ValueError(
            "no chat ends with an answer; name the column of the answers (answer_column)"
        )
    if not kept:
        raise ValueError(f"no row has an answer in its column '{config.answer_column}'")
    name, times = Counter(row.id for row in kept).most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"'{name}' names {times} rows in column '{config.id_column}' (id_column); "
            "null names rows by their number"
        )


def _read(
    config: DataConfig, template: Template | None, section: str, keeps_rows: bool
) -> tuple[list[Problem], int]:
    """All rows in order, whose answers may be empty, and the number of their files."""
    if any(path.startswith(QUICKSTART) for path in config.paths):
        return _draw_quickstart(config, template), 1
    used = [config.question_column, *(template.columns if template is not None else ())]
    used += [column for column in (config.answer_column, config.id_column) if column is not None]
    found, num_files = list[Problem](), 0
    for part in read_rows(config, None if keeps_rows else used):
        num_files += 1
        columns = _columns(part, config, template, section)
        for number, row in part.by_number.items():
            name = None if config.id_column is None else cell_of(row, config.id_column)
            problem = columns.problem(row, _name(part, number, name), part.where(number))
            found.append(replace(problem, row=_to_json(row)) if keeps_rows else problem)
    return found, num_files


def _name(part: Rows, number: int, given: object) -> str:
    if given is not None:
        return str(given)
    return f"{part.name}:{number}" if part.name else str(number)


def _draw_quickstart(config: DataConfig, template: Template | None) -> list[Problem]:
    if len(config.paths) > 1:
        raise ValueError("an embedded task stands alone; prompts.mix trains on several sets")
    if config.num_problems is None:
        raise ValueError("an embedded task has no end; set num_problems")
    parts = config.path.removeprefix(QUICKSTART).split("/")
    seed = int(parts.pop()) if parts[-1].isdecimal() else QUICKSTART_SEED
    name, split = "/".join(parts[:-1]) or DEFAULT_TASK, parts[-1] if parts else ""
    rows = exercises.problems(name, split, config.num_problems, seed)
    columns = _Columns(question="question", answer="answer", mark=None, template=template)
    return [
        replace(columns.problem(asdict(row), row.id, f"row {number}"), row=_to_json(asdict(row)))
        for number, row in enumerate(rows, start=1)
    ]


def _columns(part: Rows, config: DataConfig, template: Template | None, section: str) -> "_Columns":
    """Where the parts of a problem stand in the rows of a file.

    Raises:
        ValueError: a column is not there.
    """
    answer, rows = config.answer_column, part.by_number.values()
    wanted = {config.question_column: "question_column"}
    if answer is not None:
        wanted[answer] = "answer_column"
    if config.id_column is not None:
        wanted[config.id_column] = "id_column"
    wanted |= dict.fromkeys(template.columns if template else (), "prompt_template")
    for column, key in wanted.items():
        if not rows or has_column(column, part.names, rows):
            continue
        chats = (cell_of(row, config.question_column) for row in rows)
        if column == answer == DEFAULT_ANSWER and any(map(has_answer, chats)):
            answer = None
            continue
        told = unknown_column(column, key, section, part.names, part.sample, taken=wanted.keys())
        raise ValueError(f"{part.name}: {told}" if part.name else told)
    return _Columns(
        question=config.question_column,
        answer=answer,
        mark=config.answer_mark,
        template=template,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """Where the parts of a problem stand in a row."""

    question: str
    answer: str | None
    """None: at the end of the chat."""
    mark: str | None
    template: Template | None

    def problem(self, row: Row, name: str, where: str) -> Problem:
        """The problem of a row.

        Args:
            row: Cells by column.
            name: Id of the problem.
            where: Place of the row, for messages.

        Raises:
            ValueError: a cell is not as it must be.
        """
        try:
            chat, solution = self._asked(cell_of(row, self.question))
            question = question_of(chat)
            if self.template is not None:
                chat = with_question(chat, self.template.fill(question, row))
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error
        answer = solution if self.answer is None else cell_of(row, self.answer)
        problem = Problem(
            id=name,
            question=question,
            answers=self._answers(answer, where),
            messages=() if chat == (Message("user", question),) else chat,
        )
        try:
            "".join([name, question, *problem.answers, *(m.content for m in chat)]).encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise ValueError(f"{where} holds text that is not Unicode ({error.reason})") from error
        return problem

    def _asked(self, cell: object) -> tuple[tuple[Message, ...], str | None]:
        """The chat of a question column, and the answer at its end."""
        if is_chat(cell):
            return split_answer(read_chat(cell))
        if not isinstance(cell, str) or not cell.strip():
            fix = _fields(cell, self.question) or "fill it or take the row out"
            raise ValueError(f"has no text in its question column '{self.question}'; {fix}")
        if self.answer is None:
            raise ValueError(
                f"has no chat in its question column '{self.question}' that could hold the "
                "answer; name the column of the answers (answer_column)"
            )
        return (Message("user", cell),), None

    def _answers(self, value: object, where: str) -> tuple[str, ...]:
        """Accepted answers of one cell, without empty and repeated ones."""
        if is_chat(value):  # a completion
            return self._answers(read_chat(value)[-1].content, where)
        values = value if isinstance(value, list) else [value]
        texts = [self._text(item, where) for item in values]
        return tuple(dict.fromkeys(text for text in texts if text))

    def _text(self, value: object, where: str) -> str:
        """Text of one answer; a number is written as a person would, what is missing as ''."""
        match value:
            case None:
                return ""
            case str():
                if not self.mark or self.mark not in value:
                    return value.strip()
                return _without_commas(value.rpartition(self.mark)[2].strip())
            case bool():
                pass
            case int():
                return str(value)
            case Decimal() | float() if not isfinite(value):
                return ""
            case Decimal() | float():
                digits = f"{Decimal(str(value)):f}"
                return digits.rstrip("0").rstrip(".") if "." in digits else digits
        fix = _fields(value, self.answer or "")
        raise ValueError(
            f"{where}, answer column '{self.answer}' holds neither text, a number nor a list of "
            f"these: {value!r:.80}{fix and f'; {fix}'}"
        )


def _fields(cell: object, column: str) -> str:
    """How to reach what is in a cell, if anything is by name."""
    if not isinstance(cell, dict) or not cell:
        return ""
    return f"it has {', '.join(f'{column}.{name}' for name in cell)}"


def _to_json(row: Row) -> str:
    """A row as JSON; what JSON does not have, such as dates, as text."""
    return json.dumps(row, default=str)


def _without_commas(answer: str) -> str:
    """A number without the commas of its thousands; behind a mark stands one answer, no list."""
    return answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer
