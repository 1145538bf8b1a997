"""Messages to token ids, and sampled ids to tool calls, with the tokenizer's own chat template.

    chat = Chat(tokenizer, "hermes", [get_json_schema(add)])  # proves the template, or UserError
    ids = chat.prompt([{"role": "user", "content": "2+3?"}])  # ends with the generation prompt
    text, calls = chat.parse(sampled)                         # [Call("add", {"a": 2, "b": 3})]
    ids += sampled + chat.observation([(calls[0], "5")], closed=True)

A trajectory is a concatenation: prompt, sampled turn, observation, sampled turn, ... Sampled ids
are never decoded and encoded again. An observation is the *suffix* that the template writes after
a closed assistant turn: the glue behind its stop token (Qwen's newline), the tool messages, the
next generation prompt. To get it, a conversation is rendered that begins with the row's own
prompt, in which a template may look for a flag such as /no_think, goes on with a dummy's turn and
ends in these tool messages; what follows the dummy's turn is kept. That takes 0.1 ms, as long as
encoding the text, so nothing is cached, and whatever a template does to a result (trim, quote) is
simply done.
`render` makes the ids and the mask of SFT from the same pieces.

Images are content parts, {"type": "image"}, in messages of the user and in results; what each shows
is given beside the messages, as Pictures in their order. The template writes one placeholder for
each, which becomes the ids of its Picture when the text is encoded. Where a template shows none in
results, they follow in a message of the user.

Is that concatenation what the model was trained to read? `Chat(...)` proves it on a few dummy
conversations: the template's rendering of the whole is the concatenation, in text and in ids, or
differs in ways that `differences` then lists. Otherwise a UserError says what was seen. The proof
is formats/proof.py; this file only renders.

How a turn calls tools is a format: formats/. format="auto" has the template write a call, and
takes the format that reads just like it. That needs no `response_template` of the tokenizer; nor is
anything read by transformers' parse_response, which uses it: that one cuts blanks off values and
passes on what the model has to be told is wrong (tests/test_formats.py shows both).
"""

import json
import re
from collections.abc import Sequence
from copy import copy
from datetime import datetime
from itertools import groupby
from operator import itemgetter

import jinja2

from formats import FORMATS, Call
from formats.base import any_of, as_json, split_thought, tools_of_row, with_ids
from formats.messages import assistant_message, calls_of, count_images, has_images, openai_call
from formats.proof import (
    QUESTION,
    SENTINEL,
    TemplateFacts,
    check_conversations,
    check_tools,
    find_facts,
    find_format,
    find_opening,
)
from images import Picture, open_image
from learning.vision import Vision
from run.config import UserError

# Stands for the n-th added token typed in somebody's text; code points for private use.
MARK = "\ue0f3{}\ue0f4"
MARKED = re.compile("\ue0f3([0-9]+)\ue0f4")
# Stands for an image in a result that is written into the text of a turn; for private use, too.
IMAGE = "\ue0f5"
MOST_KEPT = 256  # chats with the tools of a row
BLIND = "this model sees no images: leave out the rows that have some"
LABEL = re.compile(r"image \d+:\s*$")  # what the loop writes in front of an image of a result
# What every template is given, and no option can set.
TEMPLATE_INPUTS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")
# Templates that write the date get this one: a run resumed tomorrow sees the same prompts.
TODAY = datetime(2024, 7, 26)


