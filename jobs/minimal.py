"""TreeRPO whole, in one file and one process: to be read first, and to hold the learner against.

python jobs/minimal.py conf/quickstart.yaml conf/methods/grpo.yaml

    questions ── grow ──► trees ── score ──► rewards ── rows ──► values, advantages ─┐
                   ▲                                                                 │
                   └──────── AdamW ◄──── loss ◄──── one row a trained step ◄─────────┘

Configuration, prompts and mathematics (`treerpo_ray.algo`) are those of jobs/train.py, and so is
the update: the same trees give the same weights. Left out is what makes that fast and safe.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package may not be installed

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from treerpo_ray.algo.advantages.forms import has_baseline, step_advantages
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.loss import LossInputs, policy_loss
from treerpo_ray.algo.search import SiblingGroup, assemble, cut_at_surprise
from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree
from treerpo_ray.config import Config, load
from treerpo_ray.errors import run_command
from treerpo_ray.prompts import problems, prompt_set
from treerpo_ray.user_code import load_module
from treerpo_ray.verifier import check, verdict

LEFT_OUT = "gate.max_redraws tree.delimiter loss.kl_coef run.max_sampled_tokens "
LEFT_OUT += "verifier.false_positive_rate verifier.false_negative_rate verifier.checks "
LEFT_OUT += "model.trust_remote_code model.stop prompts.mix learner.length_weight tree.adaptive"


def train(config: Config) -> int:
    """Learner steps, a line each; the reward shown is the mean value of the trees' roots."""
    wrong = [key for key in LEFT_OUT.split() if attrgetter(key)(config)]
    if wrong or config.model.dtype != "float32" or has_baseline(config.learner.form):
        raise ValueError(f"not in jobs/minimal.py: {wrong or 'bfloat16, a baseline of past steps'}")
    torch.manual_seed(config.run.seed)
    rng, policy = np.random.default_rng(config.run.seed), TreeRPO(config)
    found, _ = problems.load_problems(config.prompts)
    questions = prompt_set.PromptSet.encode(found, policy.tokenizer, config.prompts)
    for step in range(config.run.num_steps):
        drawn = rng.choice(len(questions), config.gate.trees_per_step, replace=False)
        trees = policy.grow([questions.token_ids[i] for i in drawn])
        rewards = list(map(policy.score, trees, [questions.problems[i].answers for i in drawn]))
        value = np.mean([mean_backup(*pair).root for pair in zip(trees, rewards, strict=True)])
        trained = policy.update(trees, rewards, step / config.run.num_steps)
        tokens = f"{sum(t.num_sampled_tokens for t in trees)} tokens sampled, {trained} trained"
        print(f"step {step + 1}: reward {value:.1%}, {tokens}", flush=True)
    return 0


@dataclass(kw_only=True, eq=False)
class Row:
    """A trained step: the prompt, its ancestors and its own tokens, which come last."""

    token_ids: list[int]
    behaviour: Tensor  # log-probability of each of its own tokens when it was sampled
    advantage: float
    old: Tensor | None = None  # the same when the update began; None: as it is now


