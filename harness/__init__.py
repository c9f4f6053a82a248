"""The training library: from a frozen Plan to a trained, verified, exported model. No Ray here."""

import logging

# Before its first import: it warns about an optional kernel there, and once per layer in int8 products.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
