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
from formats.messages import THOUGHTS, assistant_message, count_images
from run.config import UserError

SENTINEL = "zqSENTINELqz"  # letters only: no template trims, quotes or escapes it
ARGUMENT = "zqARGUMENTqz"  # a name that no tool has for one of its own
WORDS = "I compute."  # in front of a call
IMAGE_PART = {"type": "image"}
QUESTION = {"role": "user", "content": "x"}
ADVICE = (
    "use format=json_actions, fence or tags, or a template with tools: --chat_template=file.jinja"
)


@dataclass
class TemplateFacts:
    """What a chat template takes, what it writes around a turn, what it writes in its own way."""

    # What it takes.
    as_parts: bool = False  # content as a list of parts only, not as a string
    has_system: bool = True  # a system prompt; else its text goes into the first user message
    json_arguments: bool = False  # a call's arguments as their JSON, not as an object
    drops_words: bool = False  # words in front of a call are not written there
    thinking_key: str = ""  # of a message, which has the thinking; "": it stands in the content
    calls_in_text: bool = False  # calls are not written, so they are put into the content
    tool_images: bool = True  # a result shows its images; else a user's message behind it

    # What it writes between the prompt and the text of a turn.
    header: str = ""  # what add_generation_prompt adds, thinking apart
    opening: str = ""  # "<think>\n", if the generation prompt ends in it
    lead: str = ""  # the blanks between generation prompt and answer
    call_lead: str = ""  # the blanks between generation prompt and call

    # What it writes for an image.
    image: str = ""  # its placeholder, with what stands around it

    # What ends a turn.
    close: str = ""  # the token that the template writes behind an assistant's last text
    inner_close: str = ""  # the one behind a text that something follows
    call_close: str = ""  # the one behind a call
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
    facts.inner_close = find_inner_close(chat)
    facts.close = find_close(chat, after)
    facts.call_close = facts.inner_close  # unless find_format sees another
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


def find_inner_close(chat) -> str:
    """Finds the token behind an assistant's text that a user answers: that which closes its turn
    there, or the header of the user's, by which such a model ends its own. "": there is none."""
    talk = [QUESTION, assistant_message(SENTINEL), QUESTION]
    _, _, after = try_text(chat, *talk).partition(SENTINEL)
    token = any_of(chat.added_tokens).match(after)
    return token[0] if token else ""


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
    if not token and chat.facts.inner_close:
        return chat.facts.inner_close
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
    thinking = re.search(r"(?:<think>\s*|<\|channel>thought\n)$", prompt)
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
    writer = header_writer(chat, lead)
    if writer and chat.format_name in ("auto", writer):
        chat.format_name = writer
        chat.format = FORMATS[writer](chat.tools)
        return ""
    if THINK.sub("", chat.facts.opening + lead).strip():
        remedy = f"; use format={writer}" if writer else ""
        raise chat.refusal(f"{lead!r} stands between generation prompt and answer{remedy}")
    return leading_blanks(lead)


def header_writer(chat, lead: str) -> str:
    """Names the format that has the model write what stands between generation prompt and answer;
    "" if there is none."""
    for name in own_formats():
        format = FORMATS[name](chat.tools)
        if format.writes_header and format.write(SENTINEL, []) == lead + SENTINEL:
            return name
    return ""


def trims_answers(chat) -> bool:
    """Asks whether blanks around an answer are lost."""
    padded = f"  {SENTINEL} \n"
    text = chat.text_of([QUESTION, assistant_message(padded), QUESTION])
    return padded + chat.facts.inner_close not in text


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
    arguments = {ARGUMENT: SENTINEL}
    for place, value in enumerate((True, None, [True])):  # which templates write in several ways
        arguments[ARGUMENT[place + 1 :]] = value
    call = Call(name, arguments)
    candidates = own_formats() if chat.format_name == "auto" else [chat.format_name]
    result = {"role": "tool", "name": name, "content": "5"}
    first_seen = ""  # the first call that is written at all, for the refusal
    for json_arguments in (False, True):
        facts.json_arguments = json_arguments
        written = written_behind(chat, prompt, assistant_message("", [call]), result)
        worded = written_behind(chat, prompt, assistant_message(SENTINEL, [call]), result)
        first_seen = first_seen or strip_thinking(written)
        found = match_format(chat, candidates, call, written, worded)
        if found:
            break
    if not found and SENTINEL not in first_seen:
        found = put_calls_into_text(chat, candidates)
        if found:
            written = written_behind(chat, prompt, assistant_message("", [call]), result)
            worded = written_behind(chat, prompt, assistant_message(SENTINEL, [call]), result)
    if found:
        chat.format_name, chat.format = found
        set_call_facts(chat, call, written, worded)
        check_results(chat, name)
    elif chat.tools:
        raise explain_no_format(chat, call, first_seen)
    else:  # nothing to call: any format will do
        chat.format_name = "hermes"
        facts.json_arguments = False


