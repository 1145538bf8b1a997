"""The ask tool: another model, behind an OpenAI-compatible chat endpoint, answers a question.

    --tools=ask --tool_options=ask.url=http://127.0.0.1:8000/v1,ask.model=name

The key is in the environment variable `key_env`. Each question stands alone: the other model sees
`system` and the question, nothing of the conversation. A call is a request of its own; how many
run at once, and for how long, are the tool's options concurrency and timeout.
"""

from engines.chat_api import api_of_options
from run.config import UserError
from run.http import HttpError
from tools.calling.http import plain, tool_error

OTHER = "the other model"


class ask:
    shared = True
    network = True

    def __init__(
        self,
        url: str,
        model: str,
        key_env: str = "OPENAI_API_KEY",
        system: str = "",
        max_tokens: int = 1024,
        temperature: float = 0.0,
    ):
        """url: http(s)://host/v1. key_env: "" if the endpoint wants no key; on this machine it may
        be unset. system: the system prompt, "" for none. UserError if the key is missing."""
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

    async def __call__(self, question: str) -> str:
        """Ask another model a question. It knows nothing of this conversation.

        Args:
            question: The whole question, with all that is needed to answer it.
        """
        messages = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        messages.append({"role": "user", "content": plain(question)})
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
