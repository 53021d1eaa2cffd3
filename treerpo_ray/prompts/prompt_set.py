"""Prompts: problems become the token ids that trees grow from, and answers get their end tokens.

A prompt is tokenised once, here; its ids are what the engines search from and the learner sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from treerpo_ray.config.sections import PromptsConfig
from treerpo_ray.errors import one_line
from treerpo_ray.prompts.hub import HUB_ID, Unreachable, is_unreachable
from treerpo_ray.prompts.problems import Problem
from treerpo_ray.quickstart.task import MODELS, MODELS_FOLDER

if TYPE_CHECKING:  # prompts also travel to processes that have no use for a tokenizer
    from transformers import BatchEncoding, PreTrainedTokenizerBase


PACKAGE_PARENT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Problems with their prompts; `token_ids[i]` is the whole prompt of `problems[i]`."""

    problems: tuple[Problem, ...]
    token_ids: tuple[list[int], ...]
    num_too_long: int
    """Problems left out because their prompt has more than `max_prompt_tokens`."""

    def __len__(self) -> int:
        return len(self.problems)

    @classmethod
    def encode(
        cls,
        problems: Sequence[Problem],
        tokenizer: "PreTrainedTokenizerBase",
        config: PromptsConfig,
        section: str = "prompts",
    ) -> "PromptSet":
        """Tokenise problems by the chat template; without one, each message ends with a newline.

        Args:
            problems: At least one problem.
            tokenizer: The policy's tokenizer.
            config: Gives `system_prompt` and `max_prompt_tokens`.
            section: Where `config` stands in the configuration, for messages.

        Raises:
            ValueError: no prompt is short enough, one has no tokens, or the template or tokenizer
                fails.
        """
        try:
            encoded = _encode([p.question for p in problems], tokenizer, config.system_prompt)
        except TemplateError as error:
            raise ValueError(
                f"{section}.system_prompt={config.system_prompt!r}: the model's chat template "
                f"refuses these messages ({one_line(error)}); null leaves the system message out"
            ) from error
        except Exception as error:  # a template may do anything, a tokenizer much
            raise ValueError(
                f"{section}.path={config.path}: the model's chat template or tokenizer fails on "
                f"its questions ({type(error).__name__}: {one_line(error)})"
            ) from error
        for problem, ids in zip(problems, encoded, strict=True):
            if not ids:
                raise ValueError(
                    f"{section}.path={config.path}: the prompt of '{problem.id}' has no tokens"
                )
        kept = [i for i, ids in enumerate(encoded) if len(ids) <= config.max_prompt_tokens]
        if not kept:
            raise ValueError(
                f"{section}.max_prompt_tokens={config.max_prompt_tokens} leaves no prompt of "
                f"{config.path}: the shortest has {min(map(len, encoded))} tokens"
            )
        return cls(
            problems=tuple(problems[i] for i in kept),
            token_ids=tuple(encoded[i] for i in kept),
            num_too_long=len(encoded) - len(kept),
        )


def load_tokenizer(model_path: str, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder or Hugging Face id.

    Raises:
        ValueError: there is no such folder, or no tokenizer in it; `Unreachable` if the id could
            not be looked up.
    """
    from transformers import AutoTokenizer

    resolved = resolve_model_path(model_path)
    try:
        loaded = AutoTokenizer.from_pretrained(resolved, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parsers do
        if is_unreachable(error):
            raise Unreachable(f"model.path={model_path}") from error
        raise ValueError(f"model.path={model_path}: no tokenizer ({one_line(error)})") from error
    if len(loaded) <= len(loaded.all_special_ids):  # made from nothing, where its files are not
        raise ValueError(
            f"model.path={model_path}: no tokenizer (it has special tokens only; copy "
            "tokenizer.json and tokenizer_config.json from the model that this one came from)"
        )
    return loaded


def end_token_ids(model_path: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's end token, then those of `generation_config.json`
    or, where it names none, of `config.json`.

    Raises:
        ValueError: the model has no end token, or its `generation_config.json` is corrupt.
    """
    from transformers import GenerationConfig, PreTrainedConfig

    resolved, found = resolve_model_path(model_path), None
    try:
        found = GenerationConfig.from_pretrained(resolved).eos_token_id
    except OSError as error:
        if (Path(resolved) / "generation_config.json").exists():
            raise ValueError(f"model.path={model_path}: {one_line(error)}") from error
    if found is None:
        config = PreTrainedConfig.get_config_dict(resolved)[0]
        found = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    listed = found if isinstance(found, list) else [found]
    ids = dict.fromkeys(i for i in [tokenizer.eos_token_id, *listed] if i is not None)
    if not ids:
        raise ValueError(f"model.path={model_path}: neither tokenizer nor model has an end token")
    return tuple(ids)


def resolve_model_path(path: str) -> str:
    """Absolute folder of a model, or the Hugging Face id as it is.

    A relative path is tried against the working directory, then against the folder that holds
    this package: Ray workers run elsewhere. Call it on the machine that reads the model.

    Raises:
        ValueError: `path` is neither an existing folder nor in the form of an id.
    """
    given = Path(path).expanduser()
    if path:
        for folder in (given.absolute(), PACKAGE_PARENT / given):
            if folder.is_dir():
                return str(folder)
    if HUB_ID.fullmatch(path) and not given.exists():
        return path
    if given.parent == Path(MODELS_FOLDER).expanduser() and given.name in MODELS:
        raise ValueError(
            f"model.path={path}: this small model is not made yet, which takes a few minutes: "
            f"python -m treerpo_ray.quickstart.make_model {given.name}"
        )
    raise ValueError(
        f"model.path={path!r}: no such folder in {Path.cwd()} or {PACKAGE_PARENT}; "
        "give a model folder or a Hugging Face id such as org/name"
    )


def _encode(
    questions: list[str], tokenizer: "PreTrainedTokenizerBase", system_prompt: str | None
) -> list[list[int]]:
    system = [] if system_prompt is None else [system_prompt]
    quiet = {"verbose": False}  # no warning about what is left out for its length afterwards
    if tokenizer.chat_template is None:
        texts = ["\n".join([*system, text, ""]) for text in questions]
        return _without_end(tokenizer(texts, **quiet)["input_ids"], tokenizer)
    head = [{"role": "system", "content": text} for text in system]
    chats = [[*head, {"role": "user", "content": text}] for text in questions]
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, tokenizer_kwargs=quiet
    )
    return cast("BatchEncoding", encoded)["input_ids"]


def _without_end(encoded: list[list[int]], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Prompts without the end token, where a tokenizer puts it behind every text: an answer
    follows, not another text."""
    end = tokenizer.eos_token_id
    if end is None or tokenizer("")["input_ids"][-1:] != [end]:
        return encoded
    return [ids[:-1] if ids[-1:] == [end] else ids for ids in encoded]


def one_token(tokenizer: "PreTrainedTokenizerBase", text: str) -> int:
    """Id of the token that `text` is.

    Raises:
        ValueError: the tokenizer makes another number of tokens of it.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"tree.delimiter={text!r} is {len(ids)} tokens for this tokenizer; it must be one"
        )
    return ids[0]
