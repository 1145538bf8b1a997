# 1x80 GB GPU, a day; not run here. SkyRL-SQL, from this model with about 600 questions:
# up to 9.2 points more on five Spider benchmarks.
# python evaluate.py --run=out/nl2sql --split=validation
# The databases are a download of their own (Spider's): database says where they lie.
out_dir = "out/nl2sql"
model = "Qwen/Qwen2.5-Coder-7B-Instruct"
engine = "vllm"
data = "xlangai/spider"
prompt_column = "question"
answer_column = "query"
database = "spider/database/{db_id}/{db_id}.sqlite"
prompt_template = "The database:\n{schema}\n\nThe question: {prompt}"
system_prompt = (
    "Write an SQLite query that answers the question. Try queries with the sql tool first, and "
    "look at what they give. Then write the final one in a ```sql block."
)
tools = ("sql",)
format = "hermes"
rewards = ("sql_match",)
steps = 150
prompts_per_step = 64
group_size = 5
max_tokens = 8192
max_new_tokens = 1024
max_turns = 5
tune = "lora"
learning_rate = 2e-5
dtype = "bfloat16"
gradient_checkpointing = True  # else a pass keeps 150 GiB