class Chat:
    """One tokenizer, one call format, one set of tools (JSON schemas as `get_json_schema` makes).

    format: a name in formats.FORMATS, or "auto"; format_name: the one in use, never "auto", and
    without tools not yet the template's own.
    stop_ids: ids that close an assistant turn. stop_strings: text that ends a turn in an inline
    format; the ids stay as sampled even if the last token goes on behind it. differences:
    sentences on where the template itself would write a conversation in another way. options: of
    the template, such as "enable_thinking=false" for Qwen3. eos_ids: further ids that end a turn,
    those of the model's generation_config. vision: of a model that sees.
    UserError: the template cannot be proved, or does not know an option."""

    def __init__(
        self,
        tokenizer,
        format: str = "hermes",
        tools: list[dict] = (),
        options: Sequence[str] = (),
        eos_ids: Sequence[int] = (),
        vision: Vision | None = None,
    ):
        if format not in (*FORMATS, "auto"):
            raise UserError(f"format = {format!r}: expected one of auto, {', '.join(FORMATS)}")
        self.tokenizer = tokenizer
        self.tools = list(tools)
        self.eos_ids = tuple(eos_ids)
        self.vision = vision
        self.asked_format = format
        self.format_name = format
        self.format = FORMATS["hermes" if format == "auto" else format](self.tools)
        try:
            template = tokenizer.get_chat_template(tools=self.tools or None)
        except ValueError as e:
            raise self.refusal("there is none; use an Instruct model") from e
        self.options = options
        self._variables = read_options(options, template)

        # Text typed by a user or a tool must not become a control token. In a result that includes
        # the template's own markers (</tool_response>), which are often not called special.
        added = [t for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
        special = {token.content for token in added if token.special}
        # The longest first: where one token begins another, the patterns find the longer.
        texts = sorted({token.content for token in added})
        self.added_tokens = sorted(texts, key=len, reverse=True)
        in_user = [token for token in self.added_tokens if token in special]
        in_tool = [token for token in self.added_tokens if token in special or token in template]
        # Nor may anybody's text become an image, what the assistant writes included.
        for_images = [vision.token] if vision else []
        in_user += [token for token in for_images if token not in in_user]
        in_tool += [token for token in for_images if token not in in_tool]
        self._guards = {
            "user": any_of(in_user),
            "tool": any_of(in_tool),
            "assistant": any_of(for_images),
        }

        self.facts = TemplateFacts()
        find_facts(self)
        self._guards["assistant"] = any_of([*self.facts.stop_tokens, *for_images])
        if format == "auto" or (self.tools and not self.format.inline):
            find_format(self)
        if "strftime_now" in template:
            self.facts.declare(f"the date in prompts is always {TODAY:%d %b %Y}")
        check_conversations(self)
        self.stop_ids = self.facts.stop_ids
        self.stop_strings = self.format.stop_strings
        self.differences = tuple(self.facts.differences)
        self._for_rows: dict[str, Chat] = {}  # JSON of a row's tools -> the chat with these
        self._first_with_tools: Chat | None = None  # of these, where this one has none

    def with_tools(self, tools: list[dict]) -> "Chat":
        """Makes this chat with other tools, for rows that bring their own. The proof is the
        template's and takes tens of milliseconds: only that all tools are shown is repeated."""
        if not self.tools or not tools:  # a template may be another one without tools
            format = self.format_name if self.tools else self.asked_format
            return Chat(self.tokenizer, format, tools, self.options, self.eos_ids, self.vision)
        other = copy(self)
        other.tools = list(tools)
        other._for_rows = {}
        other.format = FORMATS[self.format_name](other.tools)
        other.format.style = self.format.style
        other.stop_strings = other.format.stop_strings
        if not other.format.inline:
            check_tools(other)
        return other

    def for_row(self, example: dict) -> "Chat":
        """Makes the chat with the tools that a row names or brings along; this one where it says
        nothing of tools. Those of the last rows are kept."""
        shown = tools_of_row(example.get("tools"), self.tools)
        if shown == self.tools:
            return self
        key = json.dumps(shown)
        if key not in self._for_rows:
            # the template is proved for calls once, by the first tools that there are
            proved = self._first_with_tools or self
            self._for_rows[key] = proved.with_tools(shown)
            if shown and not self.tools:
                self._first_with_tools = self._first_with_tools or self._for_rows[key]
            if len(self._for_rows) > MOST_KEPT:
                self._for_rows.pop(next(iter(self._for_rows)))
        return self._for_rows[key]

    # What the loop uses.

    @property
    def sees(self) -> bool:
        """Whether the model is shown images."""
        return self.vision is not None

    def pictures(self, example: dict) -> list[Picture]:
        """Opens the images of a data row's messages, and makes them what the model sees."""
        folder = example.get("image_folder")
        return [self.picture(source, folder) for source in example.get("images") or ()]

    def picture(self, source, folder: str | None = None) -> Picture:
        """Makes what the model sees of an image: one of PIL, or what images.open_image opens.
        UserError if it sees none."""
        if self.vision is None:
            raise UserError(BLIND)
        return self.vision.prepare(open_image(source, folder))

    def prompt(self, messages: list[dict], pictures: Sequence[Picture] = ()) -> list[int]:
        """Encodes the messages before the first sampled turn, tool schemas, generation prompt.
        pictures: those of its images, in order."""
        self._check_images(messages, pictures)
        text = self.text_of(messages, generate=True, start=True)
        return self.encode(text, first=True, pictures=pictures)

    def opening_behind(self, ids: list[int]) -> str:
        """Finds the thinking that is open at the end of a context: by its generation prompt, which
        may depend on a flag in the row's own prompt, and not behind an inline result."""
        tail = self.tokenizer.decode(ids[-8:], clean_up_tokenization_spaces=False)
        return find_opening(tail)

    def parse(self, ids: list[int], opening: str | None = None) -> tuple[str, list[Call]]:
        """Reads a sampled turn -> its text without the stop token, and its calls in order. A tool
        response that the model wrote itself is text like any other. opening: of its context; None:
        as for most rows."""
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if not self.tools:
            return text, []
        opening = self.facts.opening if opening is None else opening
        return text, self.format.parse(opening + text)

    def is_closed(self, ids: list[int]) -> bool:
        """Says whether results can follow a sampled turn as it ended: in a stop token, and in that
        of a call where the result goes on behind it."""
        if not ids or ids[-1] not in self.stop_ids:
            return False
        if not self.format.result_goes_on:
            return True
        return self.tokenizer.convert_ids_to_tokens(ids[-1]) == self.facts.call_close

    def observation(
        self,
        results: list[tuple[Call, str | list]],
        closed: bool,
        prompt: Sequence[dict] = (QUESTION,),
        pictures: Sequence[Picture] = (),
    ) -> list[int]:
        """Encodes what comes between a turn and the next (mask 0).

        results: in call order; a content is a string, or a list of content parts if there are
        images in it. closed: the turn ended in one of stop_ids. If not, the missing close comes
        first, or an inline format goes on. prompt: the messages before the first turn. pictures: of
        the images of all results, in order."""
        # 1. the results as messages, each with the name and the id of its call
        messages = []
        calls = with_ids([call for call, _ in results])
        for call, (_, content) in zip(calls, results, strict=True):
            message = {
                "role": "tool",
                "name": call.name,
                "content": content,
                "tool_call_id": call.id,
            }
            messages.append(message)

        self._check_images(messages, pictures)

        # 2. as text, if the format is inline: the turn goes on behind it, or, where its calls or
        # the model itself closed it, it is a user's message
        if self.format.inline:
            text = self._inline_results(messages)
            if self.format.in_place and not closed:
                return self.encode(text, pictures=pictures)
            messages = [{"role": "user", "content": image_parts(text)}]

        # 3. what the template writes around them
        text = self._between(messages, closed, prompt)
        return self.encode(text, pictures=pictures)

    def reply(
        self,
        content: str | list,
        ids: list[int],
        prompt: Sequence[dict] = (QUESTION,),
        pictures: Sequence[Picture] = (),
    ) -> list[int]:
        """Encodes what a user says behind an answer, and what leads to the next turn (mask 0). ids:
        the trajectory so far. prompt: the messages that the answer was to. pictures: of the images
        in the content."""
        messages = [{"role": "user", "content": content}]
        self._check_images(messages, pictures)
        was_closed = ids[-1] in self.stop_ids
        if self.format.result_goes_on:  # of two stop tokens one begins what follows an answer
            last = self.tokenizer.convert_ids_to_tokens(ids[-1])
            was_closed = last == self.facts.close
        return self.encode(self._between(messages, was_closed, prompt), pictures=pictures)

    def render(
        self, messages: list[dict], pictures: Sequence[Picture] = ()
    ) -> tuple[list[int], list[int]]:
        """Encodes a whole conversation -> ids, and a mask: 1 on what the model is to write, stop
        tokens too. pictures: those of its images, in order."""
        self._check_images(messages, pictures)
        ids = []
        mask = []
        for text, bit in self.pieces(messages):
            piece = self._ids_of_text(text, first=not ids)
            if self.vision:
                shown = piece.count(self.vision.placeholder)
                piece = self._expand(piece, pictures[:shown])
                pictures = pictures[shown:]
            ids += piece
            mask += [bit] * len(piece)
        if pictures:
            raise self.refusal(f"it does not show {len(pictures)} of the images")
        return ids, mask

    def fits(self, ids: list[int], pictures: Sequence[Picture]) -> bool:
        """Says whether a context holds as many placeholders as its pictures have: what a model
        sampled may have added one."""
        return self.vision is None or self.vision.fits(ids, pictures)

    def _check_images(self, messages, pictures) -> None:
        """Refuses messages whose images are not those given beside them."""
        if self.vision is None and has_images(messages):
            raise UserError(BLIND)
        count = count_images(messages)
        if count != len(pictures):
            raise UserError(f"its messages have {count} images, but {len(pictures)} are given")

    def message(self, text: str, calls: list[Call], opening: str | None = None) -> dict:
        """Makes the message of a sampled turn, in OpenAI form. Its calls stay in the text if the
        format is inline, or if tool_calls would not say exactly the same (malformed calls, words
        between them). opening: as for `parse`."""
        text = (self.facts.opening if opening is None else opening) + text
        is_malformed = any(call.error for call in calls)
        if self.format.inline or is_malformed:
            return assistant_message(text)
        if not calls:
            content = self.format.words(text)
            return assistant_message(content if self.format.write(content, []) == text else text)
        words = self.format.words(words_before(text, calls))
        for glue in ("", "\n", "\n\n"):  # what formats write between words and calls
            message = assistant_message(words.removesuffix(glue), calls)
            if self._writes(message, text, opening):
                return message
        return assistant_message(text)

    def _writes(self, message: dict, text: str, opening: str | None) -> bool:
        """Says whether a message is written as this turn was sampled."""
        opening = self.facts.opening if opening is None else opening
        try:
            written, _ = self._turn(message, goes_on=False, opening=opening)
        except UserError:
            return False
        return opening + written == text

    # Messages to text: what the template writes.

    def text_of(self, messages: list[dict], generate: bool = False, start: bool = False) -> str:
        """Renders messages. generate: with the generation prompt. start: a conversation from its
        beginning, with the tools described. UserError: the template raises."""
        if start:
            messages = self.with_system_prompt(messages)
        messages = self.name_results(messages)
        if self.format.inline:  # to the template its calls and results are text
            messages = self.join_open_turn(self.results_as_user(messages))
        if not self.facts.tool_images:
            messages = images_as_user(messages)
        messages = self.to_template_form(messages)
        shows_tools = start and self.tools and not self.format.inline
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=self.tools if shows_tools else None,
                tokenize=False,
                add_generation_prompt=generate,
                strftime_now=TODAY.strftime,
                **self._variables,
            )
        # What templates raise, and what their expressions do on messages they do not expect.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as e:
            raise self.refusal(f"it raises {str(e)!r}") from e

    def pieces(self, messages: list[dict]) -> list[tuple[str, int]]:
        """Cuts a conversation into [(text, mask)]: prompt, turn, what is between, turn, ..."""
        messages = self.name_results(messages)
        if self.format.inline:
            messages = self.results_as_user(messages)
        at = next_turn(messages, 0)
        prompt = messages[:at]  # what the turns from here on answer
        pieces = [(self.text_of(prompt, generate=True, start=True), 0)]
        goes_on = False  # in an open turn, behind an inline result
        while at < len(messages):
            end = next_turn(messages, at + 1)
            between = messages[at + 1 : end]
            text, calls = self._turn(messages[at], goes_on, opening=find_opening(pieces[-1][0]))
            # The turn: closed, or left open for a result that is written in it.
            goes_on = self.format.in_place and bool(between) and between[0]["role"] == "tool"
            if goes_on:
                results = [message for message in between if message["role"] == "tool"]
                pieces.append((self._with_stop_string(text), 1))
                pieces.append((self._inline_results(results), 0))
                between = [message for message in between if message["role"] != "tool"]
            else:
                close = self.facts.call_close if calls else self.facts.close
                pieces.append((text + close, 1))
            # What leads to the next turn; behind an inline result nothing does, unless a user
            # speaks: then the close that nobody sampled comes first.
            is_last = end == len(messages)
            if between or not (is_last or goes_on):
                pieces.append((self._between(between, not goes_on, prompt), 0))
                goes_on = False
            if any(message["role"] == "user" for message in between):
                prompt = messages[:end]
            at = end
        return pieces

    def _turn(self, message, goes_on, opening) -> tuple[str, list[Call]]:
        """Writes what the model is to write for this message, without the stop token; gives its
        calls, too, as they are read back."""
        content, calls = self._read_message(message)
        written = self.format.write(content, calls)
        parsed = []
        if not self.format.inline:
            parsed = self.format.parse(written)
            self._check_calls(calls, parsed)
        text = self._guard(written, "assistant")
        if goes_on:
            return text.removeprefix(self.facts.opening), parsed
        if opening:
            for thinking in (opening, "<think>"):  # the generation prompt has it already
                if text.startswith(thinking):
                    return text.removeprefix(thinking), parsed
            return self.format.thought_end + text, parsed
        if self.facts.opening:
            return text, parsed  # this row's prompt closed the thinking
        begins_with_call = bool(parsed) and written.lstrip().startswith(parsed[0].raw)
        lead = self.facts.call_lead if begins_with_call else self.facts.lead
        return text if text.startswith(lead) else lead + text, parsed

    def _check_calls(self, calls, parsed) -> None:
        """Refuses a call that its own format would not read back: it is not learnt from."""
        for n, call in enumerate(calls):
            back = parsed[n] if n < len(parsed) else Call("", None)
            wrote = as_json(call.arguments)
            read = as_json(back.arguments)
            # some formats sort the keys, whose order says nothing
            is_same = json.dumps(back.arguments, sort_keys=True) == json.dumps(
                call.arguments, sort_keys=True
            )
            if back.name != call.name or not is_same:
                raise UserError(
                    f"format {self.format_name} cannot write {call.name}({wrote[:80]}): it is read "
                    f"back as {back.name}({read[:80]}); change the row, or take another format"
                )

    def _between(self, messages, closed, prompt) -> str:
        """Writes the text from the end of a turn to the next, generation prompt included: what the
        template writes behind a dummy turn, which answers the prompt, and whose calls these
        messages answer."""
        calls = []
        for message in messages:
            if message["role"] == "tool":
                name = message.get("name") or "unknown"
                id = message.get("tool_call_id", "")
                calls.append(Call(name, {"x": SENTINEL}, id=id))
        turn = assistant_message("" if calls else SENTINEL, calls)
        system, others = split_system(prompt)
        beginning = self.put_in_front(system, others or [QUESTION])
        text = self.text_of([*beginning, turn, *messages], generate=True)
        sentinels = len(calls) or 1
        tail = text.split(SENTINEL, sentinels)[-1]
        close = self.facts.call_close if calls else self.facts.inner_close
        _, _, suffix = tail.partition(close)
        return suffix if closed else close + suffix

    def _inline_results(self, results) -> str:
        """Writes results, as messages, in the way of an inline format."""
        text = ""
        for result in results:
            name = result.get("name") or ""
            text += self.format.result(name, marked_text(result["content"]))
        return IMAGE.join(self._guard(part, "tool") for part in text.split(IMAGE))

    def _with_stop_string(self, text) -> str:
        """Completes the stop string that ends an open turn. An engine stops at all of it: a "```"
        is not whole without its line break."""
        for stop in self.format.stop_strings:
            if text.endswith(stop.rstrip()):
                return text.removesuffix(stop.rstrip()) + stop
        return text

    # Messages to messages, on their way to the template.

    def name_results(self, messages: list[dict]) -> list[dict]:
        """Gives each result the name of its call, and its id as the template is to write it."""
        named = []
        # the last turn's calls that have no result yet, each as the template writes it and as given
        waiting = []
        for message in messages:
            if message["role"] == "assistant":
                text, calls = self._read_message(message)
                calls = calls or self.format.parse(text)  # malformed calls stay in the text
                waiting = list(zip(with_ids(calls), calls, strict=True))
            elif message["role"] == "tool":
                call = call_of_result(message, waiting)
                waiting = [pair for pair in waiting if pair[0] is not call]
                name = message.get("name") or call.name
                message = message | {"name": name, "tool_call_id": call.id}
            named.append(message)
        return named

    def results_as_user(self, messages: list[dict]) -> list[dict]:
        """Makes results a user's message, in an inline format whose calls close the turn."""
        if self.format.in_place:
            return messages
        shown = []
        for role, run in groupby(messages, key=itemgetter("role")):
            if role == "tool":
                shown.append({"role": "user", "content": image_parts(self._inline_results(run))})
            else:
                shown += run
        return shown

    def join_open_turn(self, messages: list[dict]) -> list[dict]:
        """Writes the calls of an inline format into their turns' text, and joins a turn, its result
        and what follows in it to one message."""
        joined = []
        goes_on = False  # the last message is a turn that a result left open
        for message in messages:
            if message["role"] == "assistant":
                text = self.format.write(*self._read_message(message))
                if goes_on:
                    text = joined.pop()["content"] + text.removeprefix(self.facts.opening)
                message = assistant_message(text)
                goes_on = False
            elif message["role"] == "tool" and joined:
                turn = self._with_stop_string(joined.pop()["content"])
                message = assistant_message(turn + self._inline_results([message]))
                goes_on = True
            else:
                goes_on = False
            joined.append(message)
        return joined

    def with_system_prompt(self, messages: list[dict]) -> list[dict]:
        """Puts the tools of an inline format into the system prompt, and that at the head of the
        first user message if the template has no system role."""
        system, others = split_system(messages)
        if self.format.inline and self.tools:
            system = f"{system}\n\n{self.format.describe()}".lstrip("\n")
        if not system or not others:
            return messages
        return self.put_in_front(system, others)

    def put_in_front(self, system: str, others: list[dict]) -> list[dict]:
        """Puts a system prompt, if there is one, in front of the other messages."""
        if not system:
            return others
        if self.facts.has_system:
            return [{"role": "system", "content": system}, *others]
        content = others[0]["content"]
        if isinstance(content, str):
            content = f"{system}\n\n{content}"
        else:
            content = [{"type": "text", "text": f"{system}\n\n"}, *content]
        return [others[0] | {"content": content}, *others[1:]]

    def _read_message(self, message: dict) -> tuple[str, list[Call]]:
        """Reads an assistant's message -> its text, with the thinking, and its calls."""
        text = flat_text(message.get("content"))
        if message.get("reasoning_content"):
            text = self.format.with_thought(message["reasoning_content"], text)
        return text, calls_of(message)

    def to_template_form(self, messages: list[dict]) -> list[dict]:
        """Puts messages into the form that this template takes, control tokens guarded."""
        formed = []
        for message in messages:
            role = message["role"]
            content = message.get("content")
            new = {"role": role}

            # the calls it makes, or the call it answers
            if role == "assistant":
                content, calls = self._read_message(message)
                if calls:
                    new["tool_calls"] = []
                for call in with_ids(calls):
                    tool_call = openai_call(call)
                    if self.facts.json_arguments:
                        tool_call["function"]["arguments"] = as_json(call.arguments)
                    new["tool_calls"].append(tool_call)
            elif role == "tool":
                new["name"] = message.get("name") or "unknown"
                new["tool_call_id"] = message["tool_call_id"]

            # what it says, or thinks
            if role == "assistant" and self.facts.calls_in_text:
                content = self.format.write(content, calls)
                new.pop("tool_calls", None)
            if role == "assistant" and self.format.has_own_thinking:
                thought, words = split_thought(self.format.words(content))
                if self.facts.thinking_key and thought:
                    new[self.facts.thinking_key] = self._guard(thought, role)
                elif thought and not self.format.writes_header:
                    words = self.format.write(content, [])
                content = words
            if isinstance(content, list):
                new["content"] = []
                for part in content:
                    if "text" in part:  # an image has none
                        part = part | {"text": self._guard(part["text"], role)}
                    new["content"].append(part)
            else:
                text = self._guard(content or "", role)
                new["content"] = [{"type": "text", "text": text}] if self.facts.as_parts else text
            formed.append(new)
        return formed

    # Text to ids.

    def _guard(self, text, role) -> str:
        """Marks the control tokens in somebody's text; encode writes them as ordinary text."""
        guard = self._guards.get(role, self._guards["user"])
        if self.vision:
            text = text.replace(IMAGE, "")  # typed by somebody
        return guard.sub(lambda token: MARK.format(self.added_tokens.index(token[0])), text)

    def encode(self, text: str, first: bool = False, pictures: Sequence[Picture] = ()) -> list[int]:
        """Encodes text of the template, in which control tokens count. first: it begins a
        conversation. pictures: those of the placeholders in it, in order."""
        ids = self._ids_of_text(text, first)
        return self._expand(ids, pictures) if self.vision else ids

    def _expand(self, ids, pictures) -> list[int]:
        """Puts the ids of the pictures in the place of the placeholders that stand for them."""
        written = ids.count(self.vision.placeholder)
        if written != len(pictures):
            raise self.refusal(f"it shows {written} of {len(pictures)} images")
        return self.vision.expand(ids, pictures)

    def _ids_of_text(self, text, first) -> list[int]:
        """Encodes text of the template; an image is one placeholder."""
        if self.vision:
            text = text.replace(IMAGE, self.facts.image)
        # A marked control token becomes ordinary tokens of the same text: its first character and
        # the others, neither of which is a token.
        segments = []
        for n, part in enumerate(MARKED.split(text)):
            is_mark = n % 2 == 1
            if is_mark:
                # Modulo: a mark that somebody typed may have any number.
                token = self.added_tokens[int(part) % len(self.added_tokens)]
                segments += [token[0], token[1:]]
            else:
                segments.append(part)

        # What does not begin a conversation is encoded behind a stop token, which is then dropped:
        # tokenizers may treat the start of a text in their own way (put a blank in front).
        anchor = self.facts.stop_tokens[0]
        ids = []
        for segment in segments:
            if first and not ids:
                ids += self.tokenizer.encode(segment, add_special_tokens=False)
            else:
                ids += self.tokenizer.encode(anchor + segment, add_special_tokens=False)[1:]
        return ids

    def refusal(self, reason: str) -> UserError:
        """Makes the error that this template cannot be used, for the proof."""
        name = self.tokenizer.name_or_path or "this tokenizer"
        what = f"the chat template of {name} cannot be used with format={self.format_name}"
        return UserError(f"{what}: {reason}")


