# ChartGemma's questions with short answers, those held out: chartgemma.py says how to take them.
data = "chartgemma_test.parquet"
prompt_column = "input"
answer_column = "output"
rewards = ("relaxed",)
