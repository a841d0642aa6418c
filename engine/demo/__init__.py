"""The demo model and the world of synthetic documents that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MODEL_PATH: Final = Path(__file__).parent / "stemcache-demo"
"""The demo model's folder: what is served when no model is named."""
