"""The proof of a chat template: what it takes and writes, and that a conversation is its pieces.

    find_facts(chat)             what closes a turn, what the generation prompt opens, ...
    find_format(chat)            in which of our formats it writes a call
    check_conversations(chat)    its rendering of a whole is the concatenation, or UserError

Nothing is read out of the template's source: it is asked by rendering dummy messages, one question
a function. `chat` is a chat.Chat, which renders; here is only what to render and what to conclude.
Each answer goes into chat.facts at once, because the next question is put as the last one taught
(a template that wants content as parts is asked everything else in parts).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from os.path import commonprefix

from formats import FORMATS
from formats.base import (
    THINK,
    Call,
    Format,
    any_of,
)
from formats.messages import assistant_message, count_images
from run.config import UserError

SENTINEL = "zqSENTINELqz"  # letters only: no template trims, quotes or escapes it
ARGUMENT = "zqARGUMENTqz"  # a name that no tool has for one of its own
WORDS = "I compute."  # in front of a call
IMAGE_PART = {"type": "image"}
QUESTION = {"role": "user", "content": "x"}
ADVICE = "use format=json_actions, fence or tags"


@dataclass
class TemplateFacts:
    """What a chat template takes, what it writes around a turn, what it writes in its own way."""

    # What it takes.
    as_parts: bool = False  # content as a list of parts only, not as a string
    has_system: bool = True  # a system prompt; else its text goes into the first user message
    json_arguments: bool = False  # a call's arguments as their JSON, not as an object
    drops_words: bool = False  # words in front of a call are not written
    tool_images: bool = True  # a result shows its images; else a user's message behind it

    # What it writes between the prompt and the text of a turn.
    header: str = ""  # what add_generation_prompt adds, thinking apart
    opening: str = ""  # "<think>\n", if the generation prompt ends in it
    lead: str = ""  # the blanks between generation prompt and answer
    call_lead: str = ""  # the blanks between generation prompt and call

    # What it writes for an image.
    image: str = ""  # its placeholder, with what stands around it

    # What ends a turn.
    close: str = ""  # the token that the template writes behind an assistant's text
    stop_tokens: tuple[str, ...] = ()  # what a model may end its turn with; close is the first
    stop_ids: tuple[int, ...] = ()  # the ids of these

    # Sentences on where the template writes a conversation in another way than its pieces.
    differences: list[str] = field(default_factory=list)

    def declare(self, sentence: str) -> None:
        if sentence not in self.differences:
            self.differences.append(sentence)


# 1. What does it take, and what does it write around a turn?


def find_facts(chat) -> None:
    """Finds all that can be asked without tools; sets chat.facts. UserError: it cannot be used."""
    facts = chat.facts
    saying = {"role": "user", "content": SENTINEL}
    facts.as_parts = SENTINEL not in try_text(chat, saying)
    if SENTINEL not in chat.text_of([saying]):
        raise chat.refusal("it drops what the user says")
    facts.has_system = shows_system_prompt(chat)
    if not facts.has_system:
        facts.declare("no system role: its text is put at the head of the first user message")

    prompt = chat.text_of([QUESTION], generate=True)
    answered = chat.text_of([QUESTION, assistant_message(SENTINEL)])
    before, sentinel, after = answered.partition(SENTINEL)
    if not sentinel:
        raise chat.refusal("it drops what the assistant says")
    facts.close = find_close(chat, after)
    facts.stop_tokens = find_stop_tokens(chat, facts.close)
    facts.stop_ids = tuple(chat.tokenizer.convert_tokens_to_ids(list(facts.stop_tokens)))
    facts.opening = find_opening(prompt)
    facts.header = find_header(chat, prompt)
    facts.lead = find_lead(chat, prompt, before)
    facts.call_lead = facts.lead  # unless find_format sees another
    if chat.vision:
        facts.image = find_image(chat)
    if chat.vision and not facts.image:
        facts.declare("shows no images, so the model is shown none")
        chat.vision = None
    if trims_answers(chat):
        facts.declare("trims the assistant's text")


def try_text(chat, *messages, start=False) -> str:
    """Renders messages that a template may refuse: then ""."""
    try:
        return chat.text_of(messages, start=start)
    except UserError:
        return ""


def shows_system_prompt(chat) -> bool:
    """Asks whether there is a system role."""
    system = {"role": "system", "content": SENTINEL}
    return SENTINEL in try_text(chat, system, QUESTION)


def find_image(chat) -> str:
    """Finds what is written for an image of a user: one placeholder, and what is around it; "" if
    something else is."""
    text = {"type": "text", "text": SENTINEL}
    written = try_text(chat, {"role": "user", "content": [text, IMAGE_PART, text]})
    image = written.partition(SENTINEL)[2].partition(SENTINEL)[0]
    return image if image.count(chat.vision.token) == 1 else ""


def find_close(chat, after: str) -> str:
    """Finds the token that closes an assistant's turn. after: what is written behind its text."""
    token = any_of(chat.added_tokens).match(after)
    if not token:
        raise chat.refusal(f"no token closes the assistant's turn, {after[:40]!r} follows it")
    return token[0]


