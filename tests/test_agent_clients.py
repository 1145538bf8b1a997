"""serve/agent.py with clients that nobody here wrote: openai, MCP's own, lm_eval.

    pytest tests/test_agent_clients.py

The model is a script (tests/agents.py), or a tiny one made here; the server is on 127.0.0.1.
"""

import asyncio
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from agents import SYSTEM, WEATHER, scripted_player, serving

pytest.importorskip("mcp", reason='no MCP here: pip install -e ".[mcp]"')
openai = pytest.importorskip("openai", reason='no openai here: pip install -e ".[test]"')

import data
import evaluate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def served(tokenizer):
    player, script = scripted_player(tokenizer)
    with serving(player) as address:
        script.address = address
        yield script


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client, text, **more):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="calc", messages=messages, **more)


# -- openai


def test_openai_lists_the_model_and_gets_an_answer_for_which_a_tool_was_called(client, served):
    assert [model.id for model in client.models.list()] == ["calc"]
    assert client.models.retrieve("calc").object == "model"
    answer = ask(client, "sum 2 3")
    (choice,) = answer.choices
    assert choice.message.content == "the result is 5." and choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    prompt = served.prompts[-2]  # of the first turn: the system prompt of the run, its tools
    assert prompt.startswith("<|im_start|>system\nthe user asks") and '"add"' in prompt
    assert answer.usage.prompt_tokens == len(served.tokenizer.encode(prompt))
    turns = served.tokenizer.encode(served.prompts[-1])
    assert answer.usage.total_tokens == sum(
        (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    )
    assert 0 < answer.usage.completion_tokens < len(turns)


def test_a_message_that_is_sent_back_as_it_came_brings_its_tool_calls_along(client, served):
    """What the model reads is the conversation as it would have gone on in one rollout."""
    messages = [{"role": "user", "content": "sum 2 3"}]
    first = client.chat.completions.create(model="calc", messages=messages)
    first_context = served.prompts[-1]
    messages += [first.choices[0].message, {"role": "user", "content": "say more"}]
    client.chat.completions.create(model="calc", messages=messages)
    prompt = served.prompts[-1]
    assert prompt.startswith(first_context + "the result is 5.<|im_end|>\n")
    # without them, it reads the words alone
    messages[1] = {"role": "assistant", "content": first.choices[0].message.content}
    client.chat.completions.create(model="calc", messages=messages)
    assert "tool_response" not in served.prompts[-1]
    assert "the result is 5.<|im_end|>" in served.prompts[-1]


def test_a_call_of_the_clients_own_tool_goes_out_and_the_conversation_goes_on(client, served):
    messages = [{"role": "user", "content": "weather Rome"}]
    asked = {"model": "calc", "tools": [WEATHER]}
    first = client.chat.completions.create(messages=messages, **asked)
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "let me look."
    (tool_call,) = choice.message.tool_calls
    assert tool_call.function.name == "get_weather"
    assert json.loads(tool_call.function.arguments) == {"city": "Rome"}
    prompt = served.prompts[-1]  # it sees the tools of both
    assert '"add"' in prompt and '"get_weather"' in prompt
    result = {"role": "tool", "tool_call_id": tool_call.id, "content": "sunny"}
    messages += [choice.message, result]
    second = client.chat.completions.create(messages=messages, **asked)
    assert second.choices[0].message.content == "the result is sunny."
    sampled = 'let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}'
    assert served.prompts[-1].startswith(f"{prompt}{sampled}\n</tool_call><|im_end|>\n")


def test_tools_of_both_in_one_turn_are_run_here_and_handed_out(client, served):
    messages = [{"role": "user", "content": "both Oslo"}]
    asked = {"model": "calc", "tools": [WEATHER]}
    first = client.chat.completions.create(messages=messages, **asked)
    message = first.choices[0].message
    (tool_call,) = message.tool_calls
    assert tool_call.function.name == "get_weather"
    messages += [message, {"role": "tool", "tool_call_id": tool_call.id, "content": "snow"}]
    second = client.chat.completions.create(messages=messages, **asked)
    assert second.choices[0].message.content == "the result is snow."
    assert "<tool_response>\n3\n</tool_response>" in served.prompts[-1]


def test_a_call_that_does_not_fit_is_told_to_the_model_and_does_not_go_out(client, served):
    answer = ask(client, "odd Rome", tools=[WEATHER])
    (choice,) = answer.choices
    assert choice.finish_reason == "stop" and not choice.message.tool_calls
    assert "get_weather has no argument 'town'" in choice.message.content


def test_with_tool_choice_none_the_clients_tools_are_not_shown(client, served):
    ask(client, "say yes", tools=[WEATHER], tool_choice="none")
    assert "get_weather" not in served.prompts[-1] and '"add"' in served.prompts[-1]
    with pytest.raises(openai.BadRequestError, match="cannot be forced") as raised:
        ask(client, "say yes", tools=[WEATHER], tool_choice="required")
    assert raised.value.param == "tool_choice"


def test_a_stream_tells_role_turns_words_calls_end_and_usage(client, served):
    options = {"include_usage": True}
    chunks = list(ask(client, "both Oslo", tools=[WEATHER], stream=True, stream_options=options))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    (calls,) = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert calls[0].index == 0 and calls[0].function.name == "get_weather"
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] == "tool_calls" and set(ends[:-1]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    # openai's own helper joins the pieces to the message that is not streamed
    messages = [{"role": "user", "content": "sum 2 3"}]
    with client.chat.completions.stream(model="calc", messages=messages) as stream:
        streamed = stream.get_final_completion().choices[0].message
    whole = client.chat.completions.create(model="calc", messages=messages).choices[0].message
    assert streamed.content == whole.content == "the result is 5."
    assert [turn["role"] for turn in streamed.agent_turns] == ["assistant", "tool"]
    messages += [streamed, {"role": "user", "content": "say more"}]
    client.chat.completions.create(model="calc", messages=messages)
    assert "<tool_response>\n5\n</tool_response>" in served.prompts[-1]


def test_n_answers_each_with_noise_of_its_own_which_a_seed_repeats(client, served):
    def noise(**more):
        answer = ask(client, "noise", temperature=1.0, n=4, **more)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [choice.message.content for choice in answer.choices]

    first = noise(seed=7)
    assert len(set(first)) == 4 and noise(seed=7) == first
    assert not set(first) & set(noise(seed=8)) and noise() != noise()
    assert served.samplings[-1].temperature == 1.0


def test_thinking_stop_texts_and_limits(client, served):
    message = ask(client, "think 4 5 6").choices[0].message
    assert message.content == "4 5 6" and message.reasoning_content == "so so"
    (choice,) = ask(client, "say a b c d", stop=["d", " c"]).choices
    assert choice.message.content == "a b" and choice.finish_reason == "stop"
    answer = ask(client, "say 1 2 3 4 5 6 7 8 9", max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"
    # of all turns together: the call takes most of them
    spent = ask(client, "sum 2 3").usage.completion_tokens
    answer = ask(client, "sum 2 3", max_tokens=spent - 2)
    assert answer.usage.completion_tokens == spent - 2
    assert answer.choices[0].finish_reason == "length"


def test_errors_are_openais(client):
    with pytest.raises(openai.BadRequestError, match="logprobs = true is not honoured") as raised:
        ask(client, "hello", logprobs=True)
    assert (raised.value.param, raised.value.code) == ("logprobs", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError, match="this server has 'calc'") as raised:
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}])
    assert raised.value.code == "model_not_found"


