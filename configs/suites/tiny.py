# 2-core CPU, a minute: three tiny models on three tasks, each right on its own and lost on others'.
# First: python demo.py --task=calc, then facts and shop. A prompt of another's words is longer.
models = ("out/calc", "out/facts", "out/shop")
data = ("calc.py --max_tokens=1024", "facts.py --max_tokens=1024", "shop.py --max_tokens=1024")
out_dir = "out/tiny_suite"
limit = 256
