"""The finish tool: ends the episode; what it was called with is the answer."""


def finish(answer: str) -> str:
    """Give the final answer. Nothing can be done after it.

    Args:
        answer: The answer, alone.
    """
    return answer


finish.ends = True