def put_calls_into_text(chat, names: list[str]) -> tuple[str, Format] | None:
    """Finds the format of a template that writes no calls, but whose tokenizer knows the tokens
    around them: its models call, and their calls have to stand in the text of their turn."""
    for name in names:
        tokens = FORMATS[name].tokens
        if tokens and set(tokens) <= set(chat.added_tokens):
            chat.facts.json_arguments = False
            chat.facts.calls_in_text = True
            chat.facts.declare("writes no calls: they are put into the text of their turn")
            chat.format_name = name
            chat.format = FORMATS[name](chat.tools)
            return name, chat.format
    return None


def set_call_facts(chat, call: Call, written: str, worded: str) -> None:
    """Sets what the template does around a call, now that its format is known."""
    facts = chat.facts
    behind = written.partition(chat.format.write("", [call]))[2]
    token = any_of(chat.added_tokens).match(behind)
    facts.call_close = token[0] if token else facts.inner_close
    if facts.call_close not in facts.stop_tokens:
        facts.stop_tokens += (facts.call_close,)
        facts.stop_ids = tuple(chat.tokenizer.convert_tokens_to_ids(list(facts.stop_tokens)))
    odd = Call(call.name, {ARGUMENT: f'it\'s "{SENTINEL}" \\ \n'})
    in_format = chat.format.write("", [odd])
    if in_format not in try_text(chat, QUESTION, assistant_message("", [odd])):
        facts.declare("escapes nothing in the text of a call")
    facts.thinking_key = find_thinking_key(chat, call)
    worded = strip_thinking(worded)
    facts.drops_words = drops_words(worded, chat.format.write("", [call]).lstrip())
    in_format = chat.format.write(SENTINEL, [call])
    has_words = in_format.count(SENTINEL) == 2  # not in llama3, where a turn is call or answer
    if facts.drops_words and has_words:
        is_moved = worded.count(SENTINEL) >= 2
        verb = "moves" if is_moved else "drops"
        facts.declare(f"{verb} words in front of a call{' behind it' if is_moved else ''}")
    if strip_thinking(written) == written.lstrip() and not chat.format.writes_header:
        facts.call_lead = leading_blanks(written)


def find_thinking_key(chat, call: Call) -> str:
    """Finds the key of a message by which this template takes thinking, where it writes that in
    tokens of its own."""
    if not chat.format.has_own_thinking:
        return ""
    thought = assistant_message(f"<think>\n{SENTINEL}\n</think>\n\n", [call])
    for key in THOUGHTS:
        chat.facts.thinking_key = key
        thoughts = chat.format.thinking.findall(try_text(chat, QUESTION, thought))
        if any(SENTINEL in text for text in thoughts):
            return key
    return ""


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


def written_behind(chat, prompt: str, *messages: dict) -> str:
    """Renders messages and cuts off the prompt in front of them."""
    text = try_text(chat, QUESTION, *messages, start=True)
    asked = prompt.removesuffix(chat.facts.opening)
    common = commonprefix([text, asked])
    if common != asked:  # not in the middle of a tag: a thought and a call begin alike
        common = re.sub(r"<[^\s<>]*$", "", common)
    return text[len(common) :]


def strip_thinking(text: str) -> str:
    return THINK.sub("", text).lstrip()


def drops_words(worded: str, bare: str) -> bool:
    """Says whether the words in front of a call are missing there. worded: SENTINEL in front of a
    call with SENTINEL in its arguments. bare: the call without words."""
    return worded.count(SENTINEL) < 2 or worded.startswith(bare)


def match_format(
    chat, names: list[str], call: Call, written: str, worded: str
) -> tuple[str, Format] | None:
    """Finds the format, and its style, that writes this call as the template does.

    written: the template's text of the call; worded: with words in front, which it may drop."""
    ends_call = any_of(chat.added_tokens)
    written = strip_thinking(written)
    worded = strip_thinking(worded)
    for name in names:
        format = FORMATS[name](chat.tools)
        for style in format.styles:
            format.style = style
            bare = format.write("", [call]).lstrip()
            if not written.startswith(bare) or not ends_call.match(written, len(bare)):
                continue
            in_format = format.write(SENTINEL, [call]).lstrip()
            if drops_words(worded, bare) or worded.startswith(in_format):
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
    yield [system, user, answer]
    yield [user, answer, again, answer]
    thoughtful = assistant_message(chat.format.with_thought("hm", "It is 5."))
    yield [system, user, thoughtful, again, answer]
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
    thoughtful = assistant_message(words_before_call(chat, words, call), [call])
    yield [user, thoughtful, five, answer, again, called, seven, answer]
    yield [user, thoughtful, five, called, seven, answer]
    # in an open turn an inline result stands where no template writes one
    if chat.vision and not chat.format.in_place:
        parts = [{"type": "text", "text": "5\nimage 2:"}, IMAGE_PART, {"type": "text", "text": "."}]
        seen = {"role": "tool", "name": name, "content": parts}
        yield [picture, called, seen, answer, again, called, seen, answer]
    if chat.format.parallel:
        yield [user, assistant_message(words, [call, call]), five, seven, answer]


