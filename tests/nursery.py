"""What test_resume.nursery imports last, before it is forked from: what is there by then is left
alone by the garbage collector, whose marks would copy every page of it in each process."""

import atexit
import gc

gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
