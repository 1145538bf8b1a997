"""A config becomes what plays: the one seam for training, evaluation, serving and notebooks.

with Player.of(cfg) as player:            # loads, proves the chat template, starts the engine
    trajectories = player.play(player.examples[:4], samples=8)

Player(chat, engine, toolbox, rewards, Settings()).play(examples)   # of parts made by hand
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import data
import rewards as reward_functions
from chat import Chat
from engines import servers, vllm
from engines.base import Engine, check_engine
from engines.local import TransformersEngine
from engines.options import read_options
from learning import model as models
from learning import parallel
from learning.vision import Vision, find_vision, why_blind
from rollout import Settings, rollouts
from run.config import UserError
from run.loop import run_blocking
from tools import Toolbox
from trajectory import Trajectory

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

    @classmethod
    def of(cls, cfg, tune: str = "none", limit: int | None = None) -> "Player":
        """Makes all that train_grpo's Config (or one like it) describes but the engine; what is
        cheap to check comes first.

        tune: how the model will be trained, "none" if it will not be. limit: use the first so many
        rows, instead of cfg.limit. Raises UserError for whatever the config gets wrong.
        """
        # 1. what needs no model
        check_engine(cfg.engine, cfg.urls, tune)
        models.find(cfg.model)
        toolbox, rewards, examples = prepare_task(cfg, limit)

        # 2. the chat template, proved before any weights are loaded
        tokenizer = models.load_tokenizer(cfg.model, cfg.chat_template)
        eos_ids = models.eos_ids(cfg.model)
        vision = load_vision(cfg, tokenizer, examples)
        chat = Chat(tokenizer, cfg.format, toolbox.schemas, cfg.template_options, eos_ids, vision)
        check_prompts(chat, examples, cfg.max_tokens)

        # 3. the weights, unless an engine elsewhere has them
        if tune == "none" and cfg.tune == "qlora" and models.is_adapter(cfg.model):
            tune = "none4bit"  # what was trained was an adapter on the rounded base
        model = None
        if cfg.engine == "transformers" or tune != "none":
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
            models.set_image_size(model, vision)
            models.set_stop_ids(model, chat.stop_ids)
            models.check_positions(model, cfg.model, cfg.max_tokens)
        settings = Settings.of(cfg)
        return cls(chat, None, toolbox, rewards, settings, None, model, examples, cfg)

    def __enter__(self) -> "Player":
        try:
            if self.engine is None:
                has_images = any(example.get("images") for example in self.examples)
                # tools may return some; without them, and none in the rows, there will be none
                may_come = has_images or self.cfg.tools or self.cfg.train_vision
                vision = self.chat.vision if may_come else None
                starting = start_engine(
                    self.cfg, self.model, self.chat.tokenizer, vision, has_images
                )
                self.engine = run_blocking(starting)
        except BaseException:
            run_blocking(self.toolbox.close())
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            run_blocking(self.engine.close())
        finally:
            run_blocking(self.toolbox.close())

    @property
    def outcome(self) -> str:
        """The name of the reward that says right or wrong: the first."""
        return next(iter(self.rewards))

    def play(
        self,
        examples: list[dict],
        samples: int = 1,
        step: int = 0,
        first_group: int = 0,
        temperature: float | None = None,
        on_done: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Plays and scores `samples` trajectories of each example; see rollout.rollouts.
        temperature: instead of that of the settings. Works in notebooks too."""
        settings = self.settings
        if temperature is not None:
            settings = replace(settings, temperature=temperature)
        # each rank plays its share; then all of them know all trajectories
        groups = parallel.share(list(range(len(examples))))
        with parallel.together():
            playing = rollouts(
                [examples[group] for group in groups],
                self.chat,
                self.engine,
                self.toolbox,
                settings,
                step=step,
                samples=samples,
                rewards=self.rewards,
                on_done=on_done,
                groups=[first_group + group for group in groups],
                turn=self.turn,
            )
            played = run_blocking(playing)
        played = parallel.gathered(played)
        self._prepare_images(played)
        return sorted(played, key=lambda trajectory: (trajectory.group, trajectory.sample))

    def _prepare_images(self, trajectories: list[Trajectory]) -> None:
        """Prepares the images of trajectories that other ranks have played: they come without what
        the model is given. Those that the samples of a group share stay one."""
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
    if cfg.train_vision and cfg.engine == "server":
        raise UserError(
            "train_vision = true: a server may leave the tower's adapters out without a word, so "
            "use engine=vllm"
        )
    for example in examples:
        if vision is None and example.get("images"):
            raise UserError(f"row {example['id'] + 1} has images: {reason}")
    return vision


def check_prompts(chat: Chat, examples: list[dict], max_tokens: int) -> None:
    """Checks that there is room to answer the first prompt, and that the template renders prompts
    like all of these: one of each sequence of roles. UserError, with the row's number."""
    length = len(chat.prompt(examples[0]["messages"], chat.pictures(examples[0])))
    if length >= max_tokens:
        raise UserError(f"max_tokens = {max_tokens}: the first prompt alone has {length}")
    tools = [tool["function"]["name"] for tool in chat.tools]
    seen = set()
    for example in examples:
        roles = tuple(message["role"] for message in example["messages"])
        try:
            if "assistant" in roles:
                data.check_calls(example["messages"], tools, remedy="name it in --tools=…")
            if roles not in seen:
                chat.prompt(example["messages"], chat.pictures(example))
        except UserError as error:
            raise UserError(f"row {example['id'] + 1}: {error}") from None
        seen.add(roles)


async def start_engine(
    cfg, model, tokenizer, vision: Vision | None = None, has_images: bool = False
) -> Engine:
    """Starts the engine that a config names, before its first sync. model: the policy; only the
    transformers engine and a rounded base (qlora) need it, else it may be None. vision: None where
    no image will come. has_images: some will, by the rows."""
    options = read_options(cfg.engine, cfg.engine_options)
    if cfg.engine == "transformers":
        return TransformersEngine(model, tokenizer, options.deterministic)

    if cfg.engine == "server":
        return await servers.start(
            cfg.urls, cfg.model, tokenizer, options.timeout, cfg.max_tokens, vision, has_images
        )

    is_trained = model is not None and any(p.requires_grad for p in model.parameters())
    has_adapter = is_trained and cfg.tune != "full"
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
