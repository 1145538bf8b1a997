"""What SFT trains on, and how: forms of data, packing, validation, and what is refused.

    pytest tests/test_sft.py

Pinned here: the mask is RL's and recorded tokens stay as they are (pitfall 49), packed samples do
not see each other and give the same gradient (50), validation leaves training alone (51), and keys
without effect are refused (55). Rows that do not fit are in test_data.py.
"""

import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import CHATML, make_tokenizer

import data
import play
import train_grpo
import train_sft
from chat import Chat
from engines.scripted import ScriptedEngine
from learning import model as models
from learning.merge import Config as MergeConfig
from learning.merge import merge
from player import Player
from rollout import Settings, rollouts
from run import config
from run import log as run_log
from run import page as run_page
from run.config import UserError
from run.loop import run_blocking
from tasks import tiny as tiny_model
from tools import Toolbox
from train_sft import Sample

PYTHON_CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "print(6 * 7)"}}\n</tool_call>'


def python(code: str) -> str:
    """Runs code.

    Args:
        code: Python.
    """
    return "42"


def schema(name):
    parameters = {"type": "object", "properties": {"x": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def conversation(answer="It is 5.", **columns):
    question = {"role": "user", "content": "2 + 3?"}
    return {"messages": [question, {"role": "assistant", "content": answer}], **columns}


def calling(name, **columns):
    """A conversation whose assistant calls a tool of this name."""
    call = {"type": "function", "function": {"name": name, "arguments": {"x": "1"}}}
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "content": "done"},
        {"role": "assistant", "content": "Done."},
    ]
    return {"messages": messages, **columns}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def policy(tokenizer):
    return tiny_model.tiny(tokenizer, seed=1, hidden_size=32, layers=2).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model whose training draws random numbers: its attention has dropout."""
    made = tmp_path_factory.mktemp("sft")
    model = tiny_model.tiny(tokenizer, seed=1, hidden_size=32, layers=2)
    model.config.attention_dropout = 0.3
    models.save(model, tokenizer, made)
    return made


@pytest.fixture
def demos(tmp_path):
    """(file, rows): 24 conversations of different lengths."""
    rows = [conversation("It is " + "1 + " * (i % 7) + f"{i}.") for i in range(24)]
    return write(tmp_path / "demos.jsonl", rows), rows


def settings(folder, data, out_dir, **options):
    values = {"model": str(folder), "data": str(data), "out_dir": str(out_dir), "tools": ()}
    values |= {"batch_size": 8, "learning_rate": 1e-2, "warmup": 0}
    return train_sft.Config(**values | options)


def complaint(*args, **options):
    cfg = settings(*args, **options)
    with pytest.raises(UserError) as caught:
        train_sft.check(cfg)
        train_sft.train(cfg)
    return str(caught.value)


def some_samples(vocabulary, lengths, seed=0):
    """Samples of these lengths, about half of the tokens trained, the last one always."""
    rng = random.Random(seed)
    return [
        Sample(
            [rng.randrange(vocabulary) for _ in range(n)],
            [0] + [rng.randint(0, 1) for _ in range(n - 2)] + [1],
        )
        for n in lengths
    ]


def gradient(model, samples, token_budget, packing):
    model.zero_grad()
    metrics = train_sft.accumulate(model, samples, token_budget, packing)
    return metrics, torch.cat([p.grad.flatten() for p in model.parameters()])


def weights(folder):
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)


# Recorded trajectories


@pytest.fixture(scope="module")
def played(tokenizer):
    """Two trajectories of one prompt: a call and an answer, whose tokens are not those that an
    encoding of their text gives; and an answer alone."""
    box = Toolbox([python])
    chat = Chat(tokenizer, "hermes", box.schemas)
    letters = [tokenizer.encode(x, add_special_tokens=False) for x in "It is 42."]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    call = tokenizer.encode(PYTHON_CALL, add_special_tokens=False)
    turns = [[*call, end], [*sum(letters, []), end], [*sum(letters[:2], []), end]]
    example = {"id": 0, "messages": conversation()["messages"][:1], "answer": "42"}
    engine = ScriptedEngine(turns, tokenizer)
    first, second = (
        run_blocking(rollouts([example], chat, engine, box, Settings()))[0] for _ in range(2)
    )
    first.reward, second.reward = 1.0, 0.0
    return chat, first, second


def test_a_recorded_trajectory_is_trained_on_token_for_token(played, tokenizer, tmp_path):
    """Pitfalls 1, 49: what report.py writes of a rollout is the sample, not its text again."""
    chat, first, second = played
    run_log.write_rollouts(tmp_path / "rollouts.jsonl", [first, second], tokenizer)
    rows = data.conversations(str(tmp_path / "rollouts.jsonl"))
    samples = train_sft.render(rows, tokenizer, "hermes", [], "x")
    assert samples == [Sample(first.ids, first.mask), Sample(second.ids, second.mask)]
    assert sum(first.mask) == first.new_tokens and len(first.turn_starts) == 2
    again, mask = chat.render(first.messages)
    assert len(again) < len(first.ids) and tokenizer.decode(again).startswith(
        tokenizer.decode(first.ids)
    )
    # its first turn was encoded as SFT does, so up to the second the two are one
    end = first.turn_starts[1]
    assert (again[:end], mask[:end]) == (first.ids[:end], first.mask[:end])


def test_the_messages_of_trajectories_are_learnt_by_a_model_with_another_tokenizer(
    played, tokenizer, tmp_path, folder
):
    _, first, second = played
    path = tmp_path / "rollouts.jsonl"
    run_log.write_rollouts(path, [first, second], tokenizer)
    rows = data.conversations(str(path), recorded=False)
    assert [row["messages"] for row in rows] == [first.messages, second.messages]
    assert [row["reward"] for row in rows] == [1.0, 0.0]
    cfg = settings(
        folder,
        path,
        tmp_path / "out",
        min_reward=1,
        recorded=False,
        tools=("python",),
        batch_size=1,
    )
    _, _, (sample,), *_ = train_sft.setup(cfg)
    taught = [i for i, is_trained in zip(sample.ids, sample.mask, strict=True) if is_trained]
    sampled = [i for i, is_sampled in zip(first.ids, first.mask, strict=True) if is_sampled]
    assert tokenizer.decode(taught) == tokenizer.decode(sampled) and len(taught) < len(sampled)
    messages = tmp_path / "messages.jsonl"
    messages.write_text(json.dumps({"messages": first.messages}) + "\n")
    with pytest.raises(UserError, match="recorded=false has no effect: no row of .* has ids"):
        data.conversations(str(messages), recorded=False)


def test_min_reward_takes_the_trajectories_that_reach_it(played, tokenizer, tmp_path, folder):
    _, first, second = played
    path = tmp_path / "rollouts.jsonl"
    run_log.write_rollouts(path, [second, first, second], tokenizer)
    unknown = json.loads(path.read_text().splitlines()[0]) | {"reward": None}
    with open(path, "a") as file:
        file.write(json.dumps(unknown))
    rows = data.conversations(str(path))
    assert [row["row"] for row in data.rewarded(rows, 0.5, "x")] == [2]
    assert [row["row"] for row in data.rewarded(rows, 0.0, "x")] == [1, 2, 3]
    assert data.rewarded(rows, None, "x") == rows
    with pytest.raises(UserError, match="min_reward = 2: no row of x reaches it: lower it"):
        data.rewarded(rows, 2, "x")
    cfg = settings(folder, path, tmp_path / "out", min_reward=1, tools=("python",), batch_size=1)
    metrics = train_sft.train(cfg)
    assert metrics["step"] == 0 and metrics["trained_tokens"] == first.new_tokens


def test_min_reward_without_rewards_is_refused(folder, demos, tmp_path):
    """Pitfall 55."""
    said = complaint(folder, demos[0], tmp_path / "out", min_reward=0.5)
    assert said == (
        f"{demos[0]}, row 1: min_reward has no effect, it has no reward: give it a number, or "
        "drop min_reward"
    )
    bad = write(tmp_path / "bad.jsonl", [conversation(reward=1), conversation(reward="good")])
    said = complaint(folder, bad, tmp_path / "out", min_reward=0.5)
    assert "bad.jsonl, row 2: min_reward has no effect, its reward is 'good'" in said


def test_conversations_and_trajectories_may_stand_in_one_file(played, tokenizer, tmp_path):
    _, first, _ = played
    run_log.write_rollouts(tmp_path / "x.jsonl", [first], tokenizer)
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write(json.dumps(conversation()))
    rows = data.conversations(str(tmp_path / "x.jsonl"), system_prompt="Be brief.")
    one, other = train_sft.render(rows, tokenizer, "hermes", [], "x")
    assert one == Sample(first.ids, first.mask)
    messages = [{"role": "system", "content": "Be brief."}, *conversation()["messages"]]
    assert other == Sample(*Chat(tokenizer, "hermes").render(messages))


def test_ids_of_another_tokenizer_are_refused(played, tokenizer, folder, tmp_path):
    _, first, _ = played
    run_log.write_rollouts(tmp_path / "x.jsonl", [first], tokenizer)
    row = json.loads((tmp_path / "x.jsonl").read_text())
    wrong = [
        (row | {"ids": [*row["ids"][:-1], len(tokenizer)]}, f"none above {len(tokenizer) - 1}"),
        (row | {"ids": row["ids"][::-1]}, "other text than the row's"),
    ]
    for bad, what in wrong:
        path = write(tmp_path / "bad.jsonl", [row, bad])
        said = complaint(folder, path, tmp_path / "out", tools=("python",))
        assert said == (
            f"{path}, row 2: to the model's tokenizer its ids are {what}: give the model that "
            "recorded it, or one with its tokenizer; or learn its messages, with --recorded=false"
        )
    said = complaint("tiny", tmp_path / "x.jsonl", tmp_path / "out", tools=("python",))
    assert said == "model = 'tiny' has a new tokenizer: recorded ids need their own model"


# Conversations


def test_a_row_that_names_tools_shows_these_of_the_config(tokenizer):
    find, add = schema("find"), schema("add")
    rows = [
        {"row": i, "messages": conversation()["messages"], "tools": names}
        for i, names in enumerate([["add"], None, ["find", "add"], []], 1)
    ]
    samples = train_sft.render(rows, tokenizer, "hermes", [find, add], "x")
    texts = [tokenizer.decode(sample.ids) for sample in samples]
    shown = [['"find"' in text, '"add"' in text] for text in texts]
    assert shown == [[False, True], [True, True], [True, True], [False, False]]
    with pytest.raises(
        UserError, match="x, row 1: its 'tools' names 'add', the run has find: name"
    ):
        train_sft.render(rows, tokenizer, "hermes", [find], "x")


def test_a_row_shows_its_own_tools_and_else_those_of_the_config(tokenizer, monkeypatch):
    """Pitfall 49: the template is proved once, and each distinct set of tools is looked at once."""
    made = []

    class Counted(Chat):
        def __init__(self, tokenizer, format, tools, options=(), vision=None):
            made.append([tool["function"]["name"] for tool in tools])
            super().__init__(tokenizer, format, tools, options, vision=vision)

        def with_tools(self, tools):
            made.append([tool["function"]["name"] for tool in tools])
            return super().with_tools(tools)

    monkeypatch.setattr(train_sft, "Chat", Counted)
    find, add = schema("find"), schema("add")
    own = [[find], [add, find], None, [], [find], None]
    rows = [conversation()["messages"] for _ in own]
    rows = [
        {"row": i, "messages": m, "tools": t}
        for i, (m, t) in enumerate(zip(rows, own, strict=True))
    ]
    default = Toolbox([python]).schemas
    samples = train_sft.render(rows, tokenizer, "hermes", default, "x")
    assert made == [["python"], ["find"], ["add", "find"], []]
    for sample, tools in zip(samples, own, strict=True):
        ids, mask = sample.ids, sample.mask
        tools = default if tools is None else tools
        shown = tokenizer.decode(ids[: mask.index(1)])
        for name in ("find", "add", "python"):
            assert (f'"name": "{name}"' in shown) == (
                name in [t["function"]["name"] for t in tools]
            )
        assert (ids, mask) == Chat(tokenizer, "hermes", tools).render(rows[0]["messages"])
    made.clear()
    train_sft.render(rows[:2], tokenizer, "hermes", default, "x")
    assert made == [["find"], ["add", "find"]]  # what no row shows is not proved


def test_openais_form_gives_the_tokens_of_a_rollout(tokenizer, tmp_path):
    """Pitfall 7: arguments as text, results by id in any order, null contents, parts."""
    find, add = schema("find"), schema("add")

    def call(id, name, x):
        return {"id": id, "function": {"name": name, "arguments": json.dumps({"x": x})}}

    def result(id, text):
        return {"role": "tool", "tool_call_id": id, "content": text}

    calls = [call("a", "find", "1"), call("b", "add", "2")]
    parts = [{"type": "text", "text": "Go"}, {"type": "text", "text": "."}]
    theirs = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": calls},
        result("b", "two"),
        result("a", "one"),
        {"role": "assistant", "content": "Done.", "refusal": None},
    ]
    path = write(tmp_path / "x.jsonl", [{"messages": theirs, "tools": json.dumps([find, add])}])
    (sample,) = train_sft.render(data.conversations(path), tokenizer, "hermes", [], "x")
    ours = calling("find")["messages"]
    second = {"function": {"name": "add", "arguments": {"x": "2"}}}
    ours[1]["tool_calls"].append(second)
    ours[2:3] = [
        {"role": "tool", "name": "find", "content": "one"},
        {"role": "tool", "name": "add", "content": "two"},
    ]
    assert sample == Sample(*Chat(tokenizer, "hermes", [find, add]).render(ours))
    assert tokenizer.decode(sample.ids).count("one\n</tool_response>\n<tool_response>\ntwo") == 1


def test_a_call_of_a_tool_that_the_prompt_does_not_show_is_refused(tokenizer, tmp_path):
    """Pitfall 49: the template was proved for the tools that are shown, and for no others."""
    path = write(tmp_path / "x.jsonl", [calling("find", tools=[schema("find")]), calling("find")])
    rows = data.conversations(path)
    remedy = "name it in --tools=…, or give the row a `tools` column"
    for tools, there in ((Toolbox([python]).schemas, "python"), ([], "none")):
        with pytest.raises(UserError) as caught:
            train_sft.render(rows, tokenizer, "hermes", tools, path)
        assert str(caught.value) == (
            f"{path}, row 2: it calls find, the tools of its prompt are {there}: {remedy}"
        )
    assert len(train_sft.render(rows, tokenizer, "hermes", [schema("find")], path)) == 2


def test_a_turn_that_is_cut_keeps_a_partial_mask(tokenizer):
    """Pitfall 49."""
    ids, mask = Chat(tokenizer, "hermes").render(conversation()["messages"])
    begins = mask.index(1)
    short = conversation("5")["messages"]
    short = Sample(*Chat(tokenizer, "hermes").render(short))
    end = len(short.ids)
    assert end < len(ids)
    samples = [Sample(ids, mask), short, Sample(ids, [0] * len(ids))]
    kept, cut, empty = train_sft.fit(samples, end)
    assert kept == [Sample(ids[:end], mask[:end]), short] and (cut, empty) == (1, 1)
    assert kept[0].mask.count(1) == min(end - begins, mask.count(1)) > 0
    kept, cut, empty = train_sft.fit(samples, begins + 1)
    assert [sample.mask.count(1) for sample in kept] == [1, 1] and (cut, empty) == (2, 1)
    with pytest.raises(UserError, match=f"max_tokens = {begins}: in none of the 3 conversations"):
        train_sft.fit(samples, begins)


def test_the_first_line_says_what_became_of_the_rows(folder, demos, tmp_path, capsys, tokenizer):
    chat = Chat(tokenizer, "hermes")
    lengths = [len(chat.render(row["messages"])[0]) for row in demos[1]]
    limit = sorted(lengths)[15]
    cut = sum(n > limit for n in lengths)
    assert 0 < cut < 24
    train_sft.train(
        settings(folder, demos[0], tmp_path / "out", max_tokens=limit, val_rows=4, batch_size=10)
    )
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(
        f"20 rows to train on, 4 held out, {cut} cut at max_tokens, 0 left out with nothing to "
        "train, 0 below min_reward; 2 steps, "
    )


# Packing


LENGTHS = (9, 5, 12, 3, 7, 2, 2)


@pytest.mark.parametrize("token_budget", [10**6, 16, 12, 1])
def test_packed_samples_give_the_loss_and_the_gradient_of_padded_ones(policy, token_budget):
    """Pitfalls 50, 21."""
    samples = some_samples(policy.config.vocab_size, LENGTHS)
    padded, wanted = gradient(policy, samples, 10**6, packing=False)
    packed, found = gradient(policy, samples, token_budget, packing=True)
    assert packed == pytest.approx(padded, rel=1e-6)
    assert wanted.norm() > 0 and (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert padded["trained_tokens"] == sum(sum(sample.mask) for sample in samples)


def test_a_packed_sample_does_not_see_the_others(policy):
    """Pitfall 50: whatever their tokens are, its logprobs are the same bits."""
    vocabulary = policy.config.vocab_size
    samples, others = (some_samples(vocabulary, LENGTHS, seed) for seed in (0, 1))

    def logprobs(samples):
        with torch.no_grad():
            return train_sft.batch_logprobs(policy, samples, packing=True)[0][0].split(LENGTHS)

    before = logprobs(samples)
    for changed in range(len(samples)):
        mixed = [*samples]
        mixed[changed] = Sample(others[changed].ids, samples[changed].mask)
        after = logprobs(mixed)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [i != changed for i in range(len(samples))]


def test_packs_hold_every_sample_once_and_no_more_tokens_than_the_budget():
    """First-fit decreasing; a sample above the budget is alone."""
    assert train_sft.packs([4, 5, 3, 6, 2], 10) == [[3, 0], [1, 2, 4]]
    assert train_sft.packs([3, 30, 3], 10) == [[1], [0, 2]]
    rng = random.Random(0)
    for budget in (1, 50, 100, 1000):
        lengths = [rng.randint(1, 120) for _ in range(200)]
        found = train_sft.packs(lengths, budget)
        assert sorted(i for pack in found for i in pack) == list(range(200))
        filled = [sum(lengths[i] for i in pack) for pack in found]
        assert all(n <= budget or len(p) == 1 for n, p in zip(filled, found, strict=True))
        if budget == 1000:  # 11/9 of the fewest that there could be, and 6/9
            assert len(found) <= 11 / 9 * -(-sum(lengths) // budget) + 6 / 9


def test_packing_is_proved_or_refused(policy, monkeypatch):
    """Pitfall 50: of a model that ignores where positions begin again, and of one with
    convolutions, which no mask keeps apart."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    train_sft.check_packing(policy, "tiny")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 100}
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    kinds = {"layer_types": ["conv", "full_attention"], "initializer_range": 0.2}
    mixing = Lfm2ForCausalLM(Lfm2Config(**heads, **shape, **kinds)).eval()
    says = r"model = 'lfm' cannot be packed: behind another sample, .* use packing=false$"
    with pytest.raises(UserError, match=says):
        train_sft.check_packing(mixing, "lfm")
    forward = policy.get_decoder().forward
    monkeypatch.setattr(
        policy.get_decoder(), "forward", lambda position_ids=None, **given: forward(**given)
    )
    with pytest.raises(UserError, match="model = 'tiny' cannot be packed"):
        train_sft.check_packing(policy, "tiny")


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_packing_is_proved_in_bfloat16_too(folder, dtype, monkeypatch):
    model, _ = models.load(str(folder), "lora", dtype, device="cpu")
    train_sft.check_packing(model, "x")
    forward = model.get_decoder().forward
    monkeypatch.setattr(
        model.get_decoder(), "forward", lambda position_ids=None, **given: forward(**given)
    )
    with pytest.raises(UserError, match="model = 'x' cannot be packed"):
        train_sft.check_packing(model, "x")
    assert not torch.is_autocast_enabled("cpu")  # the tests after this one are in float32


