"""The files of this folder import each other by stem, as they do when run.py is a script."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