def test_the_async_client_is_answered_too(served):
    async def ask_all():
        url = f"{served.address}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            asked = []
            for number in range(64):
                messages = [{"role": "user", "content": f"sum {number} 1"}]
                asked.append(client.chat.completions.create(model="calc", messages=messages))
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [f"the result is {number + 1}." for number in range(64)]


def test_a_system_message_of_the_client_takes_the_place_of_the_runs(client, served):
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "say x"}]
    client.chat.completions.create(model="calc", messages=messages)
    assert served.prompts[-1].startswith("<|im_start|>system\nbe brief")
    assert SYSTEM["content"] not in served.prompts[-1]


# -- MCP


def test_mcps_own_client_calls_the_same_tools(served):
    from mcp import Client

    async def use():
        async with Client(f"{served.address}/mcp") as client:
            listed = await client.list_tools()
            result = await client.call_tool("add", {"a": 2, "b": 40})
            return [tool.name for tool in listed.tools], result.content[0].text

    assert asyncio.run(use()) == (["add"], "42")


# -- lm_eval


LM_EVAL = ROOT / ".venv/lm-eval/bin/python"
TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], do_sample: false}}
filter_list:
  - name: number
    filter: [{{function: regex, regex_pattern: "(\\\\d+)\\\\."}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def says_number(trajectory, example):
    """The reward that grades as the task above does."""
    found = re.search(r"(\d+)\.", trajectory.messages[-1]["content"])
    return float(found is not None and found[1] == example["answer"])


def test_lm_eval_gives_the_accuracy_that_evaluate_gives(tokenizer, tmp_path):
    """Unchanged, as a process of its own; half of the rows are solved, some wrongly, some not."""
    if not LM_EVAL.exists():
        pytest.skip("no lm_eval in .venv/lm-eval: make .venv/installed-test installs it")
    rows = []
    for number in range(24):
        prompt = f"sum {number} 4" if number % 3 else f"say about {number}."
        answer = number + 4 if number % 2 else number + 5
        rows.append({"prompt": prompt, "answer": str(answer)})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(TASK.format(rows=file))
    player, script = scripted_player(tokenizer)
    with serving(player) as address:
        url = f"{address}/v1/chat/completions"
        command = [LM_EVAL, "-m", "lm_eval", "run", "--model", "local-chat-completions"]
        command += ["--model_args", f"model=calc,base_url={url},num_concurrent=8,max_retries=1"]
        command += ["--tasks", "sums", "--include_path", tmp_path, "--apply_chat_template"]
        command += ["--output_path", tmp_path / "out"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OPENAI_API_KEY": "none"}
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (results,) = (tmp_path / "out").rglob("results_*.json")
        accuracy = json.loads(results.read_text())["results"]["sums"]["exact_match,number"]
        asked = set(script.prompts)
        # the same rows by the same model, as evaluate.py plays and counts them
        examples = data.load(str(file), system_prompt=SYSTEM["content"])
        player.rewards = {"says_number": (says_number, 1.0)}
        numbers = evaluate.summarize(player.play(examples), "says_number", (1,))
    assert accuracy == numbers["accuracy"] and 0.2 < accuracy < 0.8
    assert set(script.prompts) == asked  # token by token what the endpoint's rollouts read