def test_a_packed_run_is_a_padded_run_in_fewer_passes(folder, demos, tmp_path, tokenizer):
    """Pitfall 50. Without dropout, whose noise depends on the shape."""
    model, _ = models.load(str(folder), device="cpu")
    model.config.attention_dropout = 0.0
    models.save(model, tokenizer, tmp_path / "plain")
    runs = {}
    for packing in (False, True):
        out_dir = tmp_path / f"packing_{packing}"
        options = {"token_budget": 400, "packing": packing, "val_rows": 3}
        train_sft.train(settings(tmp_path / "plain", demos[0], out_dir, **options))
        runs[packing] = run_page.read(out_dir / "metrics.jsonl")
    for padded, packed in zip(runs[False], runs[True], strict=True):
        for row in (padded, packed):
            del row["seconds"]
        assert packed == pytest.approx(padded, rel=1e-4)
    samples = some_samples(len(tokenizer), [100, 150, 250, 300])
    passes = [len(train_sft.parts(samples, 400, packing)) for packing in (False, True)]
    assert passes == [3, 2]


# Validation


def test_validation_is_the_loss_and_the_share_of_greedy_tokens(policy):
    """By the plain way: all logits, their log-softmax and their argmax."""
    samples = some_samples(policy.config.vocab_size, LENGTHS)
    # some targets are what the model would say, else all of them would be wrong
    for ids in [sample.ids for sample in samples]:
        for t in range(1, len(ids), 2):
            with torch.no_grad():
                ids[t] = policy(torch.tensor([ids[:t]])).logits[0, -1].argmax().item()
    nll, right, count = 0.0, 0, 0
    for ids, mask in [(sample.ids, sample.mask) for sample in samples]:
        with torch.no_grad():
            logits = policy(torch.tensor([ids])).logits[0]
        for t in range(1, len(ids)):
            nll -= mask[t] * logits[t - 1].log_softmax(-1)[ids[t]].item()
            right += mask[t] * (logits[t - 1].argmax().item() == ids[t])
            count += mask[t]
    assert 0 < right < count
    wanted = {"val_loss": nll / count, "val_token_accuracy": right / count}
    for packing in (False, True):
        for budget in (10**6, 12):
            found = train_sft.validate(policy, samples, budget, packing)
            assert found == pytest.approx(wanted, rel=1e-5)


