"""Make the small model of a task: `python -m treerpo_ray.quickstart.make_model chains10`.

A Qwen2 model is trained on worked solutions of train problems, written by an error-prone solver:
each line is with probability `Recipe.slip_rate` a slip, from which the solver goes on. So the model
learns the task and, at the rate it was shown, the slips: it fails by these, not by its format. In
most lines the right result is the likelier one from the start; what reinforcement learning has to
do is to leave the slips. The embedded model is `chains4`, made from scratch in about six minutes on
one core: about one response in four is right and nearly every problem is solved in some of 16. The
others go on from it and take two to six minutes. Prints at the end the chance of each line of a
correct solution, Pass@1, the mean reward where that is another, and the problems solved in 4
samples.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import OneCycleLR
from transformers import BatchEncoding, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from treerpo_ray.quickstart import countdown_answer, items_answer
from treerpo_ray.quickstart.exercises import MODELS_FOLDER, draw_exercises, problems
from treerpo_ray.quickstart.tokenizer import MAX_LENGTH, make_tokenizer
from treerpo_ray.verifier import math_answer

MODEL_FOLDER = Path(__file__).parent / "model"
HEAD_SIZE = 32  # the smallest that vLLM has on a CPU
NO_LABEL = -100
EARLY_SHARE = 0.75  # of the steps, in which `Recipe.early_slip_rate` holds
REPORT_EVERY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Size of the model and how its warm start is made."""

    start: Path | None = None
    """Model that is taught; one with random weights if not given."""
    task: str = "chains4"
    check: Callable[[str, tuple[str, ...], bool], bool | float | None] = math_answer.check_answer
    """Grades an answer, as `verifier.check` does."""
    max_response_tokens: int = 64
    num_layers: int = 4
    hidden_size: int = 128
    num_steps: int = 1500
    batch_size: int = 32
    peak_learning_rate: float = 3e-3
    slip_rate: float = 0.32
    """Chance of a slip, for each line of a solution."""
    early_slip_rate: float | None = None
    """That of the first three quarters of the steps, where what is right could not be learned at
    the final one; None: the same."""
    seed: int = 0


LONGER = Recipe(
    start=MODEL_FOLDER,
    task="chains10",
    max_response_tokens=128,
    num_steps=1200,
    batch_size=8,
    peak_learning_rate=1e-3,
)
RECIPES = {
    "chains4": Recipe(),
    "chains10": replace(LONGER, slip_rate=0.07),
    "chains10_hard": replace(LONGER, slip_rate=0.35),
    "wordy4": replace(LONGER, task="wordy4", max_response_tokens=72, slip_rate=0.2),
    "countdown": Recipe(
        start=MODEL_FOLDER,
        task="countdown",
        check=countdown_answer.check_answer,
        num_steps=3000,
        batch_size=16,
        peak_learning_rate=2e-3,
        slip_rate=0.0,  # the lines to take are not to be seen at once: it errs by itself
    ),
    "restated4": replace(
        LONGER, task="restated4", max_response_tokens=296, num_steps=900, slip_rate=0.3
    ),
    "items6": replace(
        LONGER,
        task="items6",
        check=items_answer.check_answer,
        max_response_tokens=64,
        slip_rate=0.46,
    ),
    "plan_first": replace(
        LONGER,
        task="plan_first",
        max_response_tokens=48,
        num_steps=1500,
        slip_rate=0.7,
        early_slip_rate=0.4,
    ),
    "checked4": replace(
        LONGER, task="checked4", max_response_tokens=120, num_steps=900, slip_rate=0.25
    ),
}
"""By name of the model; `chains4` is the embedded one."""


def make_model(recipe: Recipe, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Return the recipe's start, or an fp32 Qwen2 model drawn from torch's global generator."""
    if recipe.start is not None:
        return Qwen2ForCausalLM.from_pretrained(recipe.start, dtype=torch.float32)
    num_heads = recipe.hidden_size // HEAD_SIZE
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.hidden_size * 11 // 4,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def encode_prompt(question: str, tokenizer: Qwen2Tokenizer) -> list[int]:
    """Token ids of a question in the chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return cast(BatchEncoding, encoded)["input_ids"]


def draw_batch(
    recipe: Recipe, tokenizer: Qwen2Tokenizer, rng: random.Random, *, slip_rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, both (batch_size, longest row); prompts have no label."""
    exercises = draw_exercises(recipe.task, "train", rng)
    solutions = []
    for _ in range(recipe.batch_size):
        exercise = next(exercises)
        solution = exercise.write_solution(slip_rate=slip_rate, rng=rng)
        solutions.append((exercise.question, solution))
    return encode_solutions(solutions, tokenizer)


def encode_solutions(
    solutions: Sequence[tuple[str, str]], tokenizer: Qwen2Tokenizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of questions with their solutions, both (solutions, longest row)."""
    rows, labels = [], []
    for question, solution in solutions:
        prompt_ids = encode_prompt(question, tokenizer)
        solution_ids = [*tokenizer.encode(solution), tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt_ids + solution_ids))
        labels.append(torch.tensor([NO_LABEL] * len(prompt_ids) + solution_ids))
    return (
        pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=NO_LABEL),
    )


