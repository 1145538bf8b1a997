# Benchmarks of text, with the prompts, tools and rewards of the training configs; not run here.
# python evaluate.py --config suites/benchmarks.py --models=out/aime --only=aime24,aime25
# The numbers behind them are published ones of the models named, each by its makers' own prompts,
# samples and tools, which are not these: compare runs with each other first. A GPU of 80 GB.
models = ("Qwen/Qwen2.5-7B-Instruct --engine=vllm --dtype=bfloat16",)
out_dir = "out/benchmarks"
_aime = "--prompt_column=problem --answer_column=answer"
_flash = "--data=RUC-NLPIR/FlashRAG_datasets"
_eval = "--data=openai/openai_humaneval --prompt_column=prompt --answer_column=test"
_mbpp = "--data=google-research-datasets/mbpp:sanitized --prompt_column=prompt --answer_column=code"
_tests = "--reward_options=code_tests.column=test_list"
_shown = "'--prompt_template={prompt} It must pass: {test_list}'"
data = (
    # DeepSeek-R1-Distill-Qwen-7B 55.5, 1.5B 28.9: pass@1 of 64 samples (arXiv:2501.12948)
    # Qwen3-8B 76.0, 4B 73.8: mean of 64, thinking (arXiv:2505.09388)
    f"aime24: aime.py --data=HuggingFaceH4/aime_2024 --split=train {_aime} --n=32 --temperature=1",
    # Qwen3-8B 67.3, 4B 65.6 (the same paper)
    f"aime25: aime.py --data=math-ai/aime25 {_aime} --n=32 --temperature=1",
    # DeepSeek-R1-Distill-Qwen-7B 92.8, 1.5B 83.9; Qwen3-8B 97.4 (the same papers)
    f"math500: aime.py --data=HuggingFaceH4/MATH-500 {_aime} --category_column=subject",
    # Qwen2.5-7B-Instruct 91.6 without tools (arXiv:2412.15115)
    "gsm8k: gsm8k.py",
    # Qwen2.5-7B-Instruct 84.8 (the same report)
    f"humaneval: acecoder.py {_eval} --reward_options=code_tests.column=test",
    # Qwen2.5-7B-Instruct 79.2 on MBPP (the same report); the prompt shows the tests, as is usual
    f"mbpp: acecoder.py {_mbpp} {_tests} {_shown}",
    # by exact match, Search-R1 from Qwen2.5-7B: NQ 48.0, HotpotQA 43.3 (arXiv:2503.09516); their
    # search is a server that has to run: see nq_search.py
    "nq: nq_search.py",
    f"hotpotqa: nq_search.py {_flash}:hotpotqa --split=dev",
    # its databases are a download of their own: see nl2sql.py. No figure: published ones are by
    # Spider's test suite of several databases, which is stricter than one
    "spider: nl2sql.py --split=validation",
    # one turn in python, by BFCL's AST comparison. No figure: those that are published are means
    # over categories of several turns and of java and javascript, too
    "bfcl: bfcl.py --category_column=category",
    "bfcl_live: bfcl.py --data=bfcl:live --category_column=category",
)