def test_validation_leaves_modes_gradients_and_random_numbers_alone(folder):
    """Pitfalls 35, 51: it is without dropout, also inside of a model that trains with it."""
    model, tokenizer = models.load(str(folder), "full", device="cpu")
    samples = some_samples(len(tokenizer), LENGTHS)
    model.train()
    model.get_decoder().layers[0].training = False
    modes = [module.training for module in model.modules()]
    state, own = torch.get_rng_state(), random.getstate()
    first = train_sft.validate(model, samples, 100)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == own
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert train_sft.validate(model.eval(), samples, 100) == first
    model.train()
    trained = [train_sft.accumulate(model, samples, 100)["loss"] for _ in range(2)]
    assert trained[0] != trained[1]  # there is dropout to leave out


def test_a_run_with_validation_trains_as_one_on_the_same_rows_without(folder, demos, tmp_path):
    """Pitfall 51: bit for bit, with dropout drawing random numbers between validations."""
    path, rows = demos
    (kept, held) = train_sft.hold_out(rows, 5, seed=3)
    assert len(held) == 5 and [row for row in rows if row not in held] == kept
    assert train_sft.hold_out(rows, 5, seed=4)[1] != held
    rest = write(tmp_path / "rest.jsonl", kept)
    runs = {"with": (path, {"val_rows": 5, "val_every": 2}), "without": (rest, {})}
    for name, (file, options) in runs.items():
        torch.manual_seed(len(name))  # whatever was drawn before changes nothing either
        train_sft.train(settings(folder, file, tmp_path / name, seed=3, batch_size=3, **options))
    one, other = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    measured = [
        row for row in run_page.read(tmp_path / "with" / "metrics.jsonl") if "val_loss" in row
    ]
    assert [row["step"] for row in measured] == [1, 3, 5]
    assert all(0 <= row["val_token_accuracy"] <= 1 for row in measured)
    assert measured[-1]["val_loss"] < measured[0]["val_loss"]
    assert not any(
        "val_loss" in row for row in run_page.read(tmp_path / "without" / "metrics.jsonl")
    )


