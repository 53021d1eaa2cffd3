"""Files as users write them: checks, forms and rules, good and bad."""

CHECK = '''
def check_answer(text, references, row):
    """Whole credit for the answer, half for one that is near."""
    if not text:
        return None
    return 1 if text in references else 0.5 if text == row.get("near") else False

SELF_TEST = [
    ("4", ["4"], True),
    {"text": "5", "references": ["4"], "row": {"near": "5"}, "expected": 0.5},
    {"text": "6", "references": ["4"], "expected": False},
    {"text": "", "references": ["4"], "expected": None},
]
'''
UNRULY = """
import ctypes, os, subprocess, sys, time

HOARD = []

def deep(text):
    return {"known": 1}[text]

def check_answer(text, references):
    print("what is printed goes nowhere")
    match text.split():
        case ["number", value]:
            return float(value)
        case ["text"]:
            return "1"
        case ["list"]:
            return [1.0]
        case ["raise"]:
            return deep(text)
        case ["exit"]:
            os._exit(5)
        case ["sys.exit"]:
            sys.exit(0)
        case ["abort"]:
            os.abort()
        case ["sleep"]:
            time.sleep(3600)
        case ["hog"]:
            while True:
                HOARD.append(bytes(2**24))
        case ["forge", number]:
            for fd in range(3, 4096):
                try:
                    os.write(fd, b"\\x00\\x00\\x00\\x02{}" if number == "short" else b"\\xff" * 64)
                except OSError:
                    pass
            time.sleep(3600)
        case ["close"]:
            os.closerange(3, 4096)
            time.sleep(3600)
        case ["child", file]:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            with open(file, "w") as pids:
                pids.write(str(child.pid))
            time.sleep(3600)
    return True

SELF_TEST = [("right", [], True)]
"""
JUDGE = r"""
import asyncio, json, os, time

async def check_answer(text, question):
    if text == "block":
        time.sleep(3600)
    if text == "exit":
        os._exit(5)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(question))
    try:
        writer.write(f"POST / HTTP/1.0\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        if " 200 " not in head.splitlines()[0]:
            raise ConnectionError(head.splitlines()[0])
        return json.loads(body)["score"]
    finally:
        writer.close()

SELF_TEST = [{"text": "0.5", "question": PORT, "expected": (0.4, 0.6)}]
"""
CREDIT = """
import numpy as np

def scaled(values):
    mean = values.mean(-1, keepdims=True)
    scale = mean * (1 - mean)
    is_equal = np.ptp(values, axis=-1, keepdims=True) < 1e-9
    return np.where(is_equal, 0.0, (values - mean) / np.where(is_equal, 1.0, scale))

def over_baseline(tree, values, baseline):
    return values.steps - baseline

def over_leaves(tree, values):
    return values.steps - np.nanmean(values.steps[list(tree.leaves)])

def over_leaves_error(tree, values):
    return values.step_errors

def spread(groups):
    return groups.ranges
"""
