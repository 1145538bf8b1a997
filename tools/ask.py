"""The ask tool: another model, behind an OpenAI-compatible chat endpoint, answers a question.

    --tools=ask --tool_options=ask.url=http://127.0.0.1:8000/v1,ask.model=name
    --tool_options=…,ask.images=true   # a question may be about images of the conversation

The key is in the environment variable `key_env`. Each question stands alone: the other model sees
`system`, the question and the images that it names by number, nothing else of the conversation. A
call is a request of its own; how many run at once, and for how long, are the tool's options
concurrency and timeout.
"""

import asyncio
import copy

from engines.chat_api import api_of_options
from images import MAX_BYTES, to_data_uri
from run.config import UserError
from run.http import HttpError
from tools import ToolError
from tools.calling.base import numbered
from tools.calling.http import plain, tool_error

OTHER = "the other model"
MOST_IMAGES = 8  # of a question


class ask:
    shared = True
    network = True
    takes_images = True

    def __init__(
        self,
        url: str,
        model: str,
        key_env: str = "OPENAI_API_KEY",
        system: str = "",
        max_tokens: int = 1024,
        temperature: float = 0.0,
        images: bool = False,
    ):
        """url: http(s)://host/v1. key_env: "" if the endpoint wants no key; on this machine it may
        be unset. system: the system prompt, "" for none. images: the model there sees, and is sent
        those that a question names. UserError if the key is missing."""
        if max_tokens < 1 or temperature < 0:
            raise UserError(
                f"ask.max_tokens = {max_tokens}, ask.temperature = {temperature}: "
                "expected 1 or more, and 0 or more"
            )
        # one attempt: a NetworkError is tried again by the toolbox, as often as ask.retries says
        self.api = api_of_options("ask", url, model, key_env, attempts=1)
        self.system = system
        self.max_tokens = max_tokens
        self.temperature = temperature

    @staticmethod
    def describe(schema: dict, options: dict) -> dict:
        """Gives the schema, with `images` where the option says that the other model sees."""
        if options.get("images"):
            return schema
        schema = copy.deepcopy(schema)
        del schema["function"]["parameters"]["properties"]["images"]
        return schema

    async def __call__(self, pictures: list, question: str, images: list[int] | None = None) -> str:
        """Ask another model a question. It knows nothing of this conversation.

        Args:
            pictures: Those of the conversation.
            question: The whole question, with all that is needed to answer it.
            images: The numbers, from 1, of the images that it is about. It sees no others.
        """
        content = plain(question)
        if images:
            parts = await asyncio.to_thread(image_parts, pictures, images)
            content = [*parts, {"type": "text", "text": content}]
        messages = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        messages.append({"role": "user", "content": content})
        try:
            reply = await self.api.ask(messages, self.temperature, self.max_tokens)
        except HttpError as error:
            raise tool_error(OTHER, error) from None
        text = reply.text.strip()
        if reply.was_cut:
            text += f"\n[... cut at {self.max_tokens} tokens ...]"
        return text or "(the other model said nothing)"

    async def close(self) -> None:
        await self.api.close()


def image_parts(pictures: list, numbers: list[int]) -> list[dict]:
    """Gives the images of these numbers, from 1, as OpenAI's content parts: the originals, each
    behind its number. ToolError for a number that is none, and for too much."""
    if len(numbers) > MOST_IMAGES:
        text = f"error: {len(numbers)} images: expected at most {MOST_IMAGES} in a question"
        raise ToolError("bad_image", text)
    parts = []
    size = 0
    for number in numbers:
        uri = to_data_uri(numbered(pictures, number).original)
        size += len(uri)
        if size > MAX_BYTES * 4 // 3:
            raise ToolError("bad_image", "error: these images are too large to be sent: crop them")
        parts.append({"type": "text", "text": f"image {number}:"})
        parts.append({"type": "image_url", "image_url": {"url": uri}})
    return parts