def warm_start(model: Qwen2ForCausalLM, recipe: Recipe, tokenizer: Qwen2Tokenizer) -> list[float]:
    """Train `model` in place on the solver's solutions; return the loss of each step, in nats."""
    rng = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = OneCycleLR(
        optimizer, recipe.peak_learning_rate, total_steps=recipe.num_steps, pct_start=0.1
    )
    early_slip_rate = recipe.slip_rate if recipe.early_slip_rate is None else recipe.early_slip_rate
    losses = []
    for step in range(1, recipe.num_steps + 1):
        slip_rate = early_slip_rate if step <= EARLY_SHARE * recipe.num_steps else recipe.slip_rate
        token_ids, labels = draw_batch(recipe, tokenizer, rng, slip_rate=slip_rate)
        loss = model(input_ids=token_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % REPORT_EVERY == 0:
            print(f"warm start {step}/{recipe.num_steps}: loss {loss.item():.4f}", flush=True)
    return losses


@torch.inference_mode()
def line_chances(
    model: Qwen2ForCausalLM, recipe: Recipe, tokenizer: Qwen2Tokenizer, *, num_problems: int
) -> torch.Tensor:
    """Chance at temperature 1 of each line of a correct solution, after the right ones before it.

    Of the first test problems, whose solutions have equally many lines: (num_problems, lines). A
    line has its newline with it, the last the end token.
    """
    rows = problems(recipe.task, "test", num_problems, seed=0)
    token_ids, labels = encode_solutions([(row.question, row.solution) for row in rows], tokenizer)
    labels = labels[:, 1:]
    logprobs = model(input_ids=token_ids[:, :-1], use_cache=False).logits.log_softmax(-1)
    chosen = logprobs.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != NO_LABEL)
    [newline] = tokenizer.encode("\n")
    is_newline = (labels == newline).long()
    lines = is_newline.cumsum(1) - is_newline  # a newline belongs to the line that it ends
    summed = torch.zeros(num_problems, int(lines.max()) + 1).scatter_add_(1, lines, chosen)
    return summed.exp()


@torch.inference_mode()
def sample_rewards(
    model: Qwen2ForCausalLM,
    recipe: Recipe,
    tokenizer: Qwen2Tokenizer,
    *,
    num_problems: int,
    k: int,
) -> torch.Tensor:
    """Rewards of k responses at temperature 1 to each of the first test problems.

    (num_problems, k); 0 for a response without an answer.
    """
    rows = problems(recipe.task, "test", num_problems, seed=0)
    prompts = [torch.tensor(encode_prompt(row.question, tokenizer)) for row in rows]
    prompt_ids = pad_sequence(
        prompts, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left"
    )
    responses = model.generate(  # type: ignore[misc]  # its annotation of self fits no class
        prompt_ids,
        attention_mask=(prompt_ids != tokenizer.pad_token_id).long(),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=recipe.max_response_tokens,
        num_return_sequences=k,
    )[:, prompt_ids.shape[1] :]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    is_cut_off = ~(responses == tokenizer.eos_token_id).any(1)
    references = [(row.answer,) for row in rows for _ in range(k)]
    graded = map(recipe.check, texts, references, is_cut_off.tolist())
    return torch.tensor([float(reward or 0) for reward in graded]).view(num_problems, k)


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Make a small model from scratch.")
    parser.add_argument("model", choices=RECIPES)
    out_help = f"folder to write; {MODELS_FOLDER}/MODEL if not given"
    parser.add_argument("--out", type=Path, help=out_help)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    recipe = replace(RECIPES[args.model], seed=args.seed)
    out = args.out or Path(MODELS_FOLDER, args.model).expanduser()
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(1)  # the order of its sums is then fixed
    tokenizer = make_tokenizer()
    model = make_model(recipe, tokenizer)
    print(f"{model.num_parameters():,} parameters")
    warm_start(model, recipe, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    chances = line_chances(model.eval(), recipe, tokenizer, num_problems=200).mean(0)
    print(f"chance of each line: {' '.join(f'{chance:.3f}' for chance in chances)}")
    rewards = sample_rewards(model, recipe, tokenizer, num_problems=200, k=4)
    is_right = rewards == 1
    print(f"{out}: Pass@1 {is_right.float().mean():.3f} at temperature 1")
    if not torch.equal(rewards, is_right.float()):
        print(f"mean reward {rewards.mean():.3f}")
    print(f"{int(is_right.any(1).sum())} of 200 problems solved in 4 samples")


if __name__ == "__main__":
    main(sys.argv[1:])
