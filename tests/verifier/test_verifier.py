import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.answers.verdicts import verdicts_of
from tests.support.planted_secrets import holds_secret
from tests.support.processes import PATIENCE_S, is_running, wait_for_file, wait_until_dead
from tests.support.project import PROJECT
from treerpo_ray.errors import UserCodeError
from treerpo_ray.verifier.verdict import Answer, Verdict
from treerpo_ray.verifier.verifier import Verifier

UNRULY = "tests.support.answers.unruly_answers"
FALSE = "tests.support.answers.false_self_test"
TIMEOUT_S = 8.0
"""A machine that does other work as well answers in less; what hangs here does so for an hour."""


def answers(*texts: str, is_cut_off: bool = False) -> list[Answer]:
    return [Answer(text=text, references=("right",), is_cut_off=is_cut_off) for text in texts]


@pytest.fixture(scope="module")
def unruly():
    with Verifier(check=UNRULY, num_workers=2, timeout_s=TIMEOUT_S, memory_mib=256) as verifier:
        verifier.self_test()
        yield verifier


def worker_pids(verifier: Verifier, folder: Path) -> list[int]:
    file = folder / "pids"
    verdicts_of(verifier, answers(*[f"write pid {file}"] * 64))
    return sorted({int(line) for line in file.read_text().split()})


def test_verdicts_come_in_the_order_of_the_answers(unruly):
    texts = [("right", "left", "")[index % 3] for index in range(200)]
    right = [(Verdict.CORRECT, Verdict.WRONG, Verdict.UNANSWERED)[i % 3] for i in range(200)]
    assert verdicts_of(unruly, answers(*texts)) == right
    assert verdicts_of(unruly, []) == []


def test_a_cut_off_text_is_cut_off_only_if_it_holds_no_answer(unruly):
    verdicts = verdicts_of(unruly, answers("right", "left", "", is_cut_off=True))
    assert verdicts == [Verdict.CORRECT, Verdict.WRONG, Verdict.CUT_OFF]


def test_only_a_correct_answer_earns_a_reward_and_faults_are_no_rewards():
    assert {v for v in Verdict if v.reward} == {Verdict.CORRECT}
    assert {v for v in Verdict if not v.is_reward} == {Verdict.TIMED_OUT, Verdict.ERRORED}


def test_hanging_answers_are_killed_and_alone(unruly):
    hangs = ("sleep", "hang in C", "backtrack")
    texts = [text for hang in hangs for text in (*["right"] * 20, hang, *["left"] * 20)]
    expected = [*[Verdict.CORRECT] * 20, Verdict.TIMED_OUT, *[Verdict.WRONG] * 20]
    assert verdicts_of(unruly, answers(*texts)) == expected * len(hangs)


def test_a_fault_is_an_error_of_that_answer_alone_and_the_pool_still_serves(unruly):
    for fault in ("raise", "recurse", "hog", "abort", "exit"):
        verdicts = verdicts_of(unruly, answers(*["right"] * 9, fault, *["left"] * 9))
        expected = [*[Verdict.CORRECT] * 9, Verdict.ERRORED, *[Verdict.WRONG] * 9]
        assert verdicts == expected, fault
        assert verdicts_of(unruly, answers("right", "left")) == [Verdict.CORRECT, Verdict.WRONG], (
            fault
        )


def test_many_faults_in_one_call_each_hit_only_themselves(unruly):
    texts = ["right", "abort", "sleep", "left", "hog", "abort", "raise", "right"]
    assert verdicts_of(unruly, answers(*texts)) == [
        Verdict.CORRECT,
        Verdict.ERRORED,
        Verdict.TIMED_OUT,
        Verdict.WRONG,
        Verdict.ERRORED,
        Verdict.ERRORED,
        Verdict.ERRORED,
        Verdict.CORRECT,
    ]


def test_a_worker_killed_from_outside_is_replaced(unruly, tmp_path):
    pids = worker_pids(unruly, tmp_path)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_until_dead(pids) == []
    assert verdicts_of(unruly, answers(*["right"] * 50)) == [Verdict.CORRECT] * 50
    (tmp_path / "pids").unlink()
    assert not set(worker_pids(unruly, tmp_path)) & set(pids)


def test_a_worker_killed_while_it_starts_is_replaced():
    with Verifier(check=UNRULY, num_workers=2, timeout_s=PATIENCE_S, memory_mib=64) as verifier:
        for worker in list(verifier._workers):
            worker.process.kill()
            worker.process.wait()  # or it may yet take an answer, if it had just started
        assert verdicts_of(verifier, answers(*["right"] * 20)) == [Verdict.CORRECT] * 20


def test_a_worker_killed_amid_a_chunk_costs_the_answer_that_it_was_at(tmp_path):
    with Verifier(check=UNRULY, num_workers=1, timeout_s=PATIENCE_S, memory_mib=64) as verifier:
        verifier.self_test()
        worker = verifier._workers[0].process

        def kill() -> None:
            wait_for_file(tmp_path / "pids")
            worker.kill()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        # One chunk holds half of them.
        texts = ["right", f"hang in C {tmp_path / 'pids'}", *["left"] * 6]
        verdicts = verdicts_of(verifier, answers(*texts))
        killer.join()
        assert verdicts == [Verdict.CORRECT, Verdict.ERRORED, *[Verdict.WRONG] * 6]


def test_a_worker_that_has_grown_ends_before_it_fails_an_answer(tmp_path):
    with Verifier(check=UNRULY, num_workers=1, timeout_s=PATIENCE_S, memory_mib=128) as verifier:
        first = worker_pids(verifier, tmp_path)
        assert verdicts_of(verifier, answers(*["grow"] * 50)) == [Verdict.CORRECT] * 50  # 800 MiB
        (tmp_path / "pids").unlink()
        assert worker_pids(verifier, tmp_path) != first


