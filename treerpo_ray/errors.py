"""Problems: questions with their accepted answers, from files, the Hub or an embedded task.

Whether a path is a file is told from its form: a URI, a known suffix or an existing file is one,
an existing folder is a Hugging Face data set on this disk, `name` or `org/name` is one on the Hub.
"""


def one_line(error: BaseException) -> str:
    """Text of an error on one line, of bounded length, that any terminal can print."""
    text = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 400 else f"{text[:400]}..."


class RunFailed(Exception):
    """A run ended for good; one line with the cause and where to look."""