def read_options(options: Sequence[str], template: str) -> dict:
    """Reads variables of a template from "name=value"; true, false and numbers are no texts.

    UserError: an option that cannot be read, or that the template does not use."""
    variables = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"template_options: cannot read {option!r}: write name=value")
        is_used = re.search(rf"\b{name}\b", template)
        if name in TEMPLATE_INPUTS or not is_used:
            raise UserError(f"template_options: {name} is no option of this chat template: drop it")
        try:
            variables[name] = json.loads(text)
        except ValueError:
            variables[name] = text
    return variables


def words_before(text: str, calls: list[Call]) -> str:
    """Cuts a turn in front of its first call. From the end, as a thought may hold the same text."""
    end = len(text)
    for call in reversed(calls):
        start = text.rfind(call.raw, 0, end)
        if start < 0:
            break  # several calls of one block have one text
        end = start
    return text[:end]


def flat_text(content) -> str:
    """Joins the text parts of a content, which may also be one text, or None."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def marked_text(content) -> str:
    """Joins the parts of a content, with a mark for each image."""
    if not isinstance(content, list):
        return (content or "").replace(IMAGE, "")
    texts = []
    for part in content:
        is_image = part.get("type") == "image"
        texts.append(IMAGE if is_image else part["text"].replace(IMAGE, ""))
    return "".join(texts)


def image_parts(text: str) -> str | list[dict]:
    """Makes content parts of a text with marks for images; without one it stays a text."""
    if IMAGE not in text:
        return text
    parts = []
    for number, between in enumerate(text.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if between:
            parts.append({"type": "text", "text": between})
    return parts


def images_as_user(messages: list[dict]) -> list[dict]:
    """Moves the images of results into a user's message behind them, each with its label."""
    moved = []
    for role, run in groupby(messages, key=itemgetter("role")):
        shown = []
        for message in run:
            content = message.get("content")
            if role == "tool" and has_images([message]):
                for before, part in zip([{}, *content], content, strict=False):
                    if part["type"] == "image":
                        label = LABEL.search(before.get("text", ""))
                        shown += [{"type": "text", "text": label[0]}] if label else []
                        shown.append(part)
                message = message | {"content": flat_text(content)}
            moved.append(message)
        if shown:
            moved.append({"role": "user", "content": shown})
    return moved


def split_system(messages: Sequence[dict]) -> tuple[str, list[dict]]:
    """Takes a system prompt off the others -> its text, "" if there is none, and the others."""
    if messages and messages[0]["role"] == "system":
        return flat_text(messages[0]["content"]), list(messages[1:])
    return "", list(messages)


def next_turn(messages: list[dict], start: int) -> int:
    """Finds the first assistant's message from `start` on; the number of messages if none is."""
    for at in range(start, len(messages)):
        if messages[at]["role"] == "assistant":
            return at
    return len(messages)


def call_of_result(message: dict, waiting: list[tuple[Call, Call]]) -> Call:
    """Finds which of the waiting calls a result is for: the one of its id, be that the one written
    or the one given, or else the first."""
    wanted = message.get("tool_call_id") or None
    for written, given in waiting:
        if wanted in (written.id, given.id):
            return written
    return waiting[0][0] if waiting else Call("", None, id="call00000")