def find_stop_tokens(chat, close: str) -> tuple[str, ...]:
    """Lists what a model may end its turn with: the template's own token, the eos token, and those
    of its generation_config, of which Qwen has two."""
    candidates = [chat.tokenizer.eos_token or ""]
    names = {id: token.content for id, token in chat.tokenizer.added_tokens_decoder.items()}
    candidates += [names.get(id, "") for id in chat.eos_ids]
    if chat.format_name in ("llama3", "auto"):
        candidates.append("<|eom_id|>")  # Llama ends a call with it, where it has python
    stops = [close]
    for token in candidates:
        if token in chat.added_tokens and token not in stops:
            stops.append(token)
    return tuple(stops)


def find_opening(prompt: str) -> str:
    """Finds the thinking that a generation prompt opens, with the line break behind it."""
    thinking = re.search(r"<think>\s*$", prompt)
    return thinking[0] if thinking else ""


def find_header(chat, prompt: str) -> str:
    """Finds what a generation prompt adds to a conversation, its thinking left out."""
    asked = chat.text_of([QUESTION])
    header = prompt[len(commonprefix([prompt, asked])) :]
    return THINK.sub("", header.removesuffix(chat.facts.opening)).rstrip()


def find_lead(chat, prompt: str, before: str) -> str:
    """Finds the blanks between generation prompt and answer, where nothing else may stand.

    before: what is written in front of an answer. It need not begin with the prompt: some templates
    open the thinking only in a prompt."""
    if not before.startswith(prompt):
        return ""
    lead = before.removeprefix(prompt)
    if THINK.sub("", chat.facts.opening + lead).strip():
        raise chat.refusal(f"{lead!r} stands between generation prompt and answer")
    return leading_blanks(lead)


def trims_answers(chat) -> bool:
    """Asks whether blanks around an answer are lost."""
    padded = f"  {SENTINEL} \n"
    text = chat.text_of([QUESTION, assistant_message(padded)])
    return padded + chat.facts.close not in text