def test_workers_leave_no_core_and_read_no_input(unruly):
    assert verdicts_of(unruly, answers("core", "stdin")) == [Verdict.CORRECT, Verdict.CORRECT]


def test_workers_get_no_secret_of_the_environment(unruly):
    verdicts_of(unruly, answers("right"))
    for worker in unruly._workers:
        environment = Path(f"/proc/{worker.process.pid}/environ").read_bytes()
        assert b"PATH=" in environment and not holds_secret(environment)


def test_workers_run_in_parallel(tmp_path):
    """Each answer waits for another process to have one too."""
    with Verifier(check=UNRULY, num_workers=2, timeout_s=PATIENCE_S, memory_mib=64) as verifier:
        meeting = answers(*[f"meet {tmp_path / 'pids'}"] * 8)
        assert verdicts_of(verifier, meeting) == [Verdict.CORRECT] * 8


def test_a_verifier_of_a_thread_outlives_the_thread():
    made: list[Verifier] = []

    def make() -> None:
        made.append(Verifier(check=UNRULY, num_workers=1, timeout_s=PATIENCE_S, memory_mib=64))
        verdicts_of(made[0], answers("right"))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join()
    with made[0] as verifier:
        pid = verifier._workers[0].process.pid
        assert verdicts_of(verifier, answers("right")) == [Verdict.CORRECT]
        assert verifier._workers[0].process.pid == pid


def test_a_closed_verifier_has_no_processes_and_says_so(tmp_path):
    verifier = Verifier(check=UNRULY, num_workers=2, timeout_s=PATIENCE_S, memory_mib=64)
    pids = worker_pids(verifier, tmp_path)
    verifier.close()
    verifier.close()
    assert pids and not any(map(is_running, pids))
    with pytest.raises(RuntimeError, match="closed"):
        verdicts_of(verifier, answers("right"))


@pytest.mark.parametrize("in_thread", [False, True])
def test_workers_die_with_their_parent_even_while_they_hang(tmp_path, in_thread):
    code = f"""
import threading
from treerpo_ray.verifier.verifier import Answer, Verifier
def work():
    verifier = Verifier(check="{UNRULY}", num_workers=2, timeout_s={TIMEOUT_S}, memory_mib=64)
    texts = ["write pid {tmp_path / "pids"}"] * 9
    answer = lambda text: Answer(text=text, references=("",), is_cut_off=False)
    verifier.grade([answer(text) for text in texts])
    print("ready", flush=True)
    verifier.grade([answer("hang in C {tmp_path / "hanging"}")])
if {in_thread}:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
else:
    work()
"""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout.readline() == b"ready\n"
        wait_for_file(tmp_path / "hanging")
        parent.kill()
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert pids and wait_until_dead(pids) == []


def test_the_main_module_is_not_run_again_in_a_worker(tmp_path):
    script = tmp_path / "odd main.py"
    script.write_text(
        'print("main runs", flush=True)\n'
        "from treerpo_ray.verifier.verifier import Answer, Verifier\n"
        f'settings = dict(check="{UNRULY}", num_workers=2, timeout_s={PATIENCE_S}, memory_mib=64)\n'
        "with Verifier(**settings) as verifier:\n"
        '    answer = Answer(text="a", references=("a",), is_cut_off=False)\n'
        "    print(verifier.grade([answer])[0].verdict.value)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", str(script)],
        capture_output=True,
        env=environment,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.stdout.split("\n"), done.stderr) == (["main runs", "correct", ""], "")


def test_it_says_when_it_waits_for_workers(caplog):
    with (
        caplog.at_level(logging.INFO, logger="treerpo_ray.verifier.verifier"),
        Verifier(check=UNRULY, num_workers=1, timeout_s=PATIENCE_S, memory_mib=64) as verifier,
    ):
        verdicts_of(verifier, answers("right"))
    assert "waiting for 1 verifier workers" in caplog.text


@pytest.mark.parametrize("name", ["no_such_module", "no.such.module", "treerpo_ray.nothing", ""])
def test_an_unknown_module_is_named_with_its_key(name):
    with pytest.raises(ValueError, match=r"verifier\.check"):
        Verifier(check=name, num_workers=1, timeout_s=PATIENCE_S, memory_mib=64)


def test_a_module_without_the_check_is_refused():
    with (
        Verifier(
            check="treerpo_ray.verifier.verifier",
            num_workers=1,
            timeout_s=PATIENCE_S,
            memory_mib=64,
        ) as verifier,
        pytest.raises(ValueError, match=r"verifier\.check.*check_answer"),
    ):
        verdicts_of(verifier, answers("right"))


@pytest.mark.parametrize("wrong", [(0, 1.0, 64), (1, 0.0, 64), (1, 1.0, 0)])
def test_limits_must_be_positive(wrong):
    num_workers, timeout_s, memory_mib = wrong
    with pytest.raises(ValueError, match="must be positive"):
        Verifier(check=UNRULY, num_workers=num_workers, timeout_s=timeout_s, memory_mib=memory_mib)


def test_a_failing_self_test_names_its_pair():
    with (
        Verifier(
            check="tests.support.answers.false_self_test",
            num_workers=1,
            timeout_s=PATIENCE_S,
            memory_mib=64,
        ) as verifier,
        pytest.raises(UserCodeError, match=r"'two' against \['2'\] is wrong, should be correct"),
    ):
        verifier.self_test()


def test_importing_the_verifier_loads_none_of_the_heavy_packages():
    heavy = "{'torch', 'ray', 'vllm', 'transformers', 'sympy', 'math_verify'}"
    code = f"import sys, treerpo_ray.verifier.verifier; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0
