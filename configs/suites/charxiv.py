# CharXiv's questions that take reasoning, --split=validation (those of its test have no answers).
# Published figures are by a judge: --rewards=judge; `relaxed` counts fewer as right.
data = "princeton-nlp/CharXiv"
prompt_column = "reasoning_q"
answer_column = "reasoning_a"
rewards = ("relaxed",)
