"""Data: the sections of the configuration that name data sets, and how these become prompts."""

import json
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
"""Folder that holds this package, and what is embedded in it."""


def as_found_here(path: str) -> str:
    """A file, folder or pattern of files as every process finds it, whatever its working folder and
    its home: whole, if it is there; what else it may be, such as a URI, a Hugging Face id or
    something embedded, as it is.
    """
    if not path or "://" in path:
        return path
    try:
        place = Path(path).expanduser()
        embedded = PROJECT / path
        is_embedded = embedded.exists() and place.absolute() == embedded
        is_here = place.exists() or bool(set(path) & set("*?["))
    except (OSError, RuntimeError, ValueError):  # no home, no name for a file
        return path
    return str(place.absolute()) if is_here and not is_embedded else path


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set and how it becomes prompts."""

    path: str = ""
    """JSONL, JSON, CSV or Parquet file (also .gz, local or URI), a pattern such as data/*.parquet,
    a list of these, a folder (of files, or from `save_to_disk`), a Hugging Face data set id, or
    an embedded task: `quickstart:train`, `quickstart:test`, `quickstart:chains10/train`; a number
    behind it draws other problems of the same split: `quickstart:test/1`."""
    split: str = "train"
    """Split, for Hugging Face data sets and folders that have several."""
    subset: str | None = None
    """Configuration name, for Hugging Face data sets that have several."""
    question_column: str = "question"
    """Column with the question or with a chat, a list of messages of role and content or of from
    and value. A point reaches into a column: `extra_info.question`, `messages.0.content`."""
    answer_column: str | None = "answer"
    """Column with the reference answer, or a list of accepted ones, such as
    `reward_model.ground_truth`. null: the assistant's message that ends a chat is the answer, as
    it is where there is no column `answer`."""
    answer_mark: str | None = "####"
    """What stands before the answer proper where a worked solution comes first, as in GSM8K; null:
    an answer is taken whole."""
    id_column: str | None = None
    """Column with a row's name; row numbers if not given."""
    system_prompt: str | None = None
    """System message of the chat template, in place of one that a chat of the data begins with."""
    prompt_template: str | None = None
    """Text of the user's message, with {question} and other columns in braces; a brace that is
    text is doubled. null: the question alone."""
    chat_template_args: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables of the model's chat template, such as {enable_thinking: false}."""
    max_prompt_tokens: int = 512
    """Longer prompts are counted and left out."""
    num_problems: int | None = None
    """Use only so many, the first ones; all if not given."""

    def __post_init__(self) -> None:
        try:
            paths = [as_found_here(path) for path in self.paths]
        except ValueError:  # no list after all, which is told when it is read
            return
        object.__setattr__(self, "path", paths[0] if len(paths) == 1 else json.dumps(paths))

    @property
    def paths(self) -> tuple[str, ...]:
        """The parts of `path`; a list stands in it as JSON."""
        if not self.path.startswith('["'):
            return (self.path,)
        return tuple(json.loads(self.path))


INHERITED = (
    *("question_column", "answer_column", "answer_mark", "system_prompt", "prompt_template"),
    *("chat_template_args", "max_prompt_tokens"),
)
"""Keys of `prompts` that hold for the sets in `prompts.mix`, for `evaluate.data` and for
`evaluate.benchmarks` where these do not give them."""


@dataclass(frozen=True, kw_only=True)
class MixedConfig(DataConfig):
    """One of several data sets that are trained on."""

    weight: float = 1.0
    """Its share of the tickets is this over the sum of all weights."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(DataConfig):
    """The data that is trained on, and how it becomes prompts."""

    mix: dict[str, MixedConfig] = field(default_factory=dict)
    """In place of `path`: several data sets by name, such as {a: {path: a.jsonl, weight: 2}}. Each
    ticket draws a set by weight, and its prompts come in turn: none again before all others of
    its set, so that small sets begin again while large ones go on."""

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the data sets, where several are mixed."""
        return tuple(self.mix) if len(self.mix) > 1 else ()
