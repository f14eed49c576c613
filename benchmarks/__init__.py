"""What the provider costs, next to the bare tools and next to what people do otherwise. See README.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