def test_rows_in_their_order_where_they_are_not_shuffled(folder, demos, tmp_path):
    assert train_sft.row_order(3, 6, seed=0, shuffle=False) == [0, 1, 2, 0, 1, 2]
    cfg = settings(folder, demos[0], tmp_path / "out", batch_size=2, shuffle=False)
    train_sft.train(cfg)
    rows = [json.loads(line) for line in open(tmp_path / "out" / "rollouts.jsonl")]
    _, _, samples, *_ = train_sft.setup(cfg)
    assert [row["ids"] for row in rows] == [sample.ids for sample in samples[:3]]


def test_the_page_shows_the_first_samples_with_their_mask(folder, demos, tmp_path):
    """D7: what is trained is seen token by token; written once, also where the run goes on."""
    cfg = settings(folder, demos[0], tmp_path / "out", batch_size=2)
    train_sft.train(cfg)
    rows = [json.loads(line) for line in open(tmp_path / "out" / "rollouts.jsonl")]
    _, tokenizer, samples, *_ = train_sft.setup(cfg)
    order = train_sft.row_order(len(samples), len(samples), cfg.seed)
    expected = [(samples[row].ids, samples[row].mask) for row in order[:3]]
    assert [(row["ids"], row["mask"]) for row in rows] == expected
    for row in rows:
        assert row["kinds"] == "".join("ct"[trained] for trained in row["mask"])
        assert "".join(row["pieces"]) == tokenizer.decode(row["ids"])
        starts = [i for i, kind in enumerate(row["kinds"]) if row["kinds"][i - 1 : i + 1] == "ct"]
        assert row["turn_starts"] == starts and starts
    assert (tmp_path / "out" / "report.html").exists()
    train_sft.train(replace(cfg, resume=True))
    assert len(open(tmp_path / "out" / "rollouts.jsonl").readlines()) == 3


