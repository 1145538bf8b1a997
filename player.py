"""A config becomes what plays: the one seam for training, evaluation, serving and notebooks.

with Player.of(cfg) as player:            # loads, proves the chat template, starts the engine
    trajectories = player.play(player.examples[:4], samples=8)

Player(chat, engine, toolbox, rewards, Settings()).play(examples)   # of parts made by hand
"""

import asyncio
import json
import math
import tempfile
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from pathlib import Path

import data
import rewards as reward_functions
from chat import Chat
from engines import servers, vllm
from engines.base import Engine, check_engine
from engines.local import TransformersEngine
from engines.options import read_options
from images import Picture
from learning import model as models
from learning import parallel
from learning.curriculum import Curriculum
from learning.vision import Vision, find_vision, why_blind
from rollout import Settings, rollouts
from run import mix
from run.config import UserError
from run.loop import Running, run_blocking
from tools import Toolbox
from trajectory import Trajectory

ASKED = "\ue0f6"  # stands for a question in the row that others are made like; for private use
VALIDATION_SEED = 2_000_000  # of a task's rows: neither those of training nor evaluate.py's


@dataclass
class Player:
    """Plays examples. Entered, it has its engine; left, its engine and its tools are closed."""

    chat: Chat
    engine: Engine | None  # None: the one that `cfg` names is started when the player is entered
    toolbox: Toolbox
    rewards: dict  # of rewards.select(); the first is the outcome
    settings: Settings
    turn: Callable | None = None  # plays one turn in the place of rollout.play_turn
    model: object = None  # the policy; None where only an engine elsewhere has it
    examples: list[dict] = field(default_factory=list)  # those of the config
    cfg: object = None
    curriculum: Curriculum | None = None  # which of them come next; None: all in turn
    begun: Running | None = None  # what is being played, between `begin` and `take`
    is_asked: bool = False  # by people, who may show images: see `for_questions`

    @classmethod
    def of(cls, cfg, tune: str = "none", limit: int | None = None, model=None) -> "Player":
        """Makes all that train_grpo's Config (or one like it) describes but the engine; what is
        cheap to check comes first.

        tune: how the model will be trained, "none" if it will not be. limit: use the first so many
        rows, instead of cfg.limit. model: cfg's, if it was loaded for another player. Raises
        UserError for whatever the config gets wrong.
        """
        # 1. what needs no model
        check_engine(cfg.engine, cfg.urls)
        models.find(cfg.model)
        if cfg.mix:
            return Mixture.of_sources(cfg, tune, limit)
        toolbox, rewards, examples = prepare_task(cfg, limit)

        # 2. the chat template, proved before any weights are loaded
        tokenizer = models.load_tokenizer(cfg.model, cfg.chat_template)
        eos_ids = models.eos_ids(cfg.model)
        vision = load_vision(cfg, tokenizer, examples)
        chat = Chat(tokenizer, cfg.format, toolbox.schemas, cfg.template_options, eos_ids, vision)
        check_prompts(chat, examples, cfg.max_tokens)

        # 3. the weights, unless an engine elsewhere has them
        if model is None:
            model = load_policy(cfg, tune, chat, *chats_of_rows(chat, examples))
        settings = Settings.of(cfg)
        return cls(chat, None, toolbox, rewards, settings, None, model, examples, cfg)

    @classmethod
    def for_questions(cls, cfg) -> "Player":
        """Makes one that people ask, by `question`: no row of the config is read, and nothing is
        scored. Of a mix it is the first source's. UserError as `of`."""
        if cfg.mix:
            cfg = mix.sources(cfg)[0].cfg
        # what only environments can be asked for stays: check_environments wants it named
        of_tools = ("environment", "turn_results")
        rewards = [name for name in cfg.rewards if name.partition(":")[0] in of_tools]
        row = {cfg.prompt_column: ASKED, cfg.answer_column: "not known"}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "question.jsonl"
            file.write_text(json.dumps(row) + "\n")
            cfg = replace(
                cfg,
                data=str(file),
                answer_after="",
                rewards=tuple(rewards) or ("correct",),
                reward_options=(),
                dynamic_sampling="",
            )
            player = cls.of(cfg, limit=1)
        player.rewards = {}
        player.is_asked = True
        return player

    def question(self, messages: list[dict], images: list = ()) -> dict:
        """Makes the example of a conversation (formats.messages.read_messages), as the config makes
        those of its rows: its system prompt in front of one that has none, its prompt_template
        around the first text of the user. images: what says where each is, in order."""
        *system, asked = self.examples[0]["messages"]
        messages = list(messages)
        for place, message in enumerate(messages):
            if message["role"] == "user":
                content = in_template(asked["content"], message["content"])
                messages[place] = message | {"content": content}
                break
        if messages[0]["role"] != "system":
            messages = system + messages
        example = self.examples[0] | {"messages": messages}
        return example | {"images": list(images)} if images else example

    def __enter__(self) -> "Player":
        try:
            if self.engine is None:
                has_images = any(example.get("images") for example in self.examples)
                # tools may return some; without them, and none in the rows, there will be none
                has_tools = any(toolbox.tools for toolbox in self.toolboxes)
                may_come = has_images or has_tools or self.cfg.train_vision or self.is_asked
                vision = self.chat.vision if may_come else None
                starting = start_engine(
                    self.cfg, self.model, self.chat.tokenizer, vision, has_images
                )
                self.engine = run_blocking(starting)
        except BaseException:
            self._close_tools()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            if self.begun:
                self.begun.cancel()
            run_blocking(self.engine.close())
        finally:
            self._close_tools()

    def _close_tools(self) -> None:
        for toolbox in self.toolboxes:
            run_blocking(toolbox.close())

    @property
    def toolboxes(self) -> list[Toolbox]:
        """Those of all sources."""
        return [self.toolbox]

    @property
    def outcome(self) -> str:
        """The name of the reward that says right or wrong: the first."""
        return next(iter(self.rewards))

    def next_prompts(
        self, cursor: int, count: int, seed: int, is_new_step: bool = True
    ) -> list[dict]:
        """Takes the next `count` examples after the `cursor` that were taken. is_new_step: False
        where they go on with those of a step."""
        if self.curriculum is None:
            return mix.next_rows(cursor, self.examples, count, seed)
        rows = self.curriculum.take(cursor, count, seed, is_new_step)
        return [self.examples[row] for row in rows]

    @property
    def pass_rates(self) -> list[float | None] | None:
        """What a checkpoint holds of the curriculum."""
        return list(self.curriculum.rates) if self.curriculum else None

    def check_names(self, examples: list[dict]) -> None:
        """Checks that rows which name their tools or rewards name some that are there."""
        data.check_names(examples, list(self.toolbox.tools), list(self.rewards))

    def play(
        self,
        examples: list[dict],
        samples: int = 1,
        step: int = 0,
        first_group: int = 0,
        temperature: float | None = None,
        on_done: Callable[[Trajectory], None] | None = None,
        skip: Container[tuple[int, int]] = (),
    ) -> list[Trajectory]:
        """Plays and scores `samples` trajectories of each example; see rollout.rollouts.
        temperature: instead of that of the settings. Works in notebooks too."""
        self.begin(examples, samples, step, first_group, temperature, on_done, skip)
        return self.take()

    def begin(
        self,
        examples: list[dict],
        samples: int = 1,
        step: int = 0,
        first_group: int = 0,
        temperature: float | None = None,
        on_done: Callable[[Trajectory], None] | None = None,
        skip: Container[tuple[int, int]] = (),
    ) -> None:
        """Begins what `play` does and does not wait for it: `take` does."""
        assert self.begun is None, "what was begun before was not taken"
        # each rank plays its share; then all of them know all trajectories
        groups = parallel.share(list(range(len(examples))))
        playing = self.rollouts(
            [examples[group] for group in groups],
            [first_group + group for group in groups],
            temperature,
            step=step,
            samples=samples,
            on_done=on_done,
            skip=skip,
        )
        self.begun = Running(playing)

    def take(self) -> list[Trajectory]:
        """Waits for the trajectories that were begun."""
        begun = self.begun
        self.begun = None
        with parallel.together():
            try:
                played = begun.result()
            except Exception:
                # with fsdp a pass that goes on would gather weights while they are taken apart
                run_blocking(self.engine.settle())
                raise
        played = parallel.gathered(played)
        self._prepare_images(played)
        return sorted(played, key=lambda trajectory: (trajectory.group, trajectory.sample))

    async def rollouts(
        self, examples: list[dict], groups: list[int], temperature: float | None, **options
    ) -> list[Trajectory]:
        """Plays examples, whose numbers are `groups`, in this process; see rollout.rollouts."""
        settings = self.settings
        if temperature is not None:
            settings = replace(settings, temperature=temperature)
        return await rollouts(
            examples,
            self.chat,
            self.engine,
            self.toolbox,
            settings,
            rewards=self.rewards,
            groups=groups,
            turn=self.turn,
            **options,
        )

    def as_saved(self, trajectories: list[Trajectory]) -> list[dict]:
        """Makes plain values of trajectories, as a checkpoint holds them: of an example, where it
        is among those of the player; of an image, what was shown."""

        def key(example: dict) -> tuple:  # those of other ranks are copies
            return example.get(mix.KEY), example["id"], str(example["messages"])

        places = {key(example): place for place, example in enumerate(self.examples)}
        saved = []
        for trajectory in trajectories:
            values = trajectory.plain()
            values["example"] = places[key(trajectory.example)]
            values["images"] = [picture.saved() for picture in trajectory.images]
            saved.append(values)
        return saved

    def of_saved(self, saved: list[dict]) -> list[Trajectory]:
        """Makes trajectories of what `as_saved` made of them."""
        trajectories = []
        for values in saved:
            example = self.examples[values["example"]]
            images = [Picture.of_saved(*image) for image in values["images"]]
            trajectories.append(Trajectory.of_plain(values, example, images))
        self._prepare_images(trajectories)
        return trajectories

    def _prepare_images(self, trajectories: list[Trajectory]) -> None:
        """Prepares the images of trajectories that other ranks have played, or a run before this
        one: they come without what the model is given. Those that the samples of a group share
        stay one."""
        if self.chat.vision is None:  # or behind an API, which is shown them as they are
            return
        prepared = {}
        for trajectory in trajectories:
            for number, picture in enumerate(trajectory.images):
                if picture.pixels or picture.seen or picture.again:
                    continue
                if picture.key not in prepared:
                    made = self.chat.vision.prepare(picture.shown, is_resized=True)
                    made.original = picture.original
                    prepared[picture.key] = made
                trajectory.images[number] = prepared[picture.key]


