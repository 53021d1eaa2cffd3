from jobs.benches.packing import (
    MOST_BATCHES,
    PAPER_STEP_TOKENS,
    batch_to_forests,
    packing_batch,
    packing_learner,
    peak_gib,
)


def test_a_batch_on_its_way_to_forests_keeps_the_limit_of_memory(small_config) -> None:
    learner, batch = packing_learner(small_config()), packing_batch(12, PAPER_STEP_TOKENS)
    batch_to_forests(batch, learner)  # what is imported and cached at first is not the batch's
    on_top = peak_gib(lambda: batch_to_forests(batch, learner)) * 2**30
    assert batch.nbytes + on_top <= MOST_BATCHES * batch.nbytes
