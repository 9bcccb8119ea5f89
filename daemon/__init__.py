"""lensd. Nothing is to be imported from here."""

import os

# Read when pyarrow is first imported. With an allocator of its own Arrow's memory comes on top of the heap's.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