@dataclass
class Mixture(Player):
    """Plays the examples of several sources (run/mix.py), each by a Player of its own. They share
    the model and the engine. Its own chat, toolbox and rewards are those of the first source."""

    players: dict[str, Player] = field(default_factory=dict)  # source -> what plays it
    weights: dict = field(default_factory=dict)  # source -> Fraction

    @classmethod
    def of_players(cls, players: dict[str, Player], model, cfg) -> "Mixture":
        """Makes one of players that are there, by their names. cfg: of the engine they share."""
        first = next(iter(players.values()))
        return cls(
            first.chat,
            None,
            first.toolbox,
            first.rewards,
            first.settings,
            model=model,
            examples=[example for player in players.values() for example in player.examples],
            cfg=cfg,
            players=players,
        )

    @classmethod
    def of_sources(cls, cfg, tune: str, limit: int | None) -> "Mixture":
        """Makes it of a config with a mix, as Player.of does."""
        # 1. what needs no model
        sources = mix.sources(cfg)
        tasks = {}
        every_example = []
        for source in sources:
            with mix.told_by(source.name):
                tasks[source.name] = prepare_task(source.cfg, limit)
            for example in tasks[source.name][2]:
                example[mix.KEY] = source.name
                every_example.append(example)

        # 2. the chat template with the format and the tools of each
        tokenizer = models.load_tokenizer(cfg.model, cfg.chat_template)
        eos_ids = models.eos_ids(cfg.model)
        vision = load_vision(cfg, tokenizer, every_example)
        players = {}
        for source in sources:
            toolbox, rewards, examples = tasks[source.name]
            options = cfg.template_options
            with mix.told_by(source.name):
                chat = Chat(tokenizer, source.cfg.format, toolbox.schemas, options, eos_ids, vision)
                check_prompts(chat, examples, cfg.max_tokens)
            settings = Settings.of(source.cfg)
            # together they play no more at once than one would
            at_once = math.ceil(settings.max_concurrent / len(sources))
            settings = replace(settings, max_concurrent=at_once)
            players[source.name] = Player(
                chat, None, toolbox, rewards, settings, examples=examples, cfg=source.cfg
            )

        # 3. the weights
        chats = []
        for player in players.values():
            chats += [player.chat, *chats_of_rows(player.chat, player.examples)]
        model = load_policy(cfg, tune, *chats)
        mixture = cls.of_players(players, model, cfg)
        mixture.weights = {source.name: source.weight for source in sources}
        return mixture

    @property
    def toolboxes(self) -> list[Toolbox]:
        return [player.toolbox for player in self.players.values()]

    @property
    def outcome(self) -> str:
        """The name of the first reward, where all sources have the same."""
        names = {player.outcome for player in self.players.values()}
        return names.pop() if len(names) == 1 else "outcome"

    def next_prompts(
        self, cursor: int, count: int, seed: int, is_new_step: bool = True
    ) -> list[dict]:
        rows = {name: player.examples for name, player in self.players.items()}
        return mix.next_of_sources(cursor, rows, self.weights, count, seed)

    def check_names(self, examples: list[dict]) -> None:
        for name, player in self.players.items():
            with mix.told_by(name):
                player.check_names([e for e in examples if e[mix.KEY] == name])

    async def rollouts(
        self, examples: list[dict], groups: list[int], temperature: float | None, **options
    ) -> list[Trajectory]:
        playing = []
        try:
            async with asyncio.TaskGroup() as tasks:
                for name, player in self.players.items():
                    player.engine = self.engine
                    mine = [i for i, example in enumerate(examples) if example[mix.KEY] == name]
                    if not mine:
                        continue
                    work = player.rollouts(
                        [examples[i] for i in mine],
                        [groups[i] for i in mine],
                        temperature,
                        **options,
                    )
                    playing.append(tasks.create_task(work))
        except ExceptionGroup as group:
            first = group.exceptions[0]
            raise first from first.__cause__
        played = [trajectory for part in playing for trajectory in part.result()]
        return sorted(played, key=lambda trajectory: (trajectory.group, trajectory.sample))


