"""Speed and memory, side by side with TRL: `make bench`, or `python -m benchmarks.against_trl --help`."""

import tralign_mini  # noqa: F401  before anything imports bitsandbytes, which it keeps quiet