class TreeRPO:
    """A policy and its optimizer, and what a learner step does: grow, score, update."""

    def __init__(self, config: Config) -> None:
        self.check = check.Check(load_module(config.verifier.main_check, config.verifier.sources))
        if self.check.is_async or {"question", "row"} & set(self.check.wanted):
            raise ValueError("not in jobs/minimal.py: a check with async def, question or row")
        self.config, path = config, prompt_set.resolve_model_path(config.model.path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        decay = config.learner.weight_decay
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=decay)
        self.tokenizer = prompt_set.load_tokenizer(path, config.model.trust_remote_code)
        self.num_updates, self.ends = 0, list(prompt_set.end_token_ids(path, self.tokenizer))

    def grow(self, prompts: list[list[int]]) -> list[Tree]:
        """A tree on each prompt, all of them together, one depth after the other."""
        shape, groups = self.config.shape, [list[SiblingGroup]() for _ in prompts]
        parents = [(number, tuple[int, ...](), prompt) for number, prompt in enumerate(prompts)]
        for depth, count in enumerate(shape.num_children):
            if not parents:
                break  # every answer has come to its end
            is_last, most = depth + 1 == len(shape.num_children), shape.step_tokens[depth]
            steps = self.sample([prefix for *_, prefix in parents for _ in range(count)], most)
            above, parents = parents, []
            for place, (number, path, prefix) in enumerate(above):
                children = steps[place * count : (place + 1) * count]
                for child, step in enumerate(children):
                    if not is_last and step.stop is StopReason.BOUNDARY:  # else it is a leaf
                        children[child] = step = cut_at_surprise(step, shape.entropy_window)
                        parents.append((number, (*path, child), prefix + step.token_ids.tolist()))
                groups[number].append(SiblingGroup(parent=path, steps=tuple(children)))
        return [assemble(prompt, own) for prompt, own in zip(prompts, groups, strict=True)]

    @torch.no_grad()
    def sample(self, prefixes: list[list[int]], most: int) -> list[Step]:
        """One continuation of each prefix, to its end or of so many tokens at most."""
        columns, cache, width = list[tuple[Tensor, Tensor]](), None, max(map(len, prefixes))
        fed = torch.tensor([[0] * (width - len(ids)) + ids for ids in prefixes])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prefixes])
        is_open = torch.ones(len(prefixes), dtype=torch.bool)
        while len(columns) < most and is_open.any():
            place = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
            output = self.model(fed, attention_mask=mask, position_ids=place, past_key_values=cache)
            scores = (output.logits[:, -1] / self.config.tree.temperature).log_softmax(-1)
            fed, cache = scores.exp().multinomial(1), output.past_key_values
            columns.append((fed, scores.gather(1, fed)))
            mask = torch.cat([mask, torch.ones_like(fed)], dim=1)
            is_open &= ~torch.isin(fed[:, 0], torch.tensor(self.ends))
        tokens, logprobs = (torch.cat(column, 1).numpy() for column in zip(*columns, strict=True))
        steps = []
        for ids, own in zip(tokens.astype(np.int32), logprobs, strict=True):
            length = next((n for n, token in enumerate(ids, 1) if token in self.ends), most)
            ids, own, since = ids[:length], own[:length], np.full(length, self.num_updates)
            stop = StopReason.END_OF_TEXT if ids[-1] in self.ends else StopReason.BOUNDARY
            steps.append(Step(parent=ROOT, token_ids=ids, logprobs=own, versions=since, stop=stop))
        return steps

    def score(self, tree: Tree, references: tuple[str, ...]) -> np.ndarray:
        """Reward of each leaf at its step's place, NaN elsewhere."""
        rewards = np.full(len(tree.steps), np.nan)
        for leaf in tree.leaves:
            answer = self.tokenizer.decode(tree.path_token_ids(leaf), skip_special_tokens=True)
            is_cut_off = tree.steps[leaf].stop is StopReason.BOUNDARY
            asked = verdict.Answer(text=str(answer), references=references, is_cut_off=is_cut_off)
            rewards[leaf] = self.check(asked) or 0.0
        return rewards

    def update(self, trees: list[Tree], rewards: list[np.ndarray], progress: float = 0.0) -> int:
        """Train on trees when the share `progress` of the run is done; returns trained tokens."""
        learner, size = self.config.learner, len(trees) // self.config.learner.minibatches
        rows = [list(self.rows(*pair)) for pair in zip(trees, rewards, strict=True)]
        minibatches = [list(chain(*rows[i : i + size])) for i in range(0, len(trees), size)]
        for row in chain(*rows) if len(minibatches) > 1 else ():
            row.old = self.logprobs([row])[0].detach()
        for batch in filter(None, minibatches):
            self.optimizer.zero_grad()
            count = learner.token_budget // max(len(row.token_ids) for row in batch)
            for i in range(0, len(batch), count):
                self.loss(batch[i : i + count], batch).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), learner.clip_grad_norm)
            warm = min(1.0, (self.num_updates + 1) / (learner.warmup_steps + 1))
            rate = learner.learning_rate * warm * (1 - (1 - learner.final_rate) * progress)
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
            self.num_updates += 1
        return sum(len(row.behaviour) for row in chain(*rows))

    def rows(self, tree: Tree, rewards: np.ndarray) -> Iterator[Row]:
        """Rewards become values, values advantages within step groups; a row a trained step."""
        learner, values = self.config.learner, mean_backup(tree, rewards)
        found = step_advantages(tree, values, form=learner.form, pruning=learner.pruning)
        for index in np.flatnonzero(~np.isnan(found)).tolist():
            ids = [*tree.prompt_ids.tolist(), *tree.path_token_ids(index)]
            behaviour = torch.from_numpy(tree.steps[index].logprobs)
            yield Row(token_ids=ids, behaviour=behaviour, advantage=float(found[index]))

    def loss(self, rows: list[Row], batch: list[Row]) -> Tensor:
        """What some rows add to the loss of their batch."""
        logprobs, entropy = self.logprobs(rows)
        lengths = torch.tensor([len(row.behaviour) for row in rows])
        old = [row.old for row in rows if row.old is not None]
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=torch.cat(old) if old else logprobs.detach(),
            behaviour_logprobs=torch.cat([row.behaviour for row in rows]),
            reference_logprobs=None,
            entropy=entropy,
            advantages=torch.tensor([row.advantage for row in rows]).repeat_interleave(lengths),
            step=torch.arange(len(rows)).repeat_interleave(lengths),
        )
        most, tokens = self.config.shape.max_answer_tokens, sum(len(row.behaviour) for row in batch)
        counts = {"num_batch_tokens": tokens, "num_batch_steps": len(batch)}
        return policy_loss(inputs, **counts, max_answer_tokens=most, config=self.config.loss).loss

    def logprobs(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """Log-probability of every row's own tokens, and the entropy where each was drawn."""
        width = max(len(row.token_ids) for row in rows)
        ids = torch.tensor([row.token_ids + [0] * (width - len(row.token_ids)) for row in rows])
        is_own = torch.zeros_like(ids, dtype=torch.bool)
        for mask, row in zip(is_own, rows, strict=True):
            mask[len(row.token_ids) - len(row.behaviour) : len(row.token_ids)] = True
        logits = self.model(ids, use_cache=False).logits[:, :-1][is_own[:, 1:]]
        scores = (logits / self.config.tree.temperature).log_softmax(-1)
        return scores.gather(1, ids[is_own][:, None])[:, 0], -(scores.exp() * scores).sum(-1)


if __name__ == "__main__":
    sys.exit(run_command(lambda arguments: train(load(arguments)), sys.argv[1:]))
