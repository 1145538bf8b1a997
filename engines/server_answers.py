"""Reads what a vLLM server answers, and believes none of it: count, range, type and ends.

A server may be half started, out of memory, behind a proxy, or be another program. What it says of
tokens is trained on, so each of these readers raises ValueError, with what is wrong, for an answer
that cannot be true.
"""

import math

from engines.base import Completion, Sampling

ROUNDING = 1e-3  # a logprob may be so far above 0
# No token that was sampled is less likely than e to this: vLLM says -9999 for what cannot be.
UNLIKELIEST = -1000.0


def only_choice(answer, prompt: list[int]) -> dict:
    """Picks the one choice of a completion of `prompt`."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError(f"a completion without its one choice: {_start(answer)}")
    if choices[0].get("prompt_token_ids") != prompt:
        raise ValueError("it confirms other token ids than it was given")
    return choices[0]


def with_images(answer) -> dict:
    """Writes an answer of /inference/v1/generate as a completion: other readers read both."""
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise ValueError(f"an answer without choices: {_start(answer)}")
    choices = []
    for choice in answer["choices"]:
        if not isinstance(choice, dict):
            raise ValueError(f"a choice {_start(choice)}")
        beside = {key: answer.get(key) for key in ("prompt_token_ids", "prompt_logprobs")}
        choices.append(choice | beside | {"logprobs": _of_tokens(choice)})
    return {"choices": choices}


def _of_tokens(choice: dict) -> dict | None:
    """Reads the logprobs of a choice of /inference/v1/generate, which must be of its very tokens;
    None where there are none, as nobody asked for them."""
    logprobs = choice.get("logprobs")
    if logprobs is None:
        return None
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"as logprobs {_start(logprobs)}")
    if [entry.get("token_id") for entry in content] != choice.get("token_ids"):
        raise ValueError("logprobs of other tokens than it sampled")
    return {"token_logprobs": [entry.get("logprob") for entry in content]}


def completion(choice: dict, sampling: Sampling, vocabulary: int) -> Completion:
    """Reads the turn in a choice. vocabulary: ids are below it."""
    # 1. the tokens
    ids = choice.get("token_ids")
    if not isinstance(ids, list):
        raise ValueError(f"token_ids = {_start(ids)}: no list")
    if not 1 <= len(ids) <= sampling.max_new_tokens:
        raise ValueError(f"{len(ids)} tokens, where 1 to {sampling.max_new_tokens} were asked for")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(f"a token {_start(token)}: ids are below {vocabulary}")

    # 2. a logprob for each
    logprobs = choice.get("logprobs")
    logprobs = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise ValueError(f"{len(ids)} tokens, and as logprobs {_start(logprobs)}")
    for logprob in logprobs:
        if _logprob(logprob) < UNLIKELIEST:
            raise ValueError(f"a sampled token of logprob {logprob}")

    # 3. how it ended
    finish = choice.get("finish_reason")
    reason = choice.get("stop_reason")
    if any(token in sampling.stop_ids for token in ids[:-1]):
        raise ValueError("a turn that goes on behind a stop token")
    if finish == "stop" and isinstance(reason, str):
        if reason not in sampling.stop_strings:
            raise ValueError(f"a turn that ended with {_start(reason)}, which ends none")
        finish = "stop_string"
    elif finish == "stop":
        if ids[-1] not in sampling.stop_ids:
            raise ValueError(f"a turn that ended with token {ids[-1]}, which ends none")
    elif finish != "length":
        raise ValueError(f"a turn that ended with {_start(finish)}")
    return Completion(ids, [float(logprob) for logprob in logprobs], finish)


def prompt_logprobs(choice: dict, prompt: list[int]) -> list[float]:
    """Reads the logprobs (T - 1) of prompt[1:]."""
    by_position = choice.get("prompt_logprobs")
    if not isinstance(by_position, list) or len(by_position) != len(prompt):
        raise ValueError(f"prompt_logprobs of {len(prompt)} ids: {_start(by_position)}")
    logprobs = []
    for token, at_position in zip(prompt[1:], by_position[1:], strict=True):
        entry = at_position.get(str(token)) if isinstance(at_position, dict) else None
        if not isinstance(entry, dict):
            raise ValueError(f"prompt_logprobs without token {token}: {_start(at_position)}")
        logprobs.append(_logprob(entry.get("logprob")))
    return logprobs


def gap_of_best(choice: dict) -> float:
    """Measures the difference of the two best logprobs of the first token."""
    logprobs = choice.get("logprobs")
    first = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
    best = first[0] if isinstance(first, list) and first else None
    if not isinstance(best, dict) or len(best) < 2:
        raise ValueError(f"top_logprobs = {_start(first)}: expected two for a token")
    ordered = sorted((_logprob(logprob) for logprob in best.values()), reverse=True)
    return ordered[0] - ordered[1]


def models_served(answer) -> tuple[str, int | None, list[str]]:
    """Reads (name of the model, its max_model_len if that is said, names of all adapters)."""
    cards = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(cards, list):
        raise ValueError(f"/v1/models lists no models: {_start(answer)}")
    base = None
    adapters = []
    for card in cards:
        if not isinstance(card, dict) or not isinstance(card.get("id"), str):
            raise ValueError(f"/v1/models lists {_start(card)}")
        if card.get("parent"):
            adapters.append(card["id"])
        elif base is None:
            base = card
    if base is None:
        raise ValueError(f"/v1/models lists no model: {_start(answer)}")
    room = base.get("max_model_len")
    if room is not None and type(room) is not int:
        raise ValueError(f"max_model_len = {_start(room)}")
    return base["id"], room, adapters


def tokens(answer) -> list[int]:
    """Reads the ids of a text, from /tokenize."""
    ids = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError(f"/tokenize says {_start(answer)}")
    return ids


def prompt_ids(answer) -> list[int]:
    """Reads the ids that stand for a prompt with images, from /inference/v1/generate."""
    ids = answer.get("prompt_token_ids") if isinstance(answer, dict) else None
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError(f"prompt_token_ids = {_start(ids)}: no list of ids")
    return ids


def results_of_workers(answer) -> list:
    """Reads what the workers returned, from /collective_rpc."""
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or not results:
        raise ValueError(f"/collective_rpc says {_start(answer)}")
    return results


def weights_held(result) -> tuple[str, bool]:
    """Reads what a worker says: (name of the weights it has, whether it reads our folder)."""
    name = result.get("name") if isinstance(result, dict) else None
    reads = result.get("reads") if isinstance(result, dict) else None
    if type(name) is not str or type(reads) is not bool:
        raise ValueError(f"a worker says {_start(result)}")
    return name, reads


def _logprob(value) -> float:
    """Reads a logprob as a float; ValueError if it is none."""
    if type(value) not in (int, float) or not math.isfinite(value) or value > ROUNDING:
        raise ValueError(f"a logprob {_start(value)}: expected a number up to 0")
    return float(value)


def _start(value) -> str:
    """Quotes the beginning of what was answered, for a message."""
    if isinstance(value, list | dict) and len(value) > 100:
        return f"{len(value)} entries"
    return repr(value)[:100]
