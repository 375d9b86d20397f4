"""The text between the last ``<answer>`` and ``</answer>`` of a response."""

OPEN, CLOSE, END_OF_THOUGHT = "<answer>", "</answer>", "</think>"


def last_answer(response: str, after_thought: bool = True) -> str | None:
    """Stripped content of the last closed answer tag after the last ``</think>``; anywhere, if there is no such mark or
    `after_thought` is False.

    The content may span lines.  An unclosed tag is no answer.  Of nested opening tags the innermost counts.
    Linear in the length of the response; tags are matched exactly, in lower case.
    """
    start = max(response.rfind(END_OF_THOUGHT), 0) if after_thought else 0
    close = response.rfind(CLOSE, start)
    if close < 0:
        return None
    begin = response.rfind(OPEN, start, close)
    return None if begin < 0 else response[begin + len(OPEN) : close].strip()