def in_template(template: str, content: str | list[dict]) -> str | list[dict]:
    """Puts a content of the user in the place of ASKED: of parts, the last text."""
    if isinstance(content, str):
        return template.replace(ASKED, content)
    texts = [place for place, part in enumerate(content) if "text" in part]
    if not texts:
        return content
    text = template.replace(ASKED, content[texts[-1]]["text"])
    parts = list(content)
    parts[texts[-1]] = {"type": "text", "text": text}
    return parts


def load_policy(cfg, tune: str, *chats: Chat):
    """Loads the weights that a config names, with the stop tokens of its chats; None where they are
    in an engine elsewhere."""
    if tune == "none" and cfg.tune == "qlora" and models.is_adapter(cfg.model):
        tune = "none4bit"  # what was trained was an adapter on the rounded base
    if cfg.engine != "transformers" and tune == "none":
        return None
    model, _ = models.load(
        cfg.model,
        tune,
        cfg.dtype,
        lora_r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_targets=cfg.lora_targets,
        seed=cfg.seed,
        train_vision=cfg.train_vision,
    )
    models.set_image_size(model, chats[0].vision)
    stop_ids = dict.fromkeys(stop_id for chat in chats for stop_id in chat.stop_ids)
    models.set_stop_ids(model, tuple(stop_ids))
    models.check_positions(model, cfg.model, cfg.max_tokens)
    return model


