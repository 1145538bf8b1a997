# 1x80 GB GPU, days; not run here. RL-Factory, 8x A100 in 5.3 h: NQ exact match 0.458 with Qwen3-4B.
# Wikipedia is searched by a server, python -m serve.retrieve --corpus=wiki.jsonl, or Search-R1's;
# --tool_options=search.corpus=wiki.jsonl searches a JSONL file without one.
out_dir = "out/nq_search"
model = "Qwen/Qwen3-4B"
engine = "vllm"
data = "RUC-NLPIR/FlashRAG_datasets:nq"
prompt_column = "question"
answer_column = "golden_answers"
system_prompt = (
    "Answer the question. Search for what you do not know for sure, as often as you need to. Give "
    "the answer, a few words, as <answer>...</answer>."
)
tools = ("search",)
tool_options = ("search.url=http://127.0.0.1:8000/retrieve", "search.k=3", "search.retries=3")
tool_concurrency = 64
format = "hermes"
template_options = ("enable_thinking=false",)  # a thought would take all of max_new_tokens
rewards = ("exact_match", "format:0.1")
steps = 200
prompts_per_step = 128
group_size = 5
max_tokens = 4096
max_new_tokens = 512
max_turns = 4
max_observation_tokens = 1536
learning_rate = 1e-6
beta = 1e-3
dtype = "mixed"
optimizer = "adamw8bit"  # needs .[qlora]; moments of 8 GB and not of 32
gpu_memory_utilization = 0.35  # weights, their reference (beta) and moments take 40 GB beside it
gradient_checkpointing = True
