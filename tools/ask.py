"""The ask tool: another model, behind an OpenAI-compatible chat endpoint, answers a question.

    --tools=ask --tool_options=ask.url=http://127.0.0.1:8000/v1,ask.model=name

The key is in the environment variable `key_env`. Each question stands alone: the other model sees
`system` and the question, nothing of the conversation. A call is a request of its own; how many
run at once, and for how long, are the tool's options concurrency and timeout.
"""

from run.config import UserError
from tools import ToolError
from tools.calling.http import fetch, key_for, not_understood, plain, secure


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
        self.tls = secure(url)
        key = key_for(url, key_env, "ask")
        self.url = url.rstrip("/") + "/chat/completions"
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.model, self.system, self.temperature = model, system, temperature
        self.max_tokens, self.limit_name = max_tokens, "max_tokens"

    async def __call__(self, question: str) -> str:
        """Ask another model a question. It knows nothing of this conversation.

        Args:
            question: The whole question, with all that is needed to answer it.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": plain(question)}]
        limit_name = self.limit_name
        try:
            answer = await self._post(messages, limit_name)
        except ToolError as error:
            newer = "max_completion_tokens"  # how newer models of some endpoints want it named
            if newer not in error.text or limit_name == newer:
                raise
            self.limit_name = newer
            answer = await self._post(messages, newer)
        try:
            choice = answer["choices"][0]
            text = (choice["message"].get("content") or "").strip()
        except (KeyError, IndexError, TypeError, AttributeError):
            raise not_understood("the other model", str(answer)) from None
        if choice.get("finish_reason") == "length":
            text += f"\n[... cut at {self.max_tokens} tokens ...]"
        return text or "(the other model said nothing)"

    async def _post(self, messages, limit_name):
        body = {"model": self.model, "messages": messages, "temperature": self.temperature}
        body[limit_name] = self.max_tokens
        request = {"json": body, "headers": self.headers}
        return await fetch("the other model", "POST", self.url, request, self.tls)
