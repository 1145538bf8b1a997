# 2-core CPU, a minute: three tiny models on three tasks, each right on its own and lost on others'.
# First: python demo.py --task=calc, then facts and shop.
models = ("out/calc", "out/facts", "out/shop")
data = ("calc.py", "facts.py", "shop.py")
out_dir = "out/tiny_suite"
limit = 256