def prepare_task(cfg, limit: int | None = None) -> tuple[Toolbox, dict, list[dict]]:
    """Makes (toolbox, rewards, examples) of a config: all that does not depend on a model. limit:
    use the first so many rows, instead of cfg.limit."""
    rewards = reward_functions.select(cfg.rewards, cfg.reward_options)
    if cfg.dynamic_sampling not in ("", *rewards):
        names = ", ".join(rewards)
        raise UserError(f"dynamic_sampling = {cfg.dynamic_sampling!r}: expected one of {names}")
    toolbox = Toolbox(cfg.tools, cfg.tool_concurrency, cfg.tool_timeout, cfg.tool_options)
    reward_functions.check_environments(toolbox, rewards)
    examples = load_examples(cfg, cfg.data, cfg.split, limit or cfg.limit, cfg.seed)
    data.check_names(examples, list(toolbox.tools), list(rewards))
    reward_functions.check_rows(rewards, examples)
    return toolbox, rewards, examples


def load_examples(cfg, source: str, split: str, limit: int | None, seed: int) -> list[dict]:
    """Loads the rows of `source` with the columns and prompts that the config names; they
    need an answer where its rewards do."""
    return data.load(
        source,
        split,
        prompt_column=cfg.prompt_column,
        answer_column=cfg.answer_column,
        answer_after=cfg.answer_after,
        system_prompt=cfg.system_prompt,
        prompt_template=cfg.prompt_template,
        limit=limit,
        seed=seed,
        require_answer=reward_functions.need_answer(cfg.rewards),
        database=cfg.database,
    )


def validation_examples(cfg) -> list[dict]:
    """Loads the rows that are held out for train_grpo's eval_every; [] without it."""
    if not cfg.eval_every:
        return []
    if cfg.mix:
        held_out = []
        for source in mix.sources(cfg):
            with mix.told_by(source.name):
                for example in validation_examples(source.cfg):
                    held_out.append(example | {mix.KEY: source.name})
        return held_out
    if data.is_file(cfg.data) and not cfg.eval_data:
        why = f"data = {cfg.data!r} is a file and has no split of its own for eval_every"
        raise UserError(f"eval_data is missing: {why}")
    source = cfg.eval_data or cfg.data
    return load_examples(cfg, source, "test", cfg.eval_rows, VALIDATION_SEED)