def test_the_last_step_is_always_measured(folder, demos, tmp_path, capsys):
    cfg = settings(folder, demos[0], tmp_path / "out", val_rows=8, batch_size=8)
    last = train_sft.train(cfg)
    rows = run_page.read(tmp_path / "out" / "metrics.jsonl")
    assert ["val_loss" in row for row in rows] == [False, True]
    assert rows[-1]["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    said = capsys.readouterr().out.splitlines()
    summary = said[said.index("---") :]
    for key in ("val_loss", "val_token_accuracy"):
        assert f"{key + ':':24} {last[key]:.4f}" in summary


# What ends a turn of the trained model


def eos_of(folder):
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_base_model_that_learnt_chatml_is_saved_with_what_ends_its_turns(demos, tune, tmp_path):
    """A19: its own eos is <|endoftext|>; elsewhere it would never stop at <|im_end|>."""
    plain = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = make_tokenizer(CHATML, special, plain, eos="<|endoftext|>")
    model = tiny_model.tiny(tokenizer, seed=1, hidden_size=32, layers=2)
    models.save(model, tokenizer, tmp_path / "base")
    end, own = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert eos_of(tmp_path / "base") == own and models.eos_ids(str(tmp_path / "base")) == [own]

    out = tmp_path / "out"
    train_sft.train(settings(tmp_path / "base", demos[0], out, tune=tune))
    assert eos_of(out) == models.eos_ids(str(out)) == [end, own]
    model, _ = models.load(str(out), device="cpu")
    if tune == "lora":
        merge(MergeConfig(adapter=str(out), out_dir=str(tmp_path / "merged")))
        assert eos_of(tmp_path / "merged") == [end, own]
    else:
        assert model.generation_config.eos_token_id == [end, own]


def test_what_ends_a_turn_of_a_model_is_read_where_it_stands(folder, tokenizer, tmp_path):
    """A19: in generation_config.json, or in config.json where there is none."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = str(tmp_path)
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, end]}))
    assert models.eos_ids(name) == [other, end]
    player = Player.of(train_grpo.Config(model=name, data="task:calc"), limit=1)
    assert player.chat.stop_ids == (end, other)
    assert player.model.generation_config.eos_token_id == [other, end]
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    assert models.eos_ids(name) == [tokenizer.eos_token_id]
    (tmp_path / "generation_config.json").unlink()
    assert models.eos_ids(name) == [tokenizer.eos_token_id]


def test_recorded_rows_leave_what_ends_a_turn_as_it_is(folder, played, tokenizer, tmp_path):
    """A19."""
    run_log.write_rollouts(tmp_path / "r.jsonl", played[1:], tokenizer)
    recorded = tmp_path / "r.jsonl"
    train_sft.train(
        train_sft.Config(
            model=str(folder),
            data=str(recorded),
            out_dir=str(tmp_path / "out"),
            batch_size=2,
            warmup=0,
        )
    )
    assert eos_of(tmp_path / "out") == eos_of(folder)


# What is refused


def test_keys_without_effect_on_the_data_are_refused(folder, played, tokenizer, tmp_path):
    """Pitfall 55."""
    own = write(tmp_path / "own.jsonl", [calling("find", tools=[schema("find")])])
    system = [{"role": "system", "content": "S"}, *conversation()["messages"]]
    talked = write(tmp_path / "talked.jsonl", [{"messages": system}])
    run_log.write_rollouts(tmp_path / "r.jsonl", played[1:], tokenizer)
    recorded = str(tmp_path / "r.jsonl")
    usual = {"tools": ("python",)}
    cases = [
        (own, {"tools": ()}, f"tools has no effect on {own}, whose rows have `tools` of their own"),
        (recorded, {"tools": ()}, f"tools has no effect on {recorded}, whose rows are recorded"),
        (recorded, usual | {"format": "fence"}, f"format has no effect on {recorded}, whose rows"),
        (recorded, usual | {"system_prompt": "S"}, f"system_prompt has no effect on {recorded}: "),
        (talked, {"system_prompt": "S"}, f"system_prompt has no effect on {talked}: every row has"),
        (own, {"val_every": 5}, "val_every has no effect with val_rows=0: use --val_rows=64"),
    ]
    for path, options, says in cases:
        assert complaint(folder, path, tmp_path / "out", **options).startswith(says)
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_options_of_a_tool_reach_the_schema_that_is_trained_on(folder, demos, tmp_path, capsys):
    """The convention of coordinates has to be that of the rollouts; play.py shows the same."""
    path = demos[0]
    for coordinates, says in (("pixels", "in pixels of the image"), ("relative", "0 to 1000")):
        options = {"tools": ("crop",), "tool_options": (f"crop.coordinates={coordinates}",)}
        cfg = settings(folder, path, tmp_path / "out", **options)
        _, tokenizer, samples, *_ = train_sft.setup(cfg)
        assert says in tokenizer.decode(samples[0].ids)
        play.show_demonstration(cfg)
        assert says in capsys.readouterr().out


@pytest.mark.parametrize("option", ["python.timeout=3", "crop.retries=1", "crop.timeout=5"])
def test_options_that_no_schema_tells_are_refused_where_no_tool_is_called(
    option, folder, demos, tmp_path
):
    """Pitfall 55."""
    name = option.partition("=")[0]
    options = {"tools": ("crop", "python"), "tool_options": (option,)}
    said = complaint(folder, demos[0], tmp_path / "out", **options)
    assert said.startswith(f"tool_options: {name} has no effect: tools are shown here, and none is")


def test_values_that_leave_nothing_to_train_on_are_refused(folder, demos, tmp_path):
    path, out_dir = demos[0], tmp_path / "out"
    assert complaint(folder, path, out_dir, val_rows=24) == (
        "val_rows = 24: of 24 rows none is left to train on"
    )
    assert complaint(folder, path, out_dir, batch_size=25) == (
        "batch_size = 25: there are 24 rows to train on, use --batch_size=24 or less"
    )
    says = "batch_size = 21: there are 20 rows to train on, use --batch_size=20 or less"
    assert complaint(folder, path, out_dir, val_rows=4, batch_size=21) == says
    assert complaint(folder, path, out_dir, val_rows=-1) == "val_rows = -1: expected 0 or more"
    says = "val_every = 0: expected at least 1"
    assert complaint(folder, path, out_dir, val_rows=2, val_every=0) == says


def test_a_template_that_cannot_be_proved_for_the_tools_of_a_row_is_refused(tokenizer):
    """Pitfall 49: in a sentence that names the row."""
    import copy

    deaf = copy.deepcopy(tokenizer)
    deaf.chat_template = tokenizer.chat_template.replace("if tools", "if false")
    rows = [{"row": 1, "messages": conversation()["messages"], "tools": []}]
    rows += [{"row": 2, "messages": conversation()["messages"], "tools": [schema("find")]}]
    with pytest.raises(UserError, match=r"^x, row 2: the chat template of .* it ignores tools"):
        train_sft.render(rows, deaf, "hermes", [], "x")
    assert len(train_sft.render(rows[:1], deaf, "hermes", [], "x")) == 1


@pytest.mark.parametrize(
    "nothing",
    [
        {"content": ""},
        {"content": None},
        {"content": " \n"},
        {"content": []},
        {"content": "<think>\nHm.\n</think>\n\n"},
        {"reasoning_content": "Hm."},
    ],
)
def test_an_assistant_that_says_nothing_is_refused(folder, nothing, tmp_path):
    """A17: it would be trained to stop at once. A row that its reward leaves out may have it."""
    asked = {"role": "user", "content": "2 + 3?"}
    empty = {"messages": [asked, {"role": "assistant", **nothing}], "reward": 0.0}
    path = write(tmp_path / "x.jsonl", [conversation(reward=1.0), empty])
    says = f"{path}, row 2: message 2, of the assistant, says nothing and calls nothing, so that"
    assert complaint(folder, path, tmp_path / "out", batch_size=1).startswith(says)
    last = train_sft.train(settings(folder, path, tmp_path / "out", batch_size=1, min_reward=1.0))
    assert last["trained_tokens"] > 1


def test_a_saved_config_is_the_config(folder, demos, tmp_path):
    cfg = settings(folder, demos[0], tmp_path / "out", packing=True, val_rows=2, epochs=0.4)
    train_sft.train(cfg)
    argv = ["--config", str(tmp_path / "out" / "config.py")]
    assert config.parse(train_sft.Config, argv, train_sft.check) == cfg


def test_a_warm_up_that_nobody_asked_for_is_a_tenth_of_a_short_run(folder, demos, tmp_path):
    """Pitfall 55: one that was given and takes all updates is refused before out_dir is written."""
    out_dir = tmp_path / "out"
    said = complaint(folder, demos[0], out_dir, warmup=21)
    assert said.startswith("warmup = 21: expected less than 3, since 24 rows are 3 updates")
    train_sft.train(settings(folder, demos[0], out_dir, warmup=train_sft.Config.warmup))
    rates = [row["learning_rate"] for row in run_page.read(out_dir / "metrics.jsonl")]
    assert rates[0] == max(rates) == 1e-2 and len(rates) == 3
