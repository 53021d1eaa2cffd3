"""A real vLLM engine on a CPU: trees, versions, prefix cache and weights."""

import asyncio
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import SimpleQueue

import numpy as np
import psutil
import pytest
import ray
import torch

from tests.support.learning.tiny_models import save_tiny_model
from tests.support.stages.engine_with_worker import SplitEngine
from tests.support.whole_runs import assert_gone
from treerpo_ray.actor import root_cause
from treerpo_ray.algo.search import TreeShape, assemble
from treerpo_ray.algo.tree import StopReason, Tree
from treerpo_ray.config import Config
from treerpo_ray.engine._vllm_args import CPU_BLOCK_SIZE
from treerpo_ray.engine.engine import Engine, last_error
from treerpo_ray.engine.types import EngineSetup, EngineStats, Sampling
from treerpo_ray.learner.policy import Policy, load_policy
from treerpo_ray.prompts.prompt_set import load_tokenizer, resolve_model_path
from treerpo_ray.weights.files import WeightFile, WeightFiles
from treerpo_ray.weights.manifest import Digest, HostDigest, Manifest, pack_weights
from treerpo_ray.weights.rounds import Poll, Round
from treerpo_ray.weights.source import Group, GroupPlace, SenderPlace
from treerpo_ray.weights.transport import Outgoing, make_transport

pytestmark = [pytest.mark.ray, pytest.mark.engine]

SHAPE = TreeShape(num_children=(3, 2), step_tokens=(20, 30))


class ServedEngine:
    """An engine in an actor, as the pool has it."""

    def __init__(self, config: Config, index: int, kind: type[Engine] = Engine) -> None:
        actor = ray.remote(kind).options(num_cpus=0.5, max_concurrency=1000)
        self.actor = actor.remote(setup=EngineSetup.of(config), index=index, log_folder=None)
        self.processes: tuple[int, int] = ray.get(self.actor.start.remote())
        self.files = WeightFiles()

    def start_tree(
        self,
        prompt_ids: list[int],
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        shape: TreeShape = SHAPE,
    ):
        grow = self.actor.grow.options(num_returns="streaming")
        sampling = Sampling(temperature=temperature, top_p=top_p)
        return grow.remote(prompt_ids, shape, sampling, seed, [])

    def tree(
        self,
        prompt_ids: list[int],
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        shape: TreeShape = SHAPE,
    ) -> Tree:
        return collect(prompt_ids, self.start_tree(prompt_ids, seed, temperature, top_p, shape))

    def stats(self) -> EngineStats:
        return ray.get(self.actor.stats.remote())

    def probe(self, token_ids: list[int]) -> list[float]:
        return ray.get(self.actor.probe.remote(token_ids))

    def load(self, policy: Policy, version: int, chunk_bytes: int = 2**19) -> None:
        file = self.files.begin()
        self.load_packed(packed(policy, version, file, HostDigest, chunk_bytes), file)

    def load_packed(self, manifest: Manifest, file: WeightFile) -> None:
        place = file.seal()
        try:
            ray.get(self.actor.load.remote(manifest, place))
        finally:
            file.release()

    def stop(self) -> None:
        ray.get(self.actor.stop.remote())
        ray.kill(self.actor)


def packed(
    policy: Policy,
    version: int,
    memory: Outgoing,
    new_digest: Callable[[], Digest],
    chunk_bytes: int = 2**19,
) -> Manifest:
    manifest, _ = pack_weights(
        policy.named_weights(),
        version=version,
        dtype=torch.float32,
        chunk_bytes=chunk_bytes,
        allocate=memory.part,
        new_digest=new_digest,
    )
    return manifest


def collect(prompt_ids: list[int], stream) -> Tree:
    return assemble(prompt_ids, [ray.get(ref) for ref in stream])


@pytest.fixture(scope="module")
def served(small_config, ray_cluster) -> Iterator[ServedEngine]:
    engine = ServedEngine(small_config(), 0)
    yield engine
    engine.stop()