def leading_blanks(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


# 2. In which format does it write calls?


def find_format(chat) -> None:
    """Finds the format in which the template writes calls: the chat's own, or any if it is "auto".

    Sets chat.format, chat.format_name and what belongs to calls in chat.facts. UserError: tools,
    calls or results are not shown, or the syntax of its calls is another one."""
    facts = chat.facts
    prompt = check_tools(chat)
    name = chat.tools[0]["function"]["name"] if chat.tools else "python"
    call = Call(name, {ARGUMENT: SENTINEL, ARGUMENT[2:]: True})
    candidates = own_formats() if chat.format_name == "auto" else [chat.format_name]
    first_seen = ""  # the first call that is written at all, for the refusal
    for json_arguments in (False, True):
        facts.json_arguments = json_arguments
        written = written_behind(chat, prompt, assistant_message("", [call]))
        worded = written_behind(chat, prompt, assistant_message(SENTINEL, [call]))
        first_seen = first_seen or strip_thinking(written)
        found = match_format(chat, candidates, call, written, worded)
        if found:
            break
    if found:
        chat.format_name, chat.format = found
        set_call_facts(chat, call, written, worded)
        check_results(chat, name)
    elif chat.tools:
        raise explain_no_format(chat, call, first_seen)
    else:  # nothing to call: any format will do
        chat.format_name = "hermes"
        facts.json_arguments = False


def set_call_facts(chat, call: Call, written: str, worded: str) -> None:
    """Sets what the template does around a call, now that its format is known."""
    facts = chat.facts
    facts.drops_words = drops_words(worded)
    in_format = chat.format.write(SENTINEL, [call])
    has_words = in_format.count(SENTINEL) == 2  # not in llama3, where a turn is call or answer
    if facts.drops_words and has_words:
        facts.declare("drops words in front of a call")
    if strip_thinking(written) == written.lstrip():
        facts.call_lead = leading_blanks(written)


def own_formats() -> list[str]:
    """Lists the formats that a template may have of its own."""
    return [name for name, format in FORMATS.items() if not format.inline]


def check_tools(chat) -> str:
    """Renders a prompt with the tools, all of which it has to show."""
    prompt = chat.text_of([QUESTION], generate=True, start=True)
    for tool in chat.tools:
        if tool["function"]["name"] not in prompt:
            raise chat.refusal(f"it ignores tools; {ADVICE}")
    return prompt


def written_behind(chat, prompt: str, message: dict) -> str:
    """Renders a message and cuts off the prompt in front of it."""
    text = try_text(chat, QUESTION, message, start=True)
    asked = prompt.removesuffix(chat.facts.opening)
    return text[len(commonprefix([text, asked])) :]


def strip_thinking(text: str) -> str:
    return THINK.sub("", text).lstrip()


def drops_words(worded: str) -> bool:
    """Says whether the words in front of a call are missing. worded: SENTINEL in front of a call
    with SENTINEL in its arguments."""
    return worded.count(SENTINEL) < 2


def match_format(
    chat, names: list[str], call: Call, written: str, worded: str
) -> tuple[str, Format] | None:
    """Finds the format, and its style, that writes this call as the template does.

    written: the template's text of the call; worded: with words in front, which it may drop."""
    close = chat.facts.close
    written = strip_thinking(written)
    worded = strip_thinking(worded)
    for name in names:
        format = FORMATS[name](chat.tools)
        for style in format.styles:
            format.style = style
            if not written.startswith(format.write("", [call]) + close):
                continue
            in_format = format.write(SENTINEL, [call]) + close
            if drops_words(worded) or worded.startswith(in_format):
                return name, format
    return None


def explain_no_format(chat, call: Call, written: str) -> UserError:
    """Makes the error that says how the template writes a call, and what would do instead."""
    if not written:
        # Why? Rendering it once more raises the template's own reason.
        chat.text_of([QUESTION, assistant_message("", [call])], start=True)
    if SENTINEL not in written:
        return chat.refusal(f"it ignores tool calls; {ADVICE}")
    found = match_format(chat, own_formats(), call, written, worded="")
    advice = f"use format={found[0]}" if found else ADVICE
    return chat.refusal(f"it writes a call as {written[:160]!r}; {advice}")


def check_results(chat, name: str) -> None:
    """Checks that what a tool says is shown."""
    called = assistant_message("", [Call(name, {})])
    result = {"role": "tool", "name": name, "content": SENTINEL}
    text = chat.text_of([QUESTION, called, result])
    if SENTINEL not in text:
        raise chat.refusal(f"it ignores tool results; {ADVICE}")
    if chat.vision:
        content = [{"type": "text", "text": SENTINEL}, IMAGE_PART]
        text = try_text(chat, QUESTION, called, result | {"content": content})
        chat.facts.tool_images = SENTINEL in text and text.count(chat.vision.token) == 1
        if not chat.facts.tool_images:
            chat.facts.declare("shows no images in results: a user's message behind them has them")


# 3. Is the whole the concatenation of its pieces?


def check_conversations(chat) -> None:
    """Proves it on dummy conversations; declares what differs. UserError: something else does."""
    for messages in conversations(chat):
        compare(chat, messages)


def conversations(chat) -> Iterator[list[dict]]:
    """Gives what the proof renders: one round and two, thinking, one call and two, odd results."""
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "2+3?"}
    again = {"role": "user", "content": "3?"}
    answer = assistant_message("It is 5.")
    thought = "<think>\nhm\n</think>\n\n"
    yield [system, user, answer]
    yield [user, answer, again, answer]
    yield [system, user, assistant_message(f"{thought}It is 5."), again, answer]
    picture = {"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "What is it?"}]}
    if chat.vision:
        yield [system, picture, answer, picture, answer]
    if not chat.tools:
        return

    name = chat.tools[0]["function"]["name"]
    call = Call(name, {ARGUMENT: 'print("ü")'})
    called = assistant_message("", [call])
    for content in ("5", ' "quoted" \\ \n', '{"a": [1, 2]}', "\nünï ✓ 漢\n\n", ""):
        result = {"role": "tool", "name": name, "content": content}
        yield [system, user, called, result, answer]

    five = {"role": "tool", "name": name, "content": "5"}
    seven = {"role": "tool", "name": name, "content": "7"}
    words = "" if chat.facts.drops_words else WORDS
    thoughtful = assistant_message(thought + words if words else "", [call])
    yield [user, thoughtful, five, answer, again, called, seven, answer]
    yield [user, thoughtful, five, called, seven, answer]
    # in an open turn an inline result stands where no template writes one
    if chat.vision and not chat.format.in_place:
        parts = [{"type": "text", "text": "5\nimage 2:"}, IMAGE_PART, {"type": "text", "text": "."}]
        seen = {"role": "tool", "name": name, "content": parts}
        yield [picture, called, seen, answer, again, called, seen, answer]
    if chat.format.parallel:
        yield [user, assistant_message(words, [call, call]), five, seven, answer]


def compare(chat, messages: list[dict]) -> None:
    """Compares the pieces of a conversation with the template's rendering, as text and as ids."""
    pictures = dummy_pictures(chat, messages)
    ours = "".join(text for text, _ in chat.pieces(messages))
    theirs = chat.text_of(messages, start=True)
    ids, _ = chat.render(messages, pictures)
    whole = chat.encode(ours, first=True, pictures=pictures)
    if not is_same(chat, ours, theirs):
        our_thoughts = THINK.findall(ours)
        their_thoughts = THINK.findall(theirs)
        has_thoughts = bool(our_thoughts or their_thoughts)
        only_thoughts = is_same(chat, drop_thinking(chat, ours), drop_thinking(chat, theirs))
        if not has_thoughts or not only_thoughts:
            their_ids = chat.encode(theirs, first=True, pictures=pictures)
            raise chat.refusal(first_difference(chat, ids, their_ids))
        chat.facts.declare(name_difference(our_thoughts, their_thoughts))
    # An inline result is encoded apart from the turn that it goes on in, as in a rollout.
    has_results = any(message["role"] == "tool" for message in messages)
    if ids != whole and not (chat.format.inline and has_results):
        raise chat.refusal(f"pieces and whole differ: {first_difference(chat, ids, whole)}")


def dummy_pictures(chat, messages: list[dict]) -> list:
    """Makes a Picture for each image in messages."""
    count = count_images(messages)
    if not count:
        return []
    from PIL import Image

    return [chat.vision.prepare(Image.new("RGB", (64, 64)))] * count


def is_same(chat, ours: str, theirs: str) -> bool:
    """Checks that the template wrote what we did. Behind the last stop token it may still write a
    line break or the eos token."""
    if not theirs.startswith(ours):
        return False
    tail = theirs.removeprefix(ours)
    return not any_of(chat.added_tokens).sub("", tail).strip()


def drop_thinking(chat, text: str) -> str:
    """Drops the thinking, and the whitespace that it leaves at the start of a turn."""
    text = THINK.sub("", text)
    header = chat.facts.header
    if not header:
        return text
    return re.sub(re.escape(header) + r"\s*", header, text)


def name_difference(our_thoughts: list[str], their_thoughts: list[str]) -> str:
    """Says what the template does with thinking: strip it, add an empty one, or only space it."""
    our_words = [text for text in our_thoughts if text.strip()]
    their_words = [text for text in their_thoughts if text.strip()]
    if len(our_words) > len(their_words):
        return "strips the thinking of earlier turns"
    if len(their_thoughts) > len(our_thoughts):
        return "adds an empty <think></think>"
    return "writes other whitespace around thinking"


def first_difference(chat, ours: list[int], theirs: list[int]) -> str:
    """Shows the tokens around the place from which two lists of ids differ."""
    show = chat.tokenizer.convert_ids_to_tokens
    same = commonprefix([ours, theirs])
    at = len(same)
    mine = show(ours[at : at + 8])
    other = show(theirs[at : at + 8])
    return f"token {at}, after {show(same[-6:])}, is {mine} in the pieces, {other} in the whole"
