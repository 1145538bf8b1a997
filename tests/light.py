"""What test_resume.nursery imports first: transformers would import scikit-learn, for a way to
decode that nobody here takes, and that takes as long as all else together."""

import sys

sys.modules["sklearn"] = None  # as if it were not installed
