"""Make the embedded model from scratch: `python -m treerpo_ray.quickstart.make_model`."""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from treerpo_ray.quickstart.task import SPLITS, draw_chains, problems, write_solution
from treerpo_ray.quickstart.tokenizer import MAX_LENGTH, make_tokenizer

MODEL_FOLDER = Path(__file__).parent / "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the warm start is made. `slip_rate` is the solver's chance of an error a line."""

    num_steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 3e-3
    slip_rate: float = 0.3
    hidden_size: int = 128
    num_layers: int = 4
    seed: int = 0


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Return a randomly initialised Qwen2 model in fp32 with heads of 32 (vLLM's CPU minimum)."""
    num_heads = recipe.hidden_size // 32
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


def draw_batch(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, each (batch, longest row); prompt and padding have label -100."""
    chains = draw_chains("train", rng)
    rows, labels = [], []
    for _ in range(recipe.batch_size):
        chain = next(chains)
        solution = write_solution(chain, slip_rate=recipe.slip_rate, rng=rng)
        prompt_ids = encode_prompt(chain.question, tokenizer)
        target = [*tokenizer.encode(solution), tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt_ids + target))
        labels.append(torch.tensor([-100] * len(prompt_ids) + target))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, tokenizer.pad_token_id), pad(labels, True, -100)


def encode_prompt(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def warm_start(
    model: Qwen2ForCausalLM, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Train `model` in place on solutions to train problems."""
    rng = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = OneCycleLR(optimizer, recipe.learning_rate, recipe.num_steps, pct_start=0.1)
    for step in range(1, recipe.num_steps + 1):
        token_ids, labels = draw_batch(recipe, tokenizer, rng)
        loss = model(input_ids=token_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"warm start {step}/{recipe.num_steps}: loss {loss.item():.4f}", flush=True)


@torch.inference_mode()
def sample_pass_rates(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, *, num_problems: int, k: int
) -> torch.Tensor:
    """Sample k responses at temperature 1 to test problems; return the share right of each."""
    rows = problems("test", num_problems, seed=0)
    prompts = torch.tensor([encode_prompt(row.question, tokenizer) for row in rows])
    responses = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=64,
        num_return_sequences=k,
    )[:, prompts.shape[1] :]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    answers = [row.answer for row in rows for _ in range(k)]
    right = [
        text.rpartition("#### ")[2] == answer for text, answer in zip(texts, answers, strict=True)
    ]
    return torch.tensor(right, dtype=torch.float32).view(num_problems, k).mean(1)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Make the embedded model from scratch.")
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="folder to write")
    for name, default in (("num_steps", 1500), ("batch_size", 64), ("seed", 0), ("hidden_size", 128), ("num_layers", 4)):
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--slip_rate", type=float, default=.3)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    args = vars(parser.parse_args(arguments))
    out = args.pop("out")
    recipe = Recipe(**args)
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer()
    model = make_model(recipe, tokenizer)
    print(f"{model.num_parameters():,} parameters, splits {SPLITS}")
    warm_start(model, recipe, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.eval()
    torch.manual_seed(recipe.seed)
    rates = sample_pass_rates(model, tokenizer, num_problems=200, k=16)
    print(f"Pass@1 {rates.mean():.3f}, Pass@16 {(rates > 0).float().mean():.3f} at temperature 1")


if __name__ == "__main__":
    main(sys.argv[1:])