def load_vision(cfg, tokenizer, examples: list[dict]) -> Vision | None:
    """Loads what shows images to the model of a config; None where it or its engine shows none.
    UserError if there are images then, or keys that have no effect."""
    base = models.base_of(cfg.model)
    options = read_options(cfg.engine, cfg.engine_options)
    vision = None
    reason = ""
    if cfg.engine == "vllm" and not options.images:
        reason = "engine_options has images=false, drop it"
    else:
        vision = find_vision(base, tokenizer, cfg.min_pixels, cfg.max_pixels)
        reason = "" if vision else why_blind(base)
    if vision and cfg.engine != "transformers" and not vision.family.in_vllm:
        vision = None
        reason = f"model = {base!r} is not proved for images in vLLM, use engine=transformers"
    if vision is None and (cfg.min_pixels or cfg.max_pixels):
        raise UserError(f"min_pixels and max_pixels have no effect: {reason}")
    if vision is None and cfg.train_vision:
        raise UserError(f"train_vision has no effect: {reason}")
    if cfg.train_vision and cfg.engine == "server" and cfg.tune != "full":
        raise UserError(
            "train_vision = true: a server may leave the tower's adapters out without a word, so "
            "use engine=vllm"
        )
    for example in examples:
        if vision is None and example.get("images"):
            raise UserError(f"row {example['id'] + 1} has images: {reason}")
    return vision


def chats_of_rows(chat: Chat, examples: list[dict]) -> list[Chat]:
    """Lists the chat of the first row with tools, where the run has none: their template may end
    turns in another way."""
    if chat.tools:
        return []
    with_tools = [example for example in examples if example.get("tools")]
    return [chat.for_row(example) for example in with_tools[:1]]


def check_prompts(chat: Chat, examples: list[dict], max_tokens: int) -> None:
    """Checks that the template shows the tools of all these, and renders prompts like them: one of
    each sequence of roles; and that there is room to answer the first. UserError, with the row's
    number."""
    seen = set()
    for example in examples:
        roles = tuple(message["role"] for message in example["messages"])
        try:
            chat_of_row = chat.for_row(example)
            if "assistant" in roles:
                tools = [tool["function"]["name"] for tool in chat_of_row.tools]
                data.check_calls(example["messages"], tools, remedy="name it in --tools=…")
            if roles not in seen:
                length = len(chat_of_row.prompt(example["messages"], chat.pictures(example)))
        except UserError as error:
            raise UserError(f"row {example['id'] + 1}: {error}") from None
        if not seen and length >= max_tokens:
            raise UserError(f"max_tokens = {max_tokens}: the first prompt alone has {length}")
        seen.add(roles)


async def start_engine(
    cfg, model, tokenizer, vision: Vision | None = None, has_images: bool = False
) -> Engine:
    """Starts the engine that a config names, before its first sync. model: the policy; only the
    transformers engine and a rounded base (qlora) need it, else it may be None. vision: None where
    no image will come. has_images: some will, by the rows."""
    options = read_options(cfg.engine, cfg.engine_options)
    if cfg.engine == "transformers":
        patience = options.patience
        return TransformersEngine(model, tokenizer, options.deterministic, patience=patience)

    is_trained = model is not None and any(p.requires_grad for p in model.parameters())
    has_adapter = is_trained and cfg.tune != "full"
    if cfg.engine == "server":
        is_full = is_trained and not has_adapter
        return await servers.start(
            cfg.urls,
            cfg.model,
            tokenizer,
            options.timeout,
            cfg.max_tokens,
            vision,
            has_images,
            folder=options.folder,
            full=cfg.dtype if is_full else "",
            out_dir=cfg.out_dir if is_full else "",
            lora_r=cfg.lora_r if has_adapter else 0,
            transport=options.transport,
        )

    return await vllm.start(
        cfg.model,
        model,
        cfg.dtype,
        full=is_trained and cfg.tune == "full",
        lora_r=cfg.lora_r if has_adapter else 0,
        sleeps=options.sleep and is_trained,
        tensor_parallel_size=options.tensor_parallel_size,
        kv_cache_gib=options.kv_cache_gib,
        vision=vision,
        trains_tower=cfg.train_vision,
        max_model_len=cfg.max_tokens,
        max_num_seqs=cfg.max_concurrent,
        gpu_memory_utilization=cfg.gpu_memory_utilization,
        enforce_eager=options.enforce_eager,
        seed=cfg.seed % 2**32,
    )
