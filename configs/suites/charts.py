# Charts, for models that see. ChartQA, relaxed: Qwen2.5-VL-3B 84.0, 7B 87.3 (arXiv:2502.13923),
# without tools. CharXiv's and ReachQA's published figures are by a judge: see suites/charxiv.py.
models = ("Qwen/Qwen2.5-VL-3B-Instruct --engine=vllm --dtype=bfloat16",)
out_dir = "out/charts"
data = (
    "chartqa: chartqa.py",
    "charxiv: chartqa.py --data=princeton-nlp/CharXiv --split=validation"
    " --prompt_column=reasoning_q --answer_column=reasoning_a",
    "reachqa: chartqa.py --data=hewei2001/ReachQA --prompt_column=question --answer_column=answer",
)