def words_before_call(chat, words: str, call: Call) -> str:
    """Chooses what the proof writes in front of a call: all that the template takes there."""
    both = chat.format.with_thought("hm", words)
    if words and try_text(chat, QUESTION, assistant_message(both, [call])):
        return both
    return chat.format.with_thought("hm", "") if chat.facts.thinking_key else ""


def compare(chat, messages: list[dict]) -> None:
    """Compares the pieces of a conversation with the template's rendering, as text and as ids."""
    pictures = dummy_pictures(chat, messages)
    pieces = chat.pieces(messages)
    ours = "".join(text for text, _ in pieces)
    theirs = chat.text_of(messages, start=True)
    ids, _ = chat.render(messages, pictures)
    whole = chat.encode(ours, first=True, pictures=pictures)
    as_theirs = with_inner_closes(chat, pieces)
    if as_theirs != ours:
        inner = chat.facts.inner_close
        chat.facts.declare(f"ends answers that are not the last by {inner}")
    once = without_repeated_headers(chat, pieces, theirs)
    if once != theirs:
        theirs = once
        chat.facts.declare("repeats the header behind a result, as its generation prompt does not")
    if not is_same(chat, as_theirs, theirs):
        our_thoughts = chat.format.thinking.findall(as_theirs)
        their_thoughts = chat.format.thinking.findall(theirs)
        has_thoughts = bool(our_thoughts or their_thoughts)
        only_thoughts = is_same(chat, drop_thinking(chat, as_theirs), drop_thinking(chat, theirs))
        if not has_thoughts or not only_thoughts:
            their_ids = chat.encode(theirs, first=True, pictures=pictures)
            raise chat.refusal(first_difference(chat, ids, their_ids))
        chat.facts.declare(name_difference(our_thoughts, their_thoughts))
    # An inline result is encoded apart from the turn that it goes on in, as in a rollout.
    has_results = any(message["role"] == "tool" for message in messages)
    if ids != whole and not (chat.format.inline and has_results):
        raise chat.refusal(f"pieces and whole differ: {first_difference(chat, ids, whole)}")


def with_inner_closes(chat, pieces: list[tuple[str, int]]) -> str:
    """Joins the pieces of a conversation as the template closes its turns: in a whole conversation
    an answer may end in another token than where it is the last."""
    facts = chat.facts
    text = ""
    for place, (piece, is_turn) in enumerate(pieces):
        is_last = place == len(pieces) - 1
        if is_turn and not is_last and facts.close != facts.inner_close:
            piece = re.sub(f"{re.escape(facts.close)}$", lambda _: facts.inner_close, piece)
        text += piece
    return text


def without_repeated_headers(chat, pieces: list[tuple[str, int]], theirs: str) -> str:
    """Drops headers from the template's rendering of a whole that stand behind a result which its
    own generation prompt leaves open: a model is not sampled behind them."""
    header = chat.facts.header
    for piece, is_turn in pieces[1:]:
        piece = piece.removesuffix(find_opening(piece))
        tokens = any_of(chat.added_tokens).findall(piece)
        goes_on = not is_turn and header not in piece and tokens and piece.endswith(tokens[-1])
        if goes_on:
            repeated = re.escape(tokens[-1] + header) + r"\s*"
            theirs = re.sub(repeated, lambda _, end=tokens[-1]: end, theirs)
    return theirs


def dummy_pictures(chat, messages: list[dict]) -> list:
    """Makes a Picture for each image in messages."""
    count = count_images(messages)
    if not count:
        return []
    from PIL import Image

    return [chat.vision.prepare(Image.new("RGB", (64, 64)))] * count


def is_same(chat, ours: str, theirs: str) -> bool:
    """Checks that the template wrote what we did. Behind the last stop token it may still write a
    line break or the eos token; a stop token that begins the next message it writes only there."""
    if theirs == ours.removesuffix(chat.facts.inner_close):
        return True
    if not theirs.startswith(ours):
        return False
    tail = theirs.removeprefix(ours)
    return not any_of(chat.added_tokens).sub("", tail).strip()


def drop_thinking(chat, text: str) -> str:
    """Drops the thinking, and the whitespace that it leaves at the start of a turn."""
    text = chat.format.thinking.sub("", text)
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
