"""What test_resume.nursery imports last, before it is forked from: what is there by then is left
alone by the garbage collector, whose marks would copy every page of it in each process. And what
each process would compile and look up once more when it loads its model, is there too."""

import atexit
import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen3")  # seven hundred patterns
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
