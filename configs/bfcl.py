# One 24 GB GPU, an hour for each thousand questions at most; not run here. To be evaluated on:
# which functions a model calls, of those that each question brings along, and with what. Nobody
# runs them, and the turn that calls them is the last. No published figure stands here: those of the
# leaderboard are means over categories of several turns and of other languages, too.
# python evaluate.py --config bfcl.py --category_column=category --engine=vllm
out_dir = "out/bfcl"
model = "Qwen/Qwen2.5-7B-Instruct"
data = "bfcl:non_live"  # or live, single_turn, names of categories; ?folder=… for files
tools = ()  # each row has its own
rewards = ("call_match",)
max_turns = 1  # as there: who calls in a way that does not fit is not asked again
max_tokens = 8192  # some questions have 37 functions
max_new_tokens = 1024
dtype = "bfloat16"
