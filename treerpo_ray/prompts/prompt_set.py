"""Prompts: problems become the token ids that trees grow from, and answers get their end tokens.

A prompt is tokenised once, here; its ids are what the engines search from and the learner sees.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables

from treerpo_ray.config.data import PROJECT, DataConfig
from treerpo_ray.errors import one_line
from treerpo_ray.prompts.chats import with_system
from treerpo_ray.prompts.hub import HUB_ID, Unreachable, is_unreachable, offline_because, refusal
from treerpo_ray.prompts.mixture import Mixture, id_of, one_set
from treerpo_ray.prompts.problems import Problem
from treerpo_ray.quickstart.exercises import MODELS, MODELS_FOLDER

if TYPE_CHECKING:  # prompts also travel to processes that have no use for a tokenizer
    from transformers import BatchEncoding, PreTrainedTokenizerBase


OWN_VARIABLES = {
    *("messages", "tools", "documents", "add_generation_prompt", "raise_exception"),
    *("strftime_now", "bos_token", "eos_token", "pad_token", "unk_token", "sep_token"),
    *("cls_token", "mask_token", "additional_special_tokens"),
}
"""Variables of chat templates that have their value from elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Problems with their prompts; `token_ids[i]` is the whole prompt of `problems[i]`."""

    problems: tuple[Problem, ...]
    token_ids: tuple[list[int], ...]
    num_too_long: int
    """Problems left out because their prompt has more than `max_prompt_tokens`."""
    mixture: Mixture | None = None
    """Of several data sets: how many problems each has, one set behind the other."""

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def sets(self) -> Mixture:
        """What its prompts' turns follow from, of one set or several."""
        return self.mixture or one_set(len(self))

    @classmethod
    def mixed(cls, parts: Mapping[str, "PromptSet"], weights: Sequence[float]) -> "PromptSet":
        """Several sets as one, each problem with the name of its set before its id."""
        named = [
            replace(problem, id=id_of(name, problem.id))
            for name, part in parts.items()
            for problem in part.problems
        ]
        return cls(
            problems=tuple(named),
            token_ids=tuple(ids for part in parts.values() for ids in part.token_ids),
            num_too_long=sum(part.num_too_long for part in parts.values()),
            mixture=Mixture(
                sizes=tuple(map(len, parts.values())), weights=tuple(map(float, weights))
            ),
        )

    @classmethod
    def encode(
        cls,
        problems: Sequence[Problem],
        tokenizer: "PreTrainedTokenizerBase",
        config: DataConfig,
        section: str = "prompts",
    ) -> "PromptSet":
        """Tokenise problems by the chat template; without one, each message ends with a newline.

        Args:
            problems: At least one problem.
            tokenizer: The policy's tokenizer.
            config: Gives `system_prompt`, `chat_template_args` and `max_prompt_tokens`.
            section: Where `config` stands in the configuration, for messages.

        Raises:
            ValueError: no prompt is short enough, one has no tokens, the template or tokenizer
                fails, or the template does not know an argument.
        """
        check_template_args(tokenizer, config.chat_template_args, section)
        try:
            encoded = _encode(problems, tokenizer, config)
        except TemplateError as error:
            told = f"the model's chat template refuses these messages ({one_line(error)})"
            if config.system_prompt is None:
                raise ValueError(f"{section}.path={config.path}: {told}") from error
            raise ValueError(
                f"{section}.system_prompt={config.system_prompt!r}: {told}; null leaves the "
                "system message out"
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
    if resolved == model_path and not Path(resolved).is_dir():
        offline_because()
    try:
        loaded = AutoTokenizer.from_pretrained(resolved, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parsers do
        if is_unreachable(error):
            raise Unreachable(f"model.path={model_path}") from error
        if (told := refusal(error)) is not None:
            raise ValueError(f"model.path={model_path}: {told}") from error
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
        for folder in (given.absolute(), PROJECT / given):
            if folder.is_dir():
                return str(folder)
    if HUB_ID.fullmatch(path) and not given.exists():
        return path
    if given.parent == Path(MODELS_FOLDER).expanduser() and given.name in MODELS:
        raise ValueError(
            f"model.path={path}: this small model is not made yet, which takes a few minutes: "
            f"python -m treerpo_ray.quickstart.make_model {given.name}"
        )
    where = "" if Path(path).is_absolute() else f" in {Path.cwd()} or {PROJECT}"
    raise ValueError(
        f"model.path={path!r}: no such folder{where}; "
        "give a model folder or a Hugging Face id such as org/name"
    )


def check_template_args(
    tokenizer: "PreTrainedTokenizerBase",
    arguments: Mapping[str, bool | int | float | str],
    section: str,
) -> None:
    """Check that the model's chat template knows what it is given.

    Raises:
        ValueError: it has no such variable, which it would pass over, or sets it by itself.
    """
    if not arguments:
        return
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{section}.chat_template_args={dict(arguments)}: the model has no chat template; "
            "leave them out"
        )
    try:
        known = sorted(_template_variables(tokenizer) - OWN_VARIABLES)
    except TemplateError:  # of another dialect; who renders it will say what is wrong
        return
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"{section}.chat_template_args.{name}: the model's chat template has no such "
                f"variable; {hint}it has: {', '.join(known) or 'none'}"
            )


def _template_variables(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """Variables that the chat template takes, in all of its forms."""
    found = tokenizer.chat_template
    templates = found.values() if isinstance(found, dict) else [found]
    # Tags of transformers and of jinja's loop controls are no variables.
    places = Environment(extensions=["jinja2.ext.loopcontrols"])
    plain = (re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text) for text in templates)
    return set().union(*(find_undeclared_variables(places.parse(text)) for text in plain))


def _encode(
    problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> list[list[int]]:
    chats = [with_system(problem.chat, config.system_prompt) for problem in problems]
    quiet = {"verbose": False}  # no warning about what is left out for its length afterwards
    if tokenizer.chat_template is None:
        texts = ["\n".join([*(message.content for message in chat), ""]) for chat in chats]
        return _without_end(tokenizer(texts, **quiet)["input_ids"], tokenizer)
    given: dict[str, Any] = {**config.chat_template_args}  # by name, as any template has its own
    encoded = tokenizer.apply_chat_template(
        [[asdict(message) for message in chat] for chat in chats],
        add_generation_prompt=True,
        return_dict=True,
        tokenizer_kwargs=quiet,
        **given,
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