@pytest.fixture
def policy(small_config) -> Policy:
    return load_policy(
        resolve_model_path(small_config().model.path),
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )


@pytest.fixture
def changing(policy, served) -> Iterator[Policy]:
    """`policy`, to be changed: as it was, the engine serves it again afterwards."""
    original = {name: weight.clone() for name, weight in policy.named_weights()}
    yield policy
    with torch.no_grad():
        for name, weight in policy.named_weights():
            weight.copy_(original[name])
    served.load(policy, 0)


@pytest.fixture(scope="module")
def prompts(small_config) -> list[list[int]]:
    tokenizer = load_tokenizer(small_config().model.path, False)
    return [tokenizer.encode(f"{a}+17-{a}+25=?\n") for a in range(20, 32)]


def test_the_same_seed_gives_the_same_tree_alone_and_among_others(served, prompts) -> None:
    streams = [served.start_tree(ids, seed=5) for ids in prompts]
    together = [collect(ids, stream) for ids, stream in zip(prompts, streams, strict=True)]
    alone = served.tree(prompts[3], seed=5)
    for ours, theirs in zip(together[3].steps, alone.steps, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    other = served.tree(prompts[3], seed=6)
    assert [s.token_ids.tolist() for s in other.steps] != [
        s.token_ids.tolist() for s in alone.steps
    ]


def test_recorded_logprobs_are_the_learners_under_the_temperature(served, prompts, policy) -> None:
    temperature = 0.7
    tree = served.tree(prompts[0], seed=1, temperature=temperature)
    for leaf in tree.leaves:
        ids = prompts[0] + tree.path_token_ids(leaf)
        recorded = np.concatenate([tree.steps[i].logprobs for i in tree.path(leaf)])
        with torch.no_grad():
            policy.model.set_attn_implementation("sdpa")
            logits = policy.model(torch.tensor([ids])).logits[0] / temperature
        expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert recorded == pytest.approx(expected[len(prompts[0]) - 1 :].numpy(), abs=1e-4)


def test_tokens_come_from_the_nucleus_and_are_recorded_within_it(served, prompts, policy) -> None:
    top_p = 0.5
    tree = served.tree(prompts[0], seed=1, temperature=2.0, top_p=top_p)
    for leaf in tree.leaves:
        ids = prompts[0] + tree.path_token_ids(leaf)
        recorded = np.concatenate([tree.steps[i].logprobs for i in tree.path(leaf)])
        with torch.no_grad():
            policy.model.set_attn_implementation("sdpa")
            logits = policy.model(torch.tensor([ids])).logits[0, len(prompts[0]) - 1 : -1]
        sampled = torch.tensor(ids[len(prompts[0]) :])[:, None]
        shares = (logits / 2.0).softmax(-1)
        above = torch.where(shares > shares.gather(1, sampled), shares, 0).sum(-1)
        assert (above < top_p + 1e-4).all()  # the likelier tokens alone do not fill the nucleus
        nucleus = _nucleus(shares, top_p)
        expected = (nucleus / nucleus.sum(-1, keepdim=True)).gather(1, sampled)[:, 0].log()
        assert recorded == pytest.approx(expected.numpy(), abs=1e-3)


def _nucleus(shares: torch.Tensor, top_p: float) -> torch.Tensor:
    """`shares` with zeros outside the smallest set of tokens that has `top_p`."""
    ordered, order = shares.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(shares).scatter(-1, order, ordered)


def test_steps_end_at_their_length_or_with_the_end_token(served, prompts) -> None:
    tree = served.tree(prompts[1], seed=2)
    for index, step in enumerate(tree.steps):
        ends = step.token_ids[-1] == 256
        assert (step.stop is StopReason.END_OF_TEXT) == ends
        if not ends:
            assert len(step.token_ids) == SHAPE.step_tokens[tree.depths[index] - 1]


def test_above_the_last_depth_a_delimiter_ends_a_step(served, prompts) -> None:
    newline = prompts[1][-1]
    tree = served.tree(prompts[1], seed=2, shape=replace(SHAPE, delimiters=(newline,)))
    inner = [step for step, depth in zip(tree.steps, tree.depths, strict=True) if depth == 1]
    assert all(step.stop is StopReason.BOUNDARY for step in inner)
    assert all(step.token_ids.tolist().index(newline) + 1 == len(step.token_ids) for step in inner)
    last = [step for step, depth in zip(tree.steps, tree.depths, strict=True) if depth == 2]
    assert any(newline in step.token_ids[:-1] for step in last), "it ends none of the last depth"


STOP = ("=2", "1\n", "2\n")


@pytest.fixture(scope="module")
def stopping(small_config, ray_cluster) -> Iterator[ServedEngine]:
    engine = ServedEngine(small_config('model.stop=[\'=2\', "1\\n", "2\\n"]'), 1)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def first_end(small_config) -> Callable[[list[int]], int | None]:
    """Tells how many tokens of an answer there are up to its end by token or stop string."""
    tokenizer = load_tokenizer(small_config().model.path, False)

    def find(ids: list[int]) -> int | None:
        begins = (ids[:n] for n in range(1, len(ids) + 1))
        ends = (b for b in begins if b[-1] == 256 or any(s in tokenizer.decode(b) for s in STOP))
        return next(map(len, ends), None)

    return find


def test_an_answer_is_the_one_without_stop_strings_up_to_the_token_that_completes_one(
    served, stopping, prompts, first_end
) -> None:
    shape = TreeShape(num_children=(8,), step_tokens=(40,))
    num_stopped = 0
    for seed, ids in enumerate(prompts[:3]):
        whole, cut = (engine.tree(ids, seed, shape=shape) for engine in (served, stopping))
        for full, found in zip(whole.steps, cut.steps, strict=True):
            end = first_end(full.token_ids.tolist())
            assert found.token_ids.tolist() == full.token_ids[:end].tolist()
            assert found.logprobs == pytest.approx(full.logprobs[:end], abs=1e-4)
            assert (found.stop is StopReason.END_OF_TEXT) == (end is not None)
            num_stopped += end is not None and full.token_ids[end - 1] != 256
    assert num_stopped > 5


def test_no_answer_goes_on_behind_a_stop_string_wherever_steps_end(
    stopping, prompts, first_end
) -> None:
    newline = prompts[0][-1]
    num_across = num_delimited = 0
    for most in ((6, 2, 3, 20), (4, 6, 1, 20)):  # the first line is like 52-22=31
        shape = TreeShape(num_children=(8, 2, 1, 1), step_tokens=most, delimiters=(newline,))
        tree = stopping.tree(prompts[0], seed=1, shape=shape)
        for leaf in tree.leaves:
            found, last = tree.path_token_ids(leaf), tree.steps[leaf]
            end = first_end(found)
            assert end in (None, len(found))
            assert (last.stop is StopReason.END_OF_TEXT) == (end is not None)
            num_across += end is not None and first_end(last.token_ids.tolist()) is None
            num_delimited += found[-1] == newline and last.stop is StopReason.END_OF_TEXT
    assert num_across and num_delimited


def test_entropy_branching_ends_a_step_before_its_least_likely_token(served, prompts) -> None:
    plain = served.tree(prompts[1], seed=2)
    tree = served.tree(prompts[1], seed=2, shape=replace(SHAPE, entropy_window=8))
    for full, step in zip(plain.steps[:3], tree.steps[:3], strict=True):
        end = 12 + int(np.argmin(full.logprobs[12:]))
        assert step.token_ids.tolist() == full.token_ids[:end].tolist()
        assert step.num_discarded == 20 - end


def test_children_find_their_parents_blocks_in_the_prefix_cache(served, prompts) -> None:
    before = served.stats()
    tree = served.tree(prompts[2], seed=3)
    after = served.stats()
    prefixes = [len(prompts[2])] * SHAPE.num_children[0]
    for index, step in enumerate(tree.steps):
        if index in tree.children:
            prefix = len(prompts[2]) + len(step.token_ids)
            prefixes += [prefix] * len(tree.children[index])
    # Whole blocks below the last token; the prompt alone is shorter than a block.
    whole = sum((prefix - 1) // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE for prefix in prefixes)
    assert after.num_prompt_tokens - before.num_prompt_tokens == sum(prefixes)
    cached = after.num_cached_tokens - before.num_cached_tokens
    # The first child of a step may have to compute the block that the step had just filled.
    assert 0 < cached <= whole


def test_new_weights_are_proved_and_label_every_token(served, prompts, changing) -> None:
    torch.manual_seed(0)
    for version in (7, 8):
        with torch.no_grad():
            for weight in changing.model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        served.load(changing, version)
        probed = served.probe(prompts[0])
        expected = changing.sequence_logprobs(prompts[0]).tolist()
        assert probed == pytest.approx(expected, abs=1e-3)
        tree = served.tree(prompts[0], seed=4)
        assert (tree.min_version, tree.max_version) == (version, version)


@pytest.mark.parametrize("kind", ["ipc", "nccl"])
def test_weights_that_lie_on_the_device_or_come_from_a_group_are_proved_and_served(
    kind, served, changing, prompts
) -> None:
    polls, rounds = SimpleQueue[Poll](), SimpleQueue[Round | None]()

    def next_round(poll: Poll) -> Round | None:
        polls.put(poll)
        return rounds.get()

    transport = make_transport(
        kind, device=changing.device, address="127.0.0.1", next_round=next_round, limit_s=600.0
    )
    for version in (81, 82):  # the second time they are in the group
        with torch.no_grad():
            for _, weight in changing.named_weights():
                weight.mul_(1.01)
        memory = transport.begin()
        manifest = packed(changing, version, memory, transport.new_digest)
        place = memory.seal()
        if isinstance(place, SenderPlace):
            poll = polls.get()
            if version == 81:
                group = Group(name="g", address=poll.address, port=poll.port, world_size=2)
            rounds.put(Round(group=group, stamp=place.stamp))
            place = GroupPlace(group=group, first_rank=1, sizes=place.sizes)
        ray.get(served.actor.load.remote(manifest, place))
        ours = changing.sequence_logprobs(prompts[0]).tolist()
        assert served.probe(prompts[0]) == pytest.approx(ours, abs=1e-4)
    transport.close()
    rounds.put(None)


def test_a_request_that_vllm_turns_down_is_an_error_leaf_and_harms_nothing(served) -> None:
    tree = served.tree([50] * 400, seed=0)
    assert [step.stop for step in tree.steps] == [StopReason.ERROR] * SHAPE.num_children[0]
    assert len(served.tree([50] * 10, seed=0).steps) > SHAPE.num_children[0]


def test_requests_in_flight_go_on_under_new_weights_and_say_so(served, policy, prompts) -> None:
    spans: set[tuple[int, int]] = set()
    for seed in range(9, 29):  # on a busy machine all may be done before the new weights come
        served.load(policy, 1)
        before = served.stats().num_requests
        streams = [served.start_tree(ids, seed) for ids in prompts]
        while served.stats().num_requests < before + 5:
            time.sleep(0.005)
        served.load(policy, 2)
        trees = [collect(ids, stream) for ids, stream in zip(prompts, streams, strict=True)]
        steps = [step for tree in trees for step in tree.steps]
        spans |= {(step.versions.min(), step.versions.max()) for step in steps}
        if (1, 2) in spans:
            break
    assert (1, 2) in spans  # a step that was under way kept its tokens and went on
    assert all(low <= high for low, high in spans)


def test_requests_of_an_engine_that_sleeps_wait_until_it_has_loaded(
    served, policy, prompts
) -> None:
    before = served.tree(prompts[5], seed=1, shape=replace(SHAPE, num_children=(1, 1)))
    ray.get(served.actor.sleep.remote())
    stream = served.start_tree(prompts[5], seed=1, shape=replace(SHAPE, num_children=(1, 1)))
    assert not ray.wait([stream], timeout=1.0)[0], "it sleeps"
    served.load(policy, version=70)
    after = collect(prompts[5], stream)
    for ours, theirs in zip(after.steps, before.steps, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert set(ours.versions.tolist()) == {70}


def test_after_a_rollback_blocks_that_were_finished_under_other_weights_are_not_found(
    served, policy, prompts
) -> None:
    shape = TreeShape(num_children=(1, 1), step_tokens=(8, 48))
    mixed: list[Tree] = []
    for seed in range(11, 31):  # on a busy machine all may be done before the new weights come
        served.load(policy, 1)
        before = served.stats().num_requests
        streams = [served.start_tree(ids, seed, temperature=2.0, shape=shape) for ids in prompts]
        while served.stats().num_requests == before:
            time.sleep(0.002)
        served.load(policy, 2)
        trees = [collect(ids, stream) for ids, stream in zip(prompts, streams, strict=True)]
        mixed = [tree for tree in trees if set(tree.steps[-1].versions) == {1, 2}]
        if mixed:
            break
    longest = max(mixed, key=lambda tree: tree.num_sampled_tokens)
    prefix = longest.prompt_ids.tolist() + longest.path_token_ids(longest.leaves[0])
    whole = (len(prefix) - 1) // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE
    assert whole
    served.load(policy, 1)
    for expected in (0, whole):
        cached = served.stats().num_cached_tokens
        served.tree(prefix, 12, shape=TreeShape(num_children=(1,), step_tokens=(1,)))
        assert served.stats().num_cached_tokens - cached == expected


def test_a_tied_head_and_experts_are_not_stale_after_updates_and_other_bytes_are_not_served(
    small_config, ray_cluster, tmp_path
) -> None:
    """On two workers, each of which has a part of every weight and proves that it received all."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    sizes = {"hidden_size": 128, "head_dim": 32, "tie_word_embeddings": True}  # as vLLM takes them
    save_tiny_model(tmp_path, "qwen3_moe", **experts | sizes)
    tied = ServedEngine(small_config(f"model.path={tmp_path}"), 1, SplitEngine)
    core = psutil.Process(tied.processes[1])
    workers = [child for child in core.children() if "Worker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    policy = load_policy(
        str(tmp_path),
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )
    ids = list(range(40, 70))
    torch.manual_seed(1)
    for version in (1, 2):
        with torch.no_grad():
            for weight in policy.model.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        tied.load(policy, version)
        assert tied.probe(ids) == pytest.approx(policy.sequence_logprobs(ids).tolist(), abs=1e-3)
    file = tied.files.begin()
    manifest, chunks = pack_weights(
        policy.named_weights(),
        version=3,
        dtype=torch.float32,
        chunk_bytes=2**30,
        allocate=file.part,
    )
    chunks[0][0] ^= 1
    with pytest.raises(RuntimeError, match="worker 0 received other bytes"):
        tied.load_packed(manifest, file)
    ray.kill(tied.actor)
    for process in (core, *workers):
        assert_gone(process)


def test_adapters_are_served_beside_the_weights_of_the_start_and_versions_do_not_mix(
    small_config, ray_cluster, prompts
) -> None:
    config = small_config("lora.rank=3", "lora.alpha=7")
    served = ServedEngine(config, 2)
    start = resolve_model_path(config.model.path)
    cpu = torch.device("cpu")
    policy = load_policy(
        start, dtype=torch.float32, device=cpu, gradient_checkpointing=False, lora=config.lora
    )
    ids, base = list(range(40, 70)), policy.sequence_logprobs(list(range(40, 70))).tolist()
    assert served.probe(ids) == pytest.approx(base, abs=1e-4), "until a version comes"
    prefix = (prompts[0] * 5)[: 2 * CPU_BLOCK_SIZE + 1]
    one_token = TreeShape(num_children=(1,), step_tokens=(1,))
    torch.manual_seed(0)
    for version in (1, 2):
        for _, weight in policy.adapters.named():
            weight.normal_(std=0.1)
        served.load(policy, version, chunk_bytes=2**15)
        expected = policy.sequence_logprobs(ids).tolist()
        assert served.probe(ids) == pytest.approx(expected, abs=1e-4)
        assert max(abs(one - other) for one, other in zip(expected, base, strict=True)) > 0.1
        for hits in (0, 2 * CPU_BLOCK_SIZE):
            cached = served.stats().num_cached_tokens
            [step] = served.tree(prefix, seed=3, shape=one_token).steps
            assert served.stats().num_cached_tokens - cached == hits
            logprob = policy.sequence_logprobs([*prefix, *step.token_ids.tolist()])[-1]
            assert step.logprobs[-1] == pytest.approx(float(logprob), abs=1e-4)
            assert step.versions.tolist() == [version]
    file = served.files.begin()
    strange = {"base_model.model.model.layers.0.mlp.w1.lora_A.weight": torch.zeros(3, 128)}
    manifest, _ = pack_weights(
        strange.items(), version=3, dtype=torch.float32, chunk_bytes=2**20, allocate=file.part
    )
    told = r"lora\.target_modules: vLLM serves no adapter of model\.layers\.0\.mlp\.w1"
    with pytest.raises(ray.exceptions.RayTaskError, match=told):
        served.load_packed(manifest, file)
    ray.kill(served.actor)


class Sleeper:
    """Takes the place of vLLM, of which a CPU would keep the memory."""

    level = 0

    async def sleep(self, level: int, mode: str) -> None:
        assert mode == "keep"
        self.level = level


@pytest.mark.parametrize(("rank", "level"), [(0, 2), (8, 1)])
def test_an_engine_that_sleeps_keeps_the_weights_that_no_version_brings(
    small_config, rank: int, level: int
) -> None:
    setup = EngineSetup.of(small_config(f"lora.rank={rank}"))
    engine = Engine(setup=setup, index=0, log_folder=None)
    engine._llm = Sleeper()  # level 1 moves weights to main memory, level 2 drops them
    asyncio.run(engine.sleep())
    assert engine._llm.level == level


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        ("(EngineCore pid=7) ERROR 11-29 [core.py:9] ValueError: no room", "ValueError: no room"),
        ("(EngineCore pid=7) torch.OutOfMemoryError: CUDA\n", "torch.OutOfMemoryError: CUDA"),
        (
            "RuntimeError: first\n  File x\nKeyError: 'second'\n"
            "RuntimeError: Engine core initialization failed. See root cause above.",
            "KeyError: 'second'",
        ),
        ("WARNING 11-29 [arg_utils.py:1] all is well\nno error: at all", None),
        ("", None),
    ],
)
def test_the_cause_of_a_failed_start_is_the_last_error_that_vllm_printed(printed, error) -> None:
    assert last_error(printed) == error


def test_a_model_that_vllm_cannot_load_is_one_plain_line(
    small_config, ray_cluster, tmp_path
) -> None:
    shutil.copytree(resolve_model_path(small_config().model.path), tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 400}))
    setup = EngineSetup.of(small_config(f"model.path={tmp_path}/model"))
    kind = ray.remote(Engine).options(num_cpus=0.5)
    actor = kind.remote(setup=setup, index=9, log_folder=str(tmp_path / "logs"))
    with pytest.raises(RuntimeError, match="vLLM does not start: ") as caught:
        ray.get(actor.start.remote())
    line = root_cause(caught.value)
    assert re.match(r"RuntimeError: vLLM does not start: \w+Error: .*(size|shape)", line), line
    ray.kill(actor)
