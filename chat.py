"""Messages to token ids, and sampled ids to tool calls, with the tokenizer's own chat template.

    chat = Chat(tokenizer, "hermes", [get_json_schema(add)])  # proves the template, or UserError
    ids = chat.prompt([{"role": "user", "content": "2+3?"}])  # ends with the generation prompt
    text, calls = chat.parse(sampled)                         # [Call("add", {"a": 2, "b": 3})]
    ids += sampled + chat.observation([(calls[0], "5")], closed=True)

A trajectory is a concatenation: prompt, sampled turn, observation, sampled turn, ... Sampled ids
are never decoded and encoded again. An observation is the *suffix* that the template writes after
a closed assistant turn: the glue behind its stop token (Qwen's newline), the tool messages, the
next generation prompt. To get it, a dummy conversation that ends in these tool messages is
rendered, and what follows the dummy's turn is kept. That takes 0.1 ms, as long as encoding the
text, so nothing is cached, and whatever a template does to a result (trim, quote) is simply done.
`render` makes the ids and the mask of SFT from the same pieces.

Is that concatenation what the model was trained to read? `Chat(...)` proves it on a few dummy
conversations: the template's rendering of the whole is the concatenation, in text and in ids, or
differs in ways that `differences` then lists. Otherwise a UserError says what was seen.

How a turn calls tools is a format: formats.py. format="auto" has the template write a call, and
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
from os.path import commonprefix

import jinja2

from formats import FORMATS, THINK, Call, as_json, call_ids
from run.config import UserError

ARGUMENT = "zqARGUMENTqz"  # a name that no tool has for one of its own
OTHERS = "use format=json_actions, fence or tags"
BRIEF = {"role": "system", "content": "Be brief."}
SENTINEL = "zqSENTINELqz"  # letters only: no template trims, quotes or escapes it
# Stands for the n-th added token typed in somebody's text; code points for private use.
MARK, MARKED = "\ue0f3{}\ue0f4", re.compile("\ue0f3([0-9]+)\ue0f4")
# What every template is given.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")
# Templates that write the date get this one: a run resumed tomorrow sees the same prompts.
TODAY = datetime(2024, 7, 26)


def _say(text, *calls: Call) -> dict:
    written = []
    for call in calls:
        function = {"name": call.name, "arguments": call.arguments}
        id = {"id": call.id} if call.id else {}
        written.append(id | {"type": "function", "function": function})
    return {"role": "assistant", "content": text} | ({"tool_calls": written} if calls else {})


def _read(message) -> tuple[str, list[Call]]:
    """An assistant message -> its text, with the thinking, and its calls."""
    text, calls = _flat(message.get("content")), []
    if message.get("reasoning_content"):
        text = f"<think>\n{message['reasoning_content']}\n</think>\n\n{text}"
    for call in message.get("tool_calls") or []:
        id, call = call.get("id") or "", call.get("function", call)
        arguments = call["arguments"]
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError as e:
            what = f"arguments = {arguments!r} of a call of {call['name']}"
            raise UserError(f"{what}: expected an object or its JSON") from e
        calls.append(Call(call["name"], arguments, id=id))
    return text, calls


def _user(text) -> dict:
    return {"role": "user", "content": text}


def _result(name, content) -> dict:
    return {"role": "tool", "name": name, "content": content}


def _flat(content) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _options(given, template) -> dict:
    """The variables of a template, from "name=value"; true, false and numbers are no texts."""
    found = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"template_options: cannot read {item!r}: write name=value")
        if name in GIVEN or not re.search(rf"\b{name}\b", template):
            raise UserError(f"template_options: {name} is no option of this chat template: drop it")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _any_of(tokens) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


class Chat:
    """One tokenizer, one call format, one set of tools (JSON schemas as `get_json_schema` makes).

    format: a name in formats.FORMATS, or "auto"; format_name: the one in use, never "auto".
    stop_ids: ids that close an assistant turn. stop_strings: text that ends a turn in an inline
    format; the ids stay as sampled even if the last token goes on behind it. differences:
    sentences on where the template itself would write a conversation in another way. options: of
    the template, such as "enable_thinking=false" for Qwen3.
    UserError: the template cannot be proved, or does not know an option."""

    def __init__(
        self,
        tokenizer,
        format: str = "hermes",
        tools: list[dict] = (),
        options: Sequence[str] = (),
    ):
        if format not in (*FORMATS, "auto"):
            raise UserError(f"format = {format!r}: expected one of auto, {', '.join(FORMATS)}")
        self.tokenizer, self.format_name, self.tools = tokenizer, format, list(tools)
        self.format = FORMATS["hermes" if format == "auto" else format](self.tools)
        self.differences: tuple[str, ...] = ()
        try:
            template = tokenizer.get_chat_template(tools=self.tools or None)
        except ValueError as e:
            raise self._refusal("there is none; use an Instruct model") from e
        self._given, self._options = options, _options(options, template)
        added = [t for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
        self._added = sorted({t.content for t in added}, key=len, reverse=True)
        # Text typed by a user or a tool must not become a control token. In a result that includes
        # the template's own markers (</tool_response>), which are often not called special.
        control = {t.content for t in added if t.special}
        user = [t for t in self._added if t in control]
        tool = [t for t in self._added if t in control or t in template]
        self._guards = {"user": _any_of(user), "tool": _any_of(tool), "assistant": _any_of([])}
        self._probe()
        if format == "auto" or (self.tools and not self.format.inline):
            self._probe_calls()
        self.stop_strings: tuple[str, ...] = self.format.stop_strings
        if "strftime_now" in template:
            self._declare(f"the date in prompts is always {TODAY:%d %b %Y}")
        for messages in self._conversations():
            self._compare(messages)

    def with_tools(self, tools: list[dict]) -> "Chat":
        """This chat with other tools, for rows that bring their own. The proof is the template's
        and takes tens of milliseconds: only that all tools are shown is repeated."""
        if not self.tools or not tools:  # a template may be another one without tools
            return Chat(self.tokenizer, self.format_name, tools, self._given)
        other = copy(self)
        other.tools, other.format = list(tools), FORMATS[self.format_name](list(tools))
        other.format.style, other.stop_strings = self.format.style, other.format.stop_strings
        if not other.format.inline:
            other._check_tools()
        return other

    # What the loop uses.

    def prompt(self, messages: list[dict]) -> list[int]:
        """Ids of the messages before the first sampled turn, tool schemas, generation prompt."""
        return self._encode(self._render(messages, generate=True, start=True), first=True)

    def parse(self, ids: list[int]) -> tuple[str, list[Call]]:
        """A sampled turn -> its text without the stop token, and its calls in order. A tool
        response that the model wrote itself is text like any other."""
        ids = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text, self.format.parse(self._opening + text) if self.tools else []

    def observation(self, results: list[tuple[Call, str]], closed: bool) -> list[int]:
        """The ids (mask 0) between a turn and the next. results: in call order; a content is a
        string, or a list of content parts if the template takes them. closed: the turn ended in
        one of stop_ids. If not, the missing close comes first, or an inline format goes on."""
        messages = [_result(call.name, content) for call, content in results]
        ids = call_ids([call for call, _ in results])
        messages = [m | {"tool_call_id": id} for m, id in zip(messages, ids, strict=True)]
        if not self.format.inline:
            return self._encode(self._between(messages, closed))
        text = self._inline(messages)
        # In a turn that the model closed itself the result has to come as a user's message.
        in_place = self.format.in_place and not closed
        return self._encode(text if in_place else self._between([_user(text)], closed))

    def render(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """A whole conversation -> ids, mask: 1 on what the model is to write, stop tokens too."""
        ids, mask = [], []
        for text, bit in self._pieces(messages):
            new = self._encode(text, first=not ids)
            ids, mask = ids + new, mask + [bit] * len(new)
        return ids, mask

    def message(self, text: str, calls: list[Call], goes_on: bool = False) -> dict:
        """The sampled turn in OpenAI form. Its calls stay in the text if the format is inline, or
        if tool_calls would not say exactly the same (malformed calls, words between them).
        goes_on: it goes on behind an inline result, where no generation prompt was."""
        text = text if goes_on else self._opening + text
        if calls and not self.format.inline and not any(call.error for call in calls):
            head = text[: text.index(calls[0].raw)]
            for content in map(head.removesuffix, ("", "\n", "\n\n")):
                if self.format.write(content, calls) == text:
                    return _say(content, *calls)
        return _say(text)

    # Text. Everything here works on what the template writes.

    def _render(self, messages, generate=False, start=False) -> str:
        """start: a conversation from its beginning, with the tools described."""
        messages = self._describe(messages) if start else messages
        messages = self._shape(self._merge(self._told(self._answered(messages))))
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=self.tools if start and self.tools and not self.format.inline else None,
                tokenize=False,
                add_generation_prompt=generate,
                strftime_now=TODAY.strftime,
                **self._options,
            )
        # What templates raise, and what their expressions do on messages they do not expect.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as e:
            raise self._refusal(f"it raises {str(e)!r}") from e

    def _pieces(self, messages) -> list[tuple[str, int]]:
        """A conversation -> [(text, mask)]: prompt, turn, what is between, turn, ..."""
        messages = self._told(self._answered(messages))
        roles = [message["role"] for message in messages] + ["assistant"]
        at = roles.index("assistant")
        pieces = [(self._render(messages[:at], generate=True, start=True), 0)]
        goes_on = False  # in an open turn, behind an inline result
        while at < len(messages):
            text = self._turn(messages[at], goes_on)
            end = roles.index("assistant", at + 1)
            between, at = messages[at + 1 : end], end
            goes_on = self.format.in_place and bool(between) and between[0]["role"] == "tool"
            if goes_on:
                results = [m for m in between if m["role"] == "tool"]
                between = [m for m in between if m["role"] != "tool"]
                pieces += [(self._stopped(text), 1), (self._inline(results), 0)]
            else:
                pieces.append((text + self._close, 1))
            if between or (at < len(messages) and not goes_on):
                pieces.append((self._between(between, closed=not goes_on), 0))
                goes_on = False
        return pieces

    def _turn(self, message, goes_on) -> str:
        """What the model is to write for this message, without the stop token."""
        text, calls = _read(message)
        written = self.format.write(text, calls)
        found = [] if self.format.inline else self.format.parse(written)
        self._check_calls(calls, found)
        text = self._guard(written, "assistant")
        if goes_on:
            return text.removeprefix(self._opening)
        for opening in (self._opening, "<think>") if self._opening else ():
            if text.startswith(opening):  # the generation prompt has it already
                return text.removeprefix(opening)
        if self._opening:
            return f"\n</think>\n\n{text}"
        is_call = bool(found) and written.lstrip().startswith(found[0].raw)
        lead = self._call_lead if is_call else self._lead
        return text if text.startswith(lead) else lead + text

    def _check_calls(self, calls, found):
        """A call that its own format would not read back is not learnt from."""
        for n, call in enumerate(calls if not self.format.inline else ()):
            back = found[n] if n < len(found) else Call("", None)
            if (back.name, as_json(back.arguments)) != (call.name, as_json(call.arguments)):
                wrote, read = as_json(call.arguments)[:80], as_json(back.arguments)[:80]
                raise UserError(
                    f"format {self.format_name} cannot write {call.name}({wrote}): it is read back "
                    f"as {back.name}({read}); change the row, or take another format"
                )

    def _between(self, messages, closed) -> str:
        """The text from the end of a turn to the next, generation prompt included."""
        names = [m.get("name") or "unknown" for m in messages if m["role"] == "tool"]
        ids = [m.get("tool_call_id", "") for m in messages if m["role"] == "tool"]
        calls = [Call(n, {"x": SENTINEL}, id=id) for n, id in zip(names, ids, strict=True)]
        turn = _say("", *calls) if calls else _say(SENTINEL)
        text = self._render([_user("x"), turn, *messages], generate=True)
        tail = text.split(SENTINEL, len(calls) or 1)[-1]
        suffix = tail[tail.index(self._close) + len(self._close) :]
        return suffix if closed else self._close + suffix

    def _inline(self, results) -> str:
        results = [(result.get("name") or "", _flat(result["content"])) for result in results]
        text = "".join(self.format.result(name, content) for name, content in results)
        return self._guard(text, "tool")

    def _stopped(self, text) -> str:
        """An engine stops at a stop string: a "```" is not whole without its line break."""
        for stop in self.stop_strings:
            if text.endswith(stop.rstrip()):
                return text.removesuffix(stop.rstrip()) + stop
        return text

    def _answered(self, messages) -> list[dict]:
        """Each result with the name of its call, and its id as the template is to write it."""
        answered, waiting = [], []
        for message in messages:
            if message["role"] == "assistant":
                text, calls = _read(message)
                calls = calls or self.format.parse(text)  # malformed calls stay in the text
                waiting = list(zip(call_ids(calls), calls, strict=True))
            elif message["role"] == "tool":
                given = message.get("tool_call_id") or None
                found = [pair for pair in waiting if given in (pair[0], pair[1].id)]
                id, call = (found or waiting or [("call00000", Call("", None))])[0]
                waiting = [pair for pair in waiting if pair[1] is not call]
                name = message.get("name") or call.name
                message = message | {"name": name, "tool_call_id": id}
            answered.append(message)
        return answered

    def _told(self, messages) -> list[dict]:
        """In an inline format whose calls close the turn, results are a user's message."""
        if not self.format.inline or self.format.in_place:
            return messages
        told = []
        for is_result, run in groupby(messages, key=lambda message: message["role"] == "tool"):
            if is_result:
                told.append(_user(self._inline(run)))
            else:
                told += run
        return told

    def _merge(self, messages) -> list[dict]:
        """In an inline format a turn, its result and what follows in it are one message."""
        if not self.format.inline:
            return messages
        merged, goes_on = [], False
        for message in messages:
            if message["role"] == "assistant":
                text = self.format.write(*_read(message))
                if goes_on:
                    text = merged.pop()["content"] + text.removeprefix(self._opening)
                message, goes_on = _say(text), False
            elif message["role"] == "tool" and merged:
                text = self._stopped(merged.pop()["content"]) + self._inline([message])
                message, goes_on = _say(text), True
            else:
                goes_on = False
            merged.append(message)
        return merged

    def _shape(self, messages) -> list[dict]:
        """Messages in the form that this template takes, control tokens in their texts guarded."""
        shaped = []
        for message in messages:
            role, content = message["role"], message.get("content")
            new = {"role": role}
            if role == "assistant":
                content, calls = _read(message)
                for id, call in zip(call_ids(calls), calls, strict=True):
                    function = {"name": call.name, "arguments": self._arguments(call.arguments)}
                    call = {"id": id, "type": "function", "function": function}
                    new.setdefault("tool_calls", []).append(call)
            elif role == "tool":
                new["name"] = message.get("name") or "unknown"
                new["tool_call_id"] = message["tool_call_id"]
            if isinstance(content, list):
                new["content"] = [
                    part | {"text": self._guard(part["text"], role)} if "text" in part else part
                    for part in content
                ]
            else:
                text = self._guard(content or "", role)
                new["content"] = [{"type": "text", "text": text}] if self._as_parts else text
            shaped.append(new)
        return shaped

    def _describe(self, messages) -> list[dict]:
        """Inline formats describe the tools in the system prompt, and a template without a system
        role gets that at the head of the first user message."""
        has = bool(messages) and messages[0]["role"] == "system"
        system, rest = (_flat(messages[0]["content"]), messages[1:]) if has else ("", messages)
        if self.format.inline and self.tools:
            system = f"{system}\n\n{self.format.describe()}".lstrip("\n")
        if not system or not rest:
            return messages
        if self._has_system:
            return [{"role": "system", "content": system}, *rest]
        content = rest[0]["content"]
        if isinstance(content, str):
            content = f"{system}\n\n{content}"
        else:
            content = [{"type": "text", "text": f"{system}\n\n"}, *content]
        return [rest[0] | {"content": content}, *rest[1:]]

    # Ids.

    def _guard(self, text, role) -> str:
        """Put marks for the control tokens in a text; _encode writes them out as ordinary text."""
        guard = self._guards.get(role, self._guards["user"])
        return guard.sub(lambda m: MARK.format(self._added.index(m[0])), text)

    def _encode(self, text, first=False) -> list[int]:
        """Template text -> ids. A marked control token becomes ordinary tokens of the same text:
        its first character is encoded apart from the rest, and neither of the two is a token.

        Anything but a conversation's start is encoded behind a stop token, which is then dropped:
        tokenizers may treat the start of a text in their own way (put a blank in front)."""
        ids = []
        for i, part in enumerate(MARKED.split(text)):
            token = self._added[int(part) % len(self._added)] if i % 2 else ""
            for segment in (token[0], token[1:]) if token else (part,):
                anchor = "" if first and not ids else self._anchor
                new = self.tokenizer.encode(anchor + segment, add_special_tokens=False)
                ids += new[1:] if anchor else new
        return ids

    # The proof.

    def _refusal(self, reason) -> UserError:
        name = self.tokenizer.name_or_path or "this tokenizer"
        what = f"the chat template of {name} cannot be used with format={self.format_name}"
        return UserError(f"{what}: {reason}")

    def _declare(self, sentence):
        if sentence not in self.differences:
            self.differences += (sentence,)

    def _attempt(self, *messages, start=False) -> str:
        try:
            return self._render(messages, start=start)
        except UserError:
            return ""

    def _probe(self):
        """Find out what the template takes and writes: content as parts, a system role, the token
        that closes a turn, what stands between the generation prompt and an answer."""
        self._as_parts, self._arguments, self._words = False, dict, "I compute."
        self._lead = self._call_lead = self._opening = self._anchor = ""
        self._as_parts = SENTINEL not in self._attempt(_user(SENTINEL))
        if SENTINEL not in self._render([_user(SENTINEL)]):
            raise self._refusal("it drops what the user says")
        system = {"role": "system", "content": SENTINEL}
        self._has_system = SENTINEL in self._attempt(system, _user("x"))
        if not self._has_system:
            self._declare("no system role: its text is put at the head of the first user message")

        prompt = self._render([_user("x")], generate=True)
        before, found, after = self._render([_user("x"), _say(SENTINEL)]).partition(SENTINEL)
        if not found:
            raise self._refusal("it drops what the assistant says")
        # An answer is closed by one token, or by several up to the eos token (Cohere).
        added, eos = _any_of(self._added), self.tokenizer.eos_token or ""
        run = re.match(f"({added.pattern})+", after)
        if not run:
            raise self._refusal(f"no token closes the assistant's turn, {after[:40]!r} follows it")
        several = eos and eos in run[0]
        self._close = run[0].partition(eos)[0] + eos if several else added.match(after)[0]
        close = self.tokenizer.encode(self._close, add_special_tokens=False)
        names = [eos] + ["<|eom_id|>"] * (self.format_name in ("llama3", "auto"))
        names = [name for name in names if name in self._added]
        stops = [close[-1], *self.tokenizer.convert_tokens_to_ids(names)]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))
        stops = self.tokenizer.convert_ids_to_tokens(stops)
        self._anchor, self._guards["assistant"] = stops[0], _any_of(stops)

        if thinking := re.search(r"<think>\s*$", prompt):
            self._opening = thinking[0]
        header = prompt[len(commonprefix([prompt, self._render([_user("x")])])) :]
        self._header = THINK.sub("", header.removesuffix(self._opening)).rstrip()
        if before.startswith(prompt):
            lead = before.removeprefix(prompt)
            if THINK.sub("", self._opening + lead).strip():
                raise self._refusal(f"{lead!r} stands between generation prompt and answer")
            self._lead = self._call_lead = lead[: len(lead) - len(lead.lstrip())]
        padded = f"  {SENTINEL} \n"
        if padded + self._close not in self._render([_user("x"), _say(padded)]):
            self._declare("trims the assistant's text")

    def _probe_calls(self):
        """Are schemas, calls and results rendered, and calls in the syntax of this format? For
        format=auto: of which?"""
        prompt = self._check_tools()
        name = self.tools[0]["function"]["name"] if self.tools else "python"
        call, seen = Call(name, {ARGUMENT: SENTINEL, ARGUMENT[2:]: True}), ""
        for self._arguments in (dict, as_json):  # templates take an object, or its JSON
            written = self._behind(prompt, _say("", call))
            seen = seen or THINK.sub("", written).lstrip()
            worded = self._behind(prompt, _say(SENTINEL, call))
            if self._find_style(self.format_name, call, written, worded):
                break
        else:
            if not self.tools:  # auto, and nothing to call: any format will do
                self.format_name, self._arguments = "hermes", dict
                return
            if not seen:
                self._render([_user("x"), _say("", call)], start=True)  # raises, and says why
            if SENTINEL not in seen:
                raise self._refusal(f"it ignores tool calls; {OTHERS}")
            refusal = self._refusal(f"it writes a call as {seen[:160]!r}")
            known = self._find_style("auto", call, seen, "")
            raise UserError(f"{refusal}; {f'use format={self.format_name}' if known else OTHERS}")
        result = _result(name, SENTINEL)
        if SENTINEL not in self._render([_user("x"), _say("", Call(name, {})), result]):
            raise self._refusal(f"it ignores tool results; {OTHERS}")

    def _check_tools(self) -> str:
        """A prompt with the tools, all of which it has to show."""
        prompt = self._render([_user("x")], generate=True, start=True)
        if any(tool["function"]["name"] not in prompt for tool in self.tools):
            raise self._refusal(f"it ignores tools; {OTHERS}")
        return prompt

    def _behind(self, prompt, message) -> str:
        """What the template writes for this message behind the prompt."""
        text = self._attempt(_user("x"), message, start=True)
        return text[len(commonprefix([text, prompt.removesuffix(self._opening)])) :]

    def _find_style(self, wanted, call, written, worded) -> bool:
        """Sets the format in which the template writes this call, and its style. wanted: a format,
        or "auto". worded: the same call with words in front, which a template may drop."""
        names = [name for name in FORMATS if not FORMATS[name].inline]
        bare, worded = THINK.sub("", written).lstrip(), THINK.sub("", worded).lstrip()
        for name in names if wanted == "auto" else [wanted]:
            format = FORMATS[name](self.tools)
            for style in format.styles:
                format.style = style
                said = format.write(SENTINEL, [call])
                drops = worded.count(SENTINEL) < 2
                if not bare.startswith(format.write("", [call]) + self._close):
                    continue
                if not drops and not worded.startswith(said + self._close):
                    continue
                if said.count(SENTINEL) == 2 and drops:
                    self._declare("drops words in front of a call")
                if bare == written.lstrip():
                    self._call_lead = written[: len(written) - len(bare)]
                self._words = "" if drops else "I compute."
                self.format, self.format_name = format, name
                return True
        return False

    def _conversations(self):
        """What the proof renders: one round and two, thinking, one call and two, odd results."""
        system, user, again = BRIEF, _user("2+3?"), _user("3?")
        last, thought = _say("It is 5."), "<think>\nhm\n</think>\n\n"
        yield [system, user, last]
        yield [user, last, again, last]
        yield [system, user, _say(f"{thought}It is 5."), again, last]
        if not self.tools:
            return
        name = self.tools[0]["function"]["name"]
        call, words = Call(name, {ARGUMENT: 'print("ü")'}), self._words
        for content in ("5", ' "quoted" \\ \n', '{"a": [1, 2]}', "\nünï ✓ 漢\n\n", ""):
            yield [system, user, _say("", call), _result(name, content), last]
        five, seven = _result(name, "5"), _result(name, "7")
        first = _say(words and thought + words, call)
        yield [user, first, five, last, again, _say("", call), seven, last]
        yield [user, first, five, _say("", call), seven, last]
        if self.format.parallel:
            yield [user, _say(words, call, call), five, seven, last]

    def _compare(self, messages):
        """The concatenation is the template's own rendering, as text and as ids, or UserError."""
        ours = "".join(text for text, _ in self._pieces(messages))
        theirs = self._render(messages, start=True)
        ids, whole = self.render(messages)[0], self._encode(ours, first=True)
        if not self._same(ours, theirs) and self._same(*map(self._unmoved, (ours, theirs))):
            self._declare("writes the system prompt and the tools only at the last user message")
        elif not self._same(ours, theirs):
            mine, kept = THINK.findall(ours), THINK.findall(theirs)
            if not (mine or kept) or not self._same(self._bare(ours), self._bare(theirs)):
                raise self._refusal(self._first_difference(ids, self._encode(theirs, first=True)))
            if len([t for t in mine if t.strip()]) > len([t for t in kept if t.strip()]):
                self._declare("strips the thinking of earlier turns")
            elif len(kept) > len(mine):
                self._declare("adds an empty <think></think>")
            else:
                self._declare("writes other whitespace around thinking")
        # An inline result is encoded apart from the turn that it goes on in, as in a rollout.
        if ids != whole and not (self.format.inline and "tool" in [m["role"] for m in messages]):
            raise self._refusal(f"pieces and whole differ: {self._first_difference(ids, whole)}")

    def _unmoved(self, text) -> str:
        """Without what tools and a system prompt add to a prompt: Mistral's first templates write
        it in front of the last user message, so that it moves when there is another."""
        bare = self._render([_user("x")], generate=True)
        tools = self._render([_user("x")], generate=True, start=True)
        system = self._render([BRIEF, _user("x")], generate=True, start=True)
        for short, long in ((bare, tools), (tools, system)):
            start = len(commonprefix([short, long]))
            tail = len(commonprefix([short[start:][::-1], long[start:][::-1]]))
            text = text.replace(long[start : len(long) - tail], "", 1)
        return text

    def _bare(self, text) -> str:
        """Without thinking, and without the whitespace that it leaves at the start of a turn."""
        text = THINK.sub("", text)
        return (
            re.sub(re.escape(self._header) + r"\s*", self._header, text) if self._header else text
        )

    def _same(self, ours, theirs) -> bool:
        # Behind the last stop token a template may still write a line break or the eos token.
        rest = _any_of(self._added).sub("", theirs.removeprefix(ours))
        return theirs.startswith(ours) and not rest.strip()

    def _first_difference(self, ours, theirs) -> str:
        same = commonprefix([ours, theirs])
        at, show = len(same), self.tokenizer.convert_ids_to_tokens
        mine, other = show(ours[at : at + 8]), show(theirs[at : at + 8])
        return f"token {at}, after {show(same[-6:])}, is {mine} in the pieces, {other} in the whole"
